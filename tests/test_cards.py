"""What rules and stages say of themselves: tables, cards and the page are made from the metadata, and are true."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import thalweg
from thalweg.cli.main import main
from thalweg.core import Recipe, RecipeError
from thalweg.engine.settle import Decisions, settle_optimizer
from thalweg.optim import Program, card
from thalweg.optim.face import class_name
from thalweg.rules import RULES, STAGES, make_rule

COST = re.compile(r"(\d+) slots? a parameter \((\d+) B at fp32[^)]*\).*?; reads (\d+) and writes (\d+) tensors a step")


def components() -> list[tuple[str, object]]:
    return [*((name, RULES[name]) for name in RULES), *((name, STAGES[name]) for name in STAGES)]


@pytest.mark.parametrize("name", [name for name, _ in components()])
def test_a_card_tells_all_that_the_metadata_holds(name: str) -> None:
    rule = RULES[name] if name in RULES else STAGES[name]
    text = " ".join(card.as_text(card.card(name), width=100).split())
    wanted = [rule.paper, rule.reads] if name in STAGES else [rule.paper, f"thalweg.optim.{class_name(name)}("]
    if name in RULES:
        wanted += [rule.use, rule.avoid, rule.evidence, rule.reference, rule.status, *rule.ships, f"lr={rule.lr:g}"]
    assert [part for part in wanted if " ".join(part.replace("``", "").split()) not in text] == []
    assert all(card.card(name).maths), "the docstring begins with the maths"


@pytest.mark.parametrize("name", [name for name, _ in components()])
def test_every_option_is_explained(name: str) -> None:
    rule = RULES[name] if name in RULES else STAGES[name]
    shown = {key for names, _, meaning in card.card(name).options for key in names.split(", ") if meaning}
    assert shown == set(rule.defaults)


def costs() -> dict[str, list[int]]:
    """(slots, bytes, reads, writes) of the rules whose docstring tells of them in numbers."""
    told = {name: COST.match(dict(card.card(name).facts).get("cost", "")) for name in RULES}
    return {name: [int(number) for number in found.groups()] for name, found in told.items() if found}


@pytest.mark.parametrize("name", list(costs()))
def test_the_cost_that_a_rule_tells_is_the_computed_one(name: str) -> None:
    """Slots and traffic stand in the docstring for people; they are counted here from what the program does."""
    slots, size, reads, writes = costs()[name]
    program = Program(RULES[name], RULES[name].defaults)
    assert 4 * slots == size == round(card.bytes_of(program.slots))
    assert round(card.bytes_moved(RULES[name])) == 4 * (reads + writes)


def test_most_costs_are_compared() -> None:
    assert len(costs()) >= len(RULES) // 2


def test_bytes_follow_the_shapes_of_slots() -> None:
    size = {name: card.bytes_of(Program(RULES[name], RULES[name].defaults).slots) for name in RULES}
    assert size["sgd"] == 0 and size["muon"] == 4 and size["adamw"] == 8 and size["prodigy"] == 16
    assert size["adafactor"] == pytest.approx(4 * 2 / 1024)  # a row and a column of a square matrix
    assert size["soap"] == 4 * (2 + 4)  # two moments, and four squares of the sides
    assert size["schedule_free_adamw"] == 8  # v, and z of its stage; its uniform numbers cost nothing


def test_what_is_only_read_is_not_counted_as_written() -> None:
    assert card.bytes_moved(RULES["prodigy"]) == 4 * (6 + 4)  # its start is never written
    assert card.bytes_moved(RULES["adopt"]) == 4 * (4 + 3)  # m moves from the second update on
    assert card.bytes_moved(RULES["soap"]) == 4 * (8 + 7)  # bases where they are due


@pytest.mark.parametrize("name", list(RULES))
def test_what_a_card_says_to_write_can_be_written(name: str) -> None:
    shown = card.card(name)
    if shown.recipe:
        recipe = settle_optimizer(Recipe.from_toml(shown.recipe), Decisions())
        assert (recipe.optimizer.rule, recipe.optimizer.lr) == (name, RULES[name].lr)
    else:
        with pytest.raises(RecipeError, match="second gradient"):
            settle_optimizer(Recipe().override({"optimizer.rule": name}), Decisions())
    names = {"thalweg": thalweg, "model": nn.Linear(4, 3)}
    exec(shown.python, names)
    assert names["optimizer"].rule_name == name
    assert names["optimizer"].param_groups[0]["lr"] == RULES[name].lr


@pytest.mark.parametrize("name", list(STAGES))
def test_what_a_stage_says_to_write_does_what_it_says(name: str) -> None:
    shown = card.card(name)
    recipe = settle_optimizer(Recipe.from_toml(shown.recipe), Decisions()).optimizer
    names = {"thalweg": thalweg, "model": nn.Linear(4, 3)}
    exec(shown.python, names)
    group = names["optimizer"].param_groups[0]
    assert dict(group["stages"]).keys() == recipe.stages.keys()
    assert (group["decay_form"], group["weight_decay"]) == (recipe.decay_form, recipe.weight_decay)
    assert recipe.stages or recipe.weight_decay
    nn.functional.mse_loss(names["model"](torch.ones(2, 4)), torch.zeros(2, 3)).backward()
    names["optimizer"].step()


def test_choices_are_shown() -> None:
    variants = {names: meaning for names, _, meaning in card.card("muon").options}
    assert all(f'"{choice}"' in variants["scale"] for choice in RULES["muon"].choices["scale"])

    def vane(p, g, *, lr, t, mode="east"):
        """p <- p - lr*g.

        Args:
            mode: whence it blows.
        """
        return (-lr * g,)

    ((names, default, meaning),) = card._rule_card(make_rule(vane, choices={"mode": ("east", "west")})).options
    assert (names, default) == ("mode", '"east"')
    assert meaning == 'whence it blows (one of "east", "west").'


def test_parts_of_a_docstring_are_told_apart() -> None:
    def both(p, g, *, lr, t, a=1.0, b=2.0, many=3):
        """a <- 1;  b <- 2;
        p <- p - lr*g.

        A word more.

        Args:
            p, g: of one shape.
            a, b: two
                numbers.
            many: a count: 3.

        Where it is 0, nothing is.

        Cost: little;
            not much.
        Departures: none.
        """
        return (-lr * g,)

    shown = card._rule_card(make_rule(both))
    facts = dict(reversed(shown.facts))
    assert shown.maths == ("a <- 1", "b <- 2", "p <- p - lr*g")
    assert shown.options == (("a, b", "1, 2", "two numbers."), ("many", "3", "a count: 3."))
    assert (facts["cost"], facts["departures"], facts[""]) == (
        "little; not much.",
        "none.",
        "A word more. Where it is 0, nothing is.",
    )


# The command


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["rules", *words]) == 0
    return capsys.readouterr().out


def test_the_table_has_a_line_for_each_rule(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys).splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(RULES)]] == list(RULES)
    assert re.split(r"  +", next(line for line in lines if line.startswith("adamw "))) == [
        "adamw",
        "settled",
        "element",
        "m, v",
        "8",
        "28",
        "0.001",
        "Loshchilov and Hutter 2017, arXiv:1711.05101",
    ]
    assert "at least two years old and at least three libraries" in lines[len(RULES) + 2]


def test_the_table_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "--stages").splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(STAGES)]] == list(STAGES)
    (lookahead,) = [line for line in lines if line.startswith("lookahead ")]
    assert "slow" in lookahead and "k=5, alpha=0.5" in lookahead and "the new weights" in lookahead


def test_a_narrow_terminal_shows_names_and_papers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    screen = Narrow()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["rules"]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    table = shown.split("status: ")[0]
    assert max(map(len, table.splitlines())) <= 80 and "\u2026" not in table
    assert "arXiv:1711.05101" in table and all(name in table for name in RULES)
    assert "slots" not in table.splitlines()[0]
    screen.seek(0)
    screen.truncate()
    assert main(["rules", "muon"]) == 0
    assert max(len(line) for line in screen.getvalue().splitlines()) <= 80


def test_an_unknown_name_is_a_mistake_of_three_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "mouon"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: There is no update rule or stage called 'mouon'."
    assert lines[1] == f"  {len(RULES)} rules and {len(STAGES)} stages are registered."
    assert lines[2].startswith("  Did you mean muon? Known: ") and "cautious" in lines[2]


@pytest.mark.parametrize("words", [[], ["--stages"], ["muon"]])
def test_a_reader_who_has_gone_is_no_error(words: list[str], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "thalweg.cli.main", "rules", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


# The page


def test_the_page_shows_text_as_it_is() -> None:
    shown = card._prose("a*b < |c| of ``d*e`` (arXiv:1412.6980v2), [x](#x)", cell=True)
    assert shown == r"a\*b \< \|c\| of `d*e` ([arXiv:1412.6980v2](https://arxiv.org/abs/1412.6980v2)), [x](#x)"
