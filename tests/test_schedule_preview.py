"""``thalweg schedules``: the language as a list and as cards, and every scheduled value of a recipe, drawn before the run."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thalweg
from tests.conftest import ROOT, three_parts
from thalweg.cli.main import main
from thalweg.core import Recipe, RecipeError, Task
from thalweg.core.recipe import Schedule
from thalweg.engine.preview import preview, preview_of_task
from thalweg.report.preview import ROWS, as_svg, in_terminal, table
from thalweg.schedules import COMPOSITIONS, SHAPES, cards
from thalweg.schedules.curve import Curve
from thalweg.schedules.shapes import options_of
from thalweg.schedules.span import UNITS

SVG = "{http://www.w3.org/2000/svg}"
RECIPE = """
[train]
steps = 100
batch = 64
micro_batch = 16
clip = 2.0

[optimizer]
lr = 4e-3
weight_decay = 0.1

[schedule]
lr = "warmup(20) >> cosine(to=0.25)"
weight_decay = "linear(to=2.0)"
clip = "hold(50%) >> constant(value=0.5)"
average = "warmup(10, start=0.9) >> hold()"
batch = "warmup(50%, start=0.25) >> hold()"
sequence = "linear(to=0.5)"
image_size = "constant(50%, value=0.5) >> constant(value=1)"
dropout = "linear()"
stochastic_depth = "hold()"

[schedule.options]
b1 = "linear(to=0.8)"

[schedule.loss]
label_smoothing = "hold(40) >> linear()"

[schedule.penalties]
l1 = "warmup(320 examples) >> hold()"

[regularize]
average = 0.99
stochastic_depth = 0.2

[regularize.penalties]
l1 = 1e-4
"""
#: What RECIPE schedules, worked out by hand: the first, the largest and the last value, and where. The batch is 16 for 8
#: steps, then 32: 320 examples are over after 8*16 + 6*32, at update 14.
FIGURES = {
    "lr": ("0.0002 at update 1", "0.004 at update 20", "0.001 at update 100"),
    "weight_decay": ("0.1 at update 1", "0.2 at update 100", "0.2 at update 100"),
    "clip": ("2 at update 1", "2 at update 1", "1 at update 100"),
    "average": ("0.909 at update 1", "0.99 at update 10", "0.99 at update 100"),
    "batch": ("16 at step 1", "64 at step 42", "64 at step 100"),
    "sequence": ("1 at step 1", "1 at step 1", "0.5 at step 100"),
    "image_size": ("0.5 at step 1", "1 at step 51", "1 at step 100"),
    "dropout": ("1 at update 1", "1 at update 1", "0 at update 100"),
    "stochastic_depth": ("0.2 at update 1", "0.2 at update 1", "0.2 at update 100"),
    "options.b1": ("0.9 at update 1", "0.9 at update 1", "0.8 at update 100"),
    "loss.label_smoothing": ("1 at update 1", "1 at update 1", "0 at update 100"),
    "penalties.l1": ("7.14286e-06 at update 1", "0.0001 at update 14", "0.0001 at update 100"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh current folder with a recipe, on the module path; a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "mine.toml").write_text(RECIPE, encoding="utf-8")
    yield tmp_path
    sys.modules.pop("a_tiny_task", None)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that succeeds."""
    assert main(["schedules", *arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor], label_smoothing: float = 0.2) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"]) * (1 + 0 * label_smoothing)


def small_task(**named: object) -> Task:
    """40 samples: 5 steps of 8 an epoch."""
    draw = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(40, 4, generator=draw), "y": torch.arange(40) % 3}
    return Task(**{"model": network, "loss": loss_of, "data": data, **named})  # type: ignore[arg-type]


def small(**changes: object) -> Recipe:
    return Recipe().override({"train.steps": 30, "train.batch": 8, "precision": "fp32", **changes})


def by_name(curves: list[Curve]) -> dict[str, Curve]:
    assert len({curve.name for curve in curves}) == len(curves)
    return {curve.name: curve for curve in curves}


# --- the list and the cards ------------------------------------------------------------------------------------------


def test_the_list_has_every_shape_composition_unit_and_every_value_that_moves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = told(capsys)
    for name in SHAPES:
        written = ", ".join(f"{key}={value!r}" for key, value in options_of(name).items())
        assert f"  {name}({written})\n      {SHAPES[name].formula}\n" in out
        assert SHAPES[name].formula and SHAPES[name].about.replace("``", "`") in out
    for name in COMPOSITIONS:
        assert re.search(rf"^  {name}\(", out, flags=re.MULTILINE)
    assert all(unit in out for unit in UNITS)
    assert ">>" in out and "*" in out
    rows = dict(re.findall(r"^  (schedule\.\w+)(?:\.NAME)? +(factor|value) ", out, flags=re.MULTILINE))
    values = {"average", "options"}
    assert rows == {
        f"schedule.{field.name}": "value" if field.name in values else "factor"
        for field in dataclasses.fields(Schedule)
    }


@pytest.mark.parametrize("name", [*SHAPES, *COMPOSITIONS])
def test_every_card_explains_its_options_and_draws_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, name)
    example = cards.example(name)
    assert name in example.name and example.name in out
    assert f"first {example.values[0]:.6g} at update 1" in out and f"last {example.values[-1]:.6g} at update 120" in out
    assert "⣀" in out or "⠉" in out
    if name in COMPOSITIONS:
        parameters = inspect.signature(COMPOSITIONS[name]).parameters
        assert all(re.search(rf"^{name}\(.*\b{key}\b", out, flags=re.MULTILINE) for key in parameters)
        return
    assert SHAPES[name].formula in out
    for key, value in options_of(name).items():
        assert re.search(rf"^  {key}={re.escape(repr(value))} +\w", out, flags=re.MULTILINE), key
    assert bool(SHAPES[name].feedback) == ("listens to:" in out) == ("nothing had been heard" in out)


def test_an_option_that_another_shape_explains_is_explained() -> None:
    assert cards.meaning_of("loss_plateau", "min_delta") == (
        "what counts as better: by more than this; counted in updates."
    )
    assert cards.meaning_of("warmup", "start").startswith("the value that the rise begins from")


def test_an_unknown_shape_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedules", "cosin"]) == 2
    assert "Did you mean cosine?" in capsys.readouterr().err
    with pytest.raises(RecipeError) as err:
        cards.card("cosin")
    assert "cosin" in three_parts(err.value)[0]


def test_the_list_and_the_cards_import_no_torch() -> None:
    program = (
        "import sys; from thalweg.cli.main import main; main(['schedules']); main(['schedules', 'cosine']); "
        "print('heavy:', sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.endswith("heavy: []\n"), done.stdout[-500:] + done.stderr


# --- a recipe alone --------------------------------------------------------------------------------------------------


def test_every_value_is_drawn_with_its_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "preview", "mine.toml")
    blocks = {block.split("  ")[0]: block for block in out.split("\n\n")[:-1]}
    assert list(blocks) == [
        "lr",
        "weight_decay",
        "clip",
        "average",
        "dropout",
        "stochastic_depth",
        "options.b1",
        "loss.label_smoothing",
        "penalties.l1",
        "batch",
        "sequence",
        "image_size",
    ]
    for name, (first, peak, last) in FIGURES.items():
        assert re.search(rf"first {first}, peak {peak}, (least .*)?last {last}$", blocks[name], flags=re.MULTILINE)
    assert "warmup(20) >> cosine(to=0.25)" in blocks["lr"] and "factor on optimizer.lr=0.004" in blocks["lr"]
    assert "the value itself; the recipe's is 0.99" in blocks["average"]
    assert "(1 + t)/(10 + t)" in blocks["average"]
    assert "samples of a window, of 64, in multiples of 16" in blocks["batch"]
    assert "which the task has (--task)" in blocks["loss.label_smoothing"]
    assert out.endswith("wrote mine.schedules.svg\n")


def test_the_svg_is_xml_with_the_line_of_each_value(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "preview", "mine.toml")
    root = ElementTree.parse(folder / "mine.schedules.svg").getroot()
    assert root.tag == f"{SVG}svg"
    lines = {line.get("data-name"): line for line in root.iter(f"{SVG}polyline")}
    assert set(lines) == set(FIGURES)
    for name, line in lines.items():
        points = [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
        assert len(points) == 100 and points[0][0] == 70 and points[-1][0] == 702
        highest = min(points, key=lambda point: point[1])  # y grows downwards
        peak = int(FIGURES[name][1].split()[-1])
        assert highest[1] == pytest.approx(points[peak - 1][1])
        assert max(y for _, y in points) <= 178 and highest[1] >= 52
        title = line.find(f"{SVG}title")
        assert title is not None and f"first {FIGURES[name][0]}" in str(title.text)
    text = (folder / "mine.schedules.svg").read_text(encoding="utf-8")
    assert "href" not in text and "<script" not in text and "url(" not in text


def test_values_are_listed_at_twenty_places(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "preview", "mine.toml", "--values")
    rows = [line.split() for line in out.split("\n\n")[-2].splitlines()]
    heading, *rows = rows
    assert heading[0] == "update" and set(heading[1:]) == set(FIGURES)
    assert len(rows) == 20 and rows[0][0] == "1" and rows[-1][0] == "100"
    for row in (rows[0], rows[-1]):
        place = 0 if row is rows[0] else 2
        assert dict(zip(heading[1:], row[1:])) == {name: told[place].split()[0] for name, told in FIGURES.items()}
    at = next(row for row in rows if row[0] == "17")
    assert float(at[1]) == pytest.approx(4e-3 * 17 / 20)


def test_the_svg_goes_where_it_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    assert "wrote out/a.svg" in told(capsys, "preview", "--svg", "out/a.svg", "mine.toml")
    assert (folder / "out" / "a.svg").is_file() and not (folder / "mine.schedules.svg").exists()
    (folder / "out" / "b.recipe.toml").write_text(RECIPE, encoding="utf-8")
    assert "wrote out/b.recipe.schedules.svg" in told(capsys, "preview", "out/b.recipe.toml")


def test_the_length_can_be_given_and_values_overridden(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "open.toml").write_text("[optimizer]\nlr = 0.5\n", encoding="utf-8")
    out = told(capsys, "preview", "open.toml", "--steps", "40", "--set", "schedule.lr=cosine(to=0.1)")
    assert "first 0.5 at update 1, peak 0.5 at update 1, last 0.05 at update 40" in out


def test_examples_are_counted_by_the_batch_as_it_grows() -> None:
    fixed = by_name(preview(small(**{"schedule.lr": "warmup(80 examples) >> hold()"})))
    assert fixed["lr"].values.index(1e-3) == 9  # 8 a step
    grown = small(**{"schedule.lr": "warmup(80 examples) >> hold()", "schedule.batch": "constant(value=0.5)"})
    assert by_name(preview(grown))["lr"].values.index(1e-3) == 19  # 4 a step


def test_pieces_that_listen_are_drawn_unheard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in ("plateau", "loss_plateau"):
        out = told(capsys, "preview", "mine.toml", "--set", f"schedule.lr=warmup(20) >> {shape}()")
        assert "last 0.004 at update 100" in out
        assert out.count("note: a piece that listens to the run is drawn as if nothing had been heard") == 1


def test_a_group_of_another_rule_has_its_own_options() -> None:
    groups = {"head.*": {"rule": "lion", "schedule": {"b2": "hold()"}}}
    assert by_name(preview(small(**{"optimizer.groups": groups})))["groups.head.*.b2"].values[0] == 0.99


BAD = {
    "nothing": (["preview"], "Write thalweg schedules preview RECIPE.toml, or --task TASK."),
    "no file": (["preview", "none.toml"], "none.toml"),
    "a folder": (["preview", "."], "There is no recipe file ."),
    "no name": (["preview", ""], "There is no recipe file"),
    "no toml": (["preview", "broken.toml"], "is not TOML"),
    "no length": (["preview", "open.toml"], "Give --task, or --steps."),
    "epochs for length": (["preview", "open.toml", "--set", "train.epochs=5"], "train.epochs=5"),
    "epochs": (["preview", "mine.toml", "--set", "schedule.lr=warmup(1 epoch) >> hold()"], "Give --task."),
    "tokens": (["preview", "mine.toml", "--set", "schedule.clip=hold(1k tokens)"], "Give --task."),
    "too long": (["preview", "mine.toml", "--steps", "15"], "is longer than the run"),
    "steps": (["preview", "mine.toml", "--steps", "0"], "train.steps=0"),
    "steps in words": (["preview", "mine.toml", "--steps", "many"], "whole number"),
    "endless": (["preview", "mine.toml", "--steps", "1" + 12 * "0"], "too long to be drawn"),
    "shape": (["preview", "mine.toml", "--set", "schedule.lr=cosin()"], "Did you mean cosine?"),
    "range": (["preview", "mine.toml", "--set", "schedule.clip=linear()"], "leaves the range"),
    "option": (["preview", "mine.toml", "--set", "schedule.options.b7=hold()"], "b7"),
    "rule": (["preview", "mine.toml", "--set", "optimizer.rule=adamm"], "adamm"),
    "batch": (["preview", "mine.toml", "--set", "schedule.batch=linear(to=2)"], "rises above the batch"),
    "group": (["preview", "group.toml"], "is not possible"),
    "svg": (["preview", "mine.toml", "--svg", "mine.toml"], "It must end in .svg"),
    "svg folder": (["preview", "mine.toml", "--svg", "no/a.svg"], "lie in a folder that is there"),
    "svg is a folder": (["preview", "mine.toml", "--svg", "taken.svg"], "cannot be written"),
    "task": (["preview", "--task", "digit"], "There is no task called 'digit'"),
    "set": (["preview", "mine.toml", "--set", "lr"], "PATH=VALUE"),
    "card": (["nope"], "There is no schedule shape called 'nope'"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_three_parts(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.toml").write_text("[train\n", encoding="utf-8")
    (folder / "open.toml").write_text("[optimizer]\nlr = 0.5\n", encoding="utf-8")
    group = '[train]\nsteps = 5\n[optimizer.groups."a"]\nschedule = { lr = 5 }\n'
    (folder / "group.toml").write_text(group, encoding="utf-8")
    (folder / "taken.svg").mkdir()
    assert main(["schedules", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and len(err.splitlines()) == 3
    assert words in err
    assert not [path for path in folder.glob("*.svg") if path.is_file()]
    assert (folder / "mine.toml").read_text(encoding="utf-8") == RECIPE


# --- with the task's data --------------------------------------------------------------------------------------------

TASK = """
import torch
from torch import nn
import torch.nn.functional as F
import thalweg

def loss(model, batch, label_smoothing=0.2):
    return F.cross_entropy(model(batch["x"]), batch["y"]) * (1 + 0 * label_smoothing)

data = {"x": torch.arange(160.0).reshape(40, 4) / 160, "y": torch.arange(40) % 3}
recipe = {"train.batch": 8, "train.epochs": 6.0, "optimizer.lr": 0.02, "schedule.lr": "warmup(2 epochs) >> hold()"}
task = thalweg.Task(model=lambda: nn.Linear(4, 3), loss=loss, data=data, recipe=recipe)
"""


def test_the_data_answers_epochs_and_the_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a_tiny_task.py").write_text(TASK, encoding="utf-8")
    out = told(capsys, "preview", "--task", "a_tiny_task:task")
    assert "first 0.002 at update 1, peak 0.02 at update 10, last 0.02 at update 30" in out  # 5 steps an epoch
    assert out.endswith("wrote a_tiny_task.schedules.svg\n") and (folder / "a_tiny_task.schedules.svg").is_file()
    recipe = '[schedule]\nloss = { label_smoothing = "hold(1 epochs) >> linear(to=0.5)" }\n'
    (folder / "more.toml").write_text(recipe, encoding="utf-8")
    out = told(capsys, "preview", "more.toml", "--task", "a_tiny_task:task", "--steps", "20")
    assert "first 0.002 at update 1, peak 0.02 at update 10, last 0.02 at update 20" in out
    assert "first 0.2 at update 1, peak 0.2 at update 1, last 0.1 at update 20" in out
    assert "factor on loss.label_smoothing=0.2" in out


def test_an_embedded_task_is_previewed_by_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "preview", "--task", "digits", "--steps", "50", "--set", "schedule.lr=warmup(10) >> linear()")
    peak = re.search(r"factor on optimizer\.lr=(\S+)", out)
    assert peak and f"peak {peak.group(1)} at update 10, last 0 at update 50" in out


def test_the_preview_is_what_the_run_does() -> None:
    recipe = small(
        **{
            "schedule.lr": "warmup(1 epochs) >> cosine(to=0.1)",
            "schedule.batch": "warmup(40%, start=0.25) >> hold()",
            "train.micro_batch": 2,
        }
    )
    task = small_task()
    curves = by_name(preview_of_task(task, recipe))
    result = thalweg.train_task(task, recipe)
    assert [record.lr for record in result.records] == pytest.approx(curves["lr"].values)
    assert [record.weight for record in result.records] == list(curves["batch"].values)
    assert len({*curves["batch"].values}) > 2


def test_sequences_are_counted_in_the_tokens_of_the_data() -> None:
    tokens = {"tokens": torch.arange(40 * 33).reshape(40, 33) % 11}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> thalweg.Loss:
        x = batch["tokens"]
        logits = model(x[:, :-1])
        total = F.cross_entropy(logits.reshape(-1, 11), x[:, 1:].reshape(-1), reduction="sum")
        return thalweg.Loss(total, x[:, 1:].numel())

    task = small_task(model=lambda: nn.Embedding(11, 11), loss=loss, data=tokens, unit="tokens")
    recipe = small(**{"schedule.sequence": "warmup(50%, start=0.25) >> hold()"})
    curve = by_name(preview_of_task(task, recipe))["sequence"]
    assert curve.about == "tokens of a sequence, of 33" and curve.counted == "step"
    assert curve.values[0] == 8 and curve.values[-1] >= 32 and all(value % 8 in (0, 1) for value in curve.values)
    alone = by_name(preview(recipe))["sequence"]
    assert alone.values[-1] == 1 and "(--task)" in alone.about


def test_a_group_is_shown_at_its_own_rate() -> None:
    groups = {"0.*": {"lr": 5e-2, "weight_decay": 0.3, "schedule": {"lr": "linear(to=0.1)", "weight_decay": "hold()"}}}
    curves = by_name(preview_of_task(small_task(), small(**{"optimizer.groups": groups})))
    assert curves["groups.0.*.lr"].values[0] == pytest.approx(5e-2)
    assert curves["groups.0.*.lr"].values[-1] == pytest.approx(5e-3)
    assert curves["groups.0.*.weight_decay"].values[0] == 0.3
    several = {"*": {"lr": 5e-2, "schedule": {"lr": "linear(to=0.1)"}}}
    several_curves = by_name(
        preview_of_task(small_task(), small(**{"optimizer.groups": several, "optimizer.layer_decay": 0.5}))
    )
    assert several_curves["groups.*.lr"].values[0] == 1
    assert re.search(r"which is 0\.0[12]\d* to 0\.05$", several_curves["groups.*.lr"].about)


def test_precision_is_not_measured_for_a_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(importlib.import_module("thalweg.engine.levers"), "race", refuse)
    assert preview_of_task(small_task(), small(precision="auto"))


def test_what_keeps_a_run_from_beginning_keeps_it_from_being_drawn() -> None:
    with pytest.raises(RecipeError) as err:
        preview_of_task(small_task(), small(**{"schedule.loss": {"temperature": "linear()"}}))
    assert "schedule.loss.temperature" in three_parts(err.value)[0]


# --- drawing ---------------------------------------------------------------------------------------------------------


def frame(text: str) -> list[str]:
    return [line.partition("|")[2] for line in text.splitlines() if "|" in line]


def test_a_spike_between_two_columns_is_seen() -> None:
    values = [0.0] * 5001
    values[2503] = 1.0
    rows = frame(in_terminal(Curve("spike", "", tuple(values)), 60))
    assert len(rows) == ROWS
    tops = [i for i, c in enumerate(rows[0]) if c != " "]
    assert len(tops) == 1 and 22 <= tops[0] <= 25  # the middle of 48 columns
    assert "peak 1 at update 2504" in in_terminal(Curve("spike", "", tuple(values)), 60)


def test_lines_rise_and_fall_as_the_values_do() -> None:
    rows = frame(in_terminal(Curve("up", "", (0.0, 1.0)), 40, braille=False))
    columns = [next(i for i, row in enumerate(rows) if row.ljust(28)[c] == "*") for c in range(28)]
    assert columns == sorted(columns, reverse=True) and columns[0] == ROWS - 1 and columns[-1] == 0
    assert columns[14] in (2, 3) and columns[26] == 0 < columns[22]
    drawn = in_terminal(Curve("b", "", (0.9, 0.8, 0.85)), 40)
    assert re.search(r"^ +0\.9 \|", drawn, flags=re.MULTILINE) and re.search(r"^ +0\.8 \|", drawn, flags=re.MULTILINE)
    assert "least 0.8 at update 2, last 0.85 at update 3" in drawn


@pytest.mark.parametrize("values", [(0.0,), (3.0,), (0.0, 0.0), (2.0,) * 500, tuple(map(float, range(30000)))])
def test_any_values_can_be_drawn(values: tuple[float, ...]) -> None:
    curve = Curve("v", "", values)
    for width in (1, 30, 400):
        for braille in (True, False):
            rows = frame(in_terminal(curve, width, braille=braille))
            assert len(rows) == ROWS and any(row.strip() for row in rows) and max(map(len, rows)) <= 110
    root = ElementTree.fromstring(as_svg([curve], "t"))
    (line,) = root.iter(f"{SVG}polyline")
    assert 1 <= len(str(line.get("points")).split()) <= 800
    assert table([curve]).splitlines()[-1].split() == [str(len(values)), f"{values[-1]:.6g}"]


def test_names_can_neither_be_markup_nor_steer_a_terminal() -> None:
    curve = Curve('groups.<b>&"\x1b[31m.lr', "hold()\x00", (1.0, 2.0), about="]]>", notes=("a\nb",))
    svg = as_svg([curve], "</title>")
    (line,) = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    assert line.get("data-name") == 'groups.<b>&"?[31m.lr'
    drawn = in_terminal(curve)
    assert "\x1b" not in drawn and "\x00" not in drawn and "note: a?b" in drawn
    assert "\x1b" not in table([curve])


def test_a_terminal_without_braille_gets_stars(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thalweg.cli.main", "schedules", "cosine"],
        cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "***" in done.stdout.decode("ascii")
