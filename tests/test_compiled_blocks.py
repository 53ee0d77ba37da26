"""A model compiled block by block: one graph for all blocks of a kind, the same run, and the model given back as it was.

Graphs run operator by operator: what is counted is how often one is made, and what is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thalweg
from tests.conftest import three_parts
from tests.models import make_step, mean_loss, mlp, points, ragged_text, run_steps, state_bits, text_loss
from thalweg.core import ModelError, Recipe, RecipeError, Split, Task
from thalweg.device import choose
from thalweg.engine import compiled_worth, resolve
from thalweg.engine.blocks import most_of_a_kind, repeated_blocks
from thalweg.engine.compiled_backend import BACKEND, Compiler
from thalweg.engine.compiled_choice import settle_compile, why_not
from thalweg.engine.compiled_measure import Tried
from thalweg.engine.compiled_model import CompiledModel
from thalweg.engine.compiled_worth import estimate_blocks, measured
from thalweg.engine.recompute import recompute
from thalweg.regularize import Dropout


@pytest.fixture(autouse=True)
def operator_by_operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(BACKEND, "aot_eager")
    monkeypatch.setenv("THALWEG_CACHE", str(tmp_path))


class Block(nn.Module):
    """A residual block of ``width``."""

    def __init__(self, width: int, dropout: float = 0.0, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.layer, self.drop = norm(width), nn.Linear(width, width), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drop(F.gelu(self.layer(self.norm(x))))
        return y


class Net(nn.Module):
    """Blocks of 8, then of 4; ``calls`` of each in a pass."""

    def __init__(self, wide: int = 3, narrow: int = 0, dropout: float = 0.0, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls
        self.first, self.between, self.last = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)
        self.wide = nn.ModuleList(Block(8, dropout) for _ in range(wide))
        self.narrow = nn.ModuleList(Block(4, dropout) for _ in range(narrow))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.wide:
            for _ in range(self.calls):
                x = block(x)
        x = self.between(x)
        for block in self.narrow:
            x = block(x)
        y: Tensor = self.last(x)
        return y


def counted() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *(Block(8, norm=nn.BatchNorm1d) for _ in range(2)), nn.Linear(8, 3))


def built(make: Callable[[], nn.Module], how: str, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    data = {name: x.double() if x.is_floating_point() else x for name, x in points().items()}
    given = {"device": "cpu", "train.batch": 32, "compile": how, **changes}
    return make_step(make().double(), mean_loss, data, **given)


@pytest.mark.parametrize(
    ("make", "changes", "graphs"),
    [
        (lambda: Net(4, dropout=0.3), {"train.micro_batch": 8, "regularize.by_sample": True}, 1),
        (lambda: Net(3, 2), {}, 2),
        # a last window of 24 samples: once more, for sizes that change, and never again
        (lambda: Net(4), {"train.batch": 40}, 2),
    ],
    ids=["masks and micro-batches", "two kinds", "a short last batch"],
)
def test_blocks_of_a_kind_share_one_graph_and_the_run_is_the_same(
    make: Callable[[], nn.Module], changes: dict[str, Any], graphs: int
) -> None:
    plain, feed = built(make, "off", **changes)
    rows = run_steps(plain, feed, 6)
    step, feed = built(make, "blocks", **changes)
    theirs = run_steps(step, feed, 6)
    wanted, found = state_bits(plain), state_bits(step)
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(rows), rtol=1e-12, atol=1e-12)
    assert step.recomputation.compiler.made == graphs


def test_many_runs_in_one_process_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch leaves a function uncompiled that has had eight graphs; and none knows of sizes in another's run."""
    monkeypatch.setenv(BACKEND, "eager")
    for how, width in (("model", 2), ("model", 3), ("blocks", 4), ("blocks", 5)):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width)) for _ in range(2)))
        compiled = CompiledModel(model, Compiler("eager"), recompute(model, "none"), blocks=how == "blocks")
        with torch._dynamo.config.patch(recompile_limit=1):
            model(torch.ones(2, width, requires_grad=True))
        assert compiled.compiler.made == 1, (how, width)


def test_the_model_is_given_back_and_what_its_user_compiled_stays() -> None:
    model = Net(4)
    model.wide[1].compile(backend="eager")
    theirs = model.wide[1]._compiled_call_impl
    names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    compiled = CompiledModel(model, Compiler("eager"), recompute(model, "none"), blocks=True)
    assert list(compiled.mine) == ["wide.0", "wide.2", "wide.3"]
    assert all(block._compiled_call_impl is not None for block in model.wide)
    assert model._compiled_call_impl is None and model.last._compiled_call_impl is None
    assert names == (list(model.state_dict()), [name for name, _ in model.named_modules()])
    assert copy.deepcopy(model).wide[0]._compiled_call_impl is None
    compiled.release()
    assert [block._compiled_call_impl for block in model.wide] == [None, theirs, None, None]
    model.compile(backend="eager")
    assert not CompiledModel(model, Compiler("eager"), recompute(model, "none"), blocks=True).mine
    inside = torch.compile(Net(3), backend="eager")
    assert not CompiledModel(inside, Compiler("eager"), recompute(inside, "none"), blocks=True).mine  # type: ignore[arg-type]


def test_a_run_by_blocks_ends_with_the_users_model() -> None:
    model = Net(3)
    recipe = {"device": "cpu", "precision": "fp32", "train.batch": 32, "train.steps": 2, "compile": "blocks"}
    result = thalweg.train(model, mean_loss, points(), recipe)
    assert result.plan.recipe.compile == "blocks"
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize("how", ["model", "blocks"])
def test_a_second_call_in_a_pass_would_draw_the_first_ones_masks(how: str) -> None:
    whole = lambda model, batch: mean_loss(model, batch) + (mean_loss(model, batch) if how == "model" else 0.0)
    torch.manual_seed(0)
    model = Net(3, dropout=0.3, calls=1 if how == "model" else 2)
    step, feed = make_step(model, whole, points(), device="cpu", compile=how)
    with pytest.raises(ModelError) as found:
        run_steps(step, feed, 1)
    asked, numbers, remedy = three_parts(found.value)
    assert "called more than once in a forward pass" in asked and ("wide.0" in asked) == (how == "blocks")
    assert "such as 'wide.0.drop'" in numbers and "compile='step' or 'off'" in remedy


@pytest.mark.parametrize(
    ("make", "changes", "numbers"),
    [
        (mlp, {}, "no repeated blocks"),
        (Net, {"recompute": "blocks"}, "recompute='blocks' runs blocks again"),
        (counted, {}, "'1' holds batch normalization"),
    ],
)
def test_what_cannot_be_compiled_by_blocks_is_refused(
    make: Callable[[], nn.Module], changes: dict[str, Any], numbers: str
) -> None:
    with pytest.raises(RecipeError) as found:
        built(make, "blocks", **changes)
    parts = three_parts(found.value)
    assert parts[0] == "compile='blocks' is not possible in this run." and numbers in parts[1]
    assert "compile='model' or 'off'" in parts[2]


class Chip:
    """A device as a recipe's ``compile`` sees it."""

    kind, graph_kind, captures_graphs, compile_backend = "chip", "eager", False, "made up"


@pytest.mark.parametrize(
    ("model", "why"),
    [(Net(3), ""), (Net(2, 2), "fewer than 3 of its blocks are of one kind"), (mlp(), "no repeated blocks")],
)
def test_a_gpu_tries_them_where_they_save_compiling(model: nn.Module, why: str) -> None:
    asked: list[list[str]] = []
    told: list[Any] = []
    take = lambda path, value, why: told.append((value, why)) or value
    measure = lambda recipe, able, take: asked.append(list(able)) or "off"
    chip: Any = Chip()
    settle_compile(Recipe(), (), chip, take, measure, "", model)
    settle_compile(Recipe(compile="best"), (), chip, take, measure, "", model)
    blocks = [] if why else ["blocks"]
    assert asked[0] == ["off", "model", *blocks, "step"]
    assert asked[1] == ["step", "model", *(["blocks"] if repeated_blocks(model) else [])]
    assert [value for value, text in told if value == "not 'blocks'" and why in text] == (
        ["not 'blocks'"] if why else []
    )
    assert why_not(Recipe(), (), chip, "blocks", "in parts", model) == "in parts"


def on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, steps: int, tries: dict[str, Any], **changes: Any
) -> tuple[str, list[Any]]:
    """(what ``compile`` becomes for four blocks, its decisions), where trying gives ``tries``."""

    def tried(bench: Any, recipe: Any) -> Tried:
        found = tries[recipe.compile]
        tries.setdefault("asked", []).append(recipe.compile)
        if isinstance(found, Exception):
            raise found
        one: Tried = found
        return one

    monkeypatch.setattr(compiled_worth, "eager_step", lambda *given: 0.01)
    monkeypatch.setattr(compiled_worth, "tried", tried)
    task = Task(model=Net(4), loss=mean_loss, data=Split(train=points()))
    given = {"device": "cpu", "precision": "fp32", "train.steps": steps, "train.batch": 32, **changes}
    plan = resolve(task, Recipe().override(given)).plan
    return plan.recipe.compile, [(d.value, d.reason) for d in plan.decisions if d.path == "compile"]


def test_a_cpu_tries_them_where_the_whole_step_fails_and_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: dict[str, Any] = {"step": RuntimeError("a branch"), "blocks": Tried(5.0, 0.005, 0.0)}
    for _ in range(2):
        how, told = on_a_cpu(monkeypatch, 50_000, tries)
        assert (
            how == "blocks"
            and told[-2][0] == "not 'step'"
            and "failed when it was tried: RuntimeError: a branch" in told[-2][1]
        )
        assert "blocks 5 ms a step" in told[-1][1]
    assert tries["asked"] == ["step", "blocks"] and "earlier run" in told[-1][1]
    tries = {"step": RuntimeError("a branch"), "blocks": RuntimeError("another")}
    how, told = on_a_cpu(monkeypatch, 50_000, tries, **{"train.batch": 16})
    assert how == "off" and [value for value, _ in told[-3:]] == ["not 'step'", "not 'blocks'", "off"]


def test_a_cpu_tries_them_where_no_step_is_possible_and_not_where_one_is_or_nothing_repays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sharp = {"regularize.sharpness": 0.05}
    tries: dict[str, Any] = {"blocks": Tried(5.0, 0.02, 0.0)}
    how, told = on_a_cpu(monkeypatch, 50_000, tries, **sharp)
    assert how == "off" and tries["asked"] == ["blocks"] and "the shortest run" in told[-1][1]
    how, told = on_a_cpu(monkeypatch, 300, tries, **sharp)
    assert how == "off" and tries["asked"] == ["blocks"] and "by an estimate for the tensors in blocks" in told[-1][1]
    tries = {"step": Tried(5.0, 0.02, 0.0)}
    assert on_a_cpu(monkeypatch, 50_000, tries)[0] == "off" and tries["asked"] == ["step"]
    take = lambda path, value, why: f"{value}: {why}"
    given: Any = {"rows": (), "steps": 9, "bench": lambda: 1 / 0, "alone": False, "model": Net(4)}
    assert "'blocks' can be asked for" in measured(Recipe(), ["blocks"], take, **given)


def test_the_estimate_counts_what_is_saved_in_all_blocks_and_compiled_in_one_of_each_kind() -> None:
    assert most_of_a_kind(Net(4, 2)) == 4 and most_of_a_kind(mlp()) == 0
    saved, cost = estimate_blocks(Net(4, 2), 1000)  # a block has four tensors
    assert saved == pytest.approx(24 * 0.04) and cost == pytest.approx(5 + 2 * 4 * 0.2)


def test_a_tied_gpt_with_text_of_many_lengths_trains_by_blocks() -> None:
    from thalweg.recipes.models.gpt import GPT

    states = {}
    for how in ("off", "blocks"):
        torch.manual_seed(0)
        model = GPT(vocab=17, context=12, width=16, heads=2, layers=3, dropout=0.1).double()
        model.head.weight = model.tokens.weight
        step, feed = make_step(model, text_loss, ragged_text(), **{"device": "cpu", "train.batch": 16, "compile": how})
        run_steps(step, feed, 3)
        states[how] = state_bits(step)
    for name in states["off"]:
        torch.testing.assert_close(states["blocks"][name], states["off"][name], rtol=1e-12, atol=1e-12, msg=name)
    assert step.recomputation.compiler.made == 1 and choose("cpu")[0].graph_kind == "cpu"
