"""Whether compiling is repaid on a CPU: by an estimate that runs nothing, else measured once and kept."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import thalweg
from tests.models import mean_loss, mlp, points
from thalweg.core import Recipe, RecipeError, Split, Task
from thalweg.device import choose
from thalweg.engine import compiled_cache, compiled_worth, resolve
from thalweg.engine.compiled_backend import BACKEND
from thalweg.engine.compiled_cache import INDUCTOR
from thalweg.engine.compiled_choice import settle_compile
from thalweg.engine.compiled_measure import Tried
from thalweg.engine.compiled_worth import estimate, measured
from thalweg.watch import Memory


class Measuring:
    """In place of what times steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, eager: float, graph: Any) -> None:
        self.asked: list[str] = []
        self.eager, self.graph = eager, graph
        monkeypatch.setattr(compiled_worth, "eager_step", self._eager)
        monkeypatch.setattr(compiled_worth, "tried", self._tried)

    def _eager(self, bench: Any, recipe: Any, steps: int) -> float:
        self.asked.append("eager")
        return self.eager

    def _tried(self, bench: Any, recipe: Any) -> Tried:
        self.asked.append(recipe.compile)
        if isinstance(self.graph, Exception):
            raise self.graph
        return self.graph


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_CACHE", str(tmp_path))


def chosen(steps: int, **changes: Any) -> tuple[str, str]:
    """(what ``compile`` becomes in a run of so many steps, the last reason)."""
    task = Task(model=mlp(), loss=mean_loss, data=Split(train=points()))
    plan = resolve(
        task, Recipe().override({"device": "cpu", "precision": "fp32", "train.steps": steps, **changes})
    ).plan
    told = [d for d in plan.decisions if d.path == "compile"]
    return plan.recipe.compile, told[-1].reason


def test_a_short_run_is_told_by_an_estimate_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch, 1.0, Tried(1.0, 0.1, 0.0))
    assert chosen(300)[0] == "off" and "would be saved, by an estimate for" in chosen(300)[1] and not measuring.asked
    begun = time.thread_time()
    for _ in range(100):
        measured(
            Recipe(), ["step"], lambda *told: told[1], rows=(), steps=300, bench=lambda: 1 / 0, alone=True, model=mlp()
        )  # type: ignore
    assert time.thread_time() - begun < 0.05  # half a millisecond each, at the very most


def test_a_long_run_is_measured_and_the_next_one_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch, 0.002, Tried(10.0, 0.001, 0.0))
    how, why = chosen(1_000_000)
    assert how == "step" and measuring.asked == ["eager", "step"] and "the shortest run of 1000000 steps" in why
    how, why = chosen(900_000)
    assert how == "step" and measuring.asked == ["eager", "step"] and "earlier run" in why
    chosen(1_000_000, **{"train.batch": 16})
    assert measuring.asked == ["eager", "step"] * 2  # of another shape nothing is known


def test_an_eager_step_that_is_short_enough_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch, 1e-6, Tried(10.0, 1e-7, 0.0))
    how, why = chosen(1_000_000)
    assert how == "off" and measuring.asked == ["eager"] and "end before a graph is repaid" in why


def test_a_graph_that_is_slower_or_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch, 0.002, RuntimeError("no graph\nof this"))
    for _ in range(2):
        how, why = chosen(1_000_000)
        assert how == "off" and "'step' failed when it was tried: RuntimeError: no graph" in why
    assert measuring.asked == ["eager", "step"]
    measuring.graph = Tried(10.0, 0.003, 0.0)
    assert chosen(1_000_000, **{"train.batch": 16})[0] == "off"


def other_loss(model: Any, batch: Any) -> Any:
    return 2 * mean_loss(model, batch)


def test_what_failed_is_tried_again_where_something_was_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another compiler, a day later, another loss; and not at once."""
    measuring = Measuring(monkeypatch, 0.002, RuntimeError("no compiler"))
    tries = lambda: (chosen(50_000), measuring.asked.count("step"))[1]
    assert [tries(), tries()] == [1, 1]
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert [tries(), tries()] == [2, 2]
    os.utime(compiler, (1, 1))  # another in its place
    assert [tries(), tries()] == [3, 3]
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86_500)
    assert [tries(), tries()] == [4, 4]
    assert compiled_cache.surroundings([mean_loss]) != compiled_cache.surroundings([Measuring, 3, int])
    task = Task(model=mlp(), loss=other_loss, data=Split(train=points()))
    resolve(task, Recipe().override({"device": "cpu", "precision": "fp32", "train.steps": 50_000}))
    assert measuring.asked.count("step") == 5


@pytest.mark.parametrize(
    "text", ["{}", '{"off": "0.1", "step": 1, "first": 1}', '{"off": -1.0, "step": NaN, "first": 1}', "[" * 99999]
)
def test_figures_that_are_none_are_measured_anew(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch, 0.002, Tried(10.0, 0.001, 0.0))
    chosen(1_000_000)
    (kept,) = compiled_cache.folder().glob("*.json")
    kept.write_text(text, encoding="utf-8")
    assert chosen(1_000_000)[0] == "step" and measuring.asked == ["eager", "step"] * 2


def test_other_code_is_measured_anew() -> None:
    assert compiled_worth._code(lambda x: x + 1) != compiled_worth._code(lambda x: abs(x))
    assert compiled_worth._code(mean_loss) == compiled_worth._code(mean_loss) != ""


def test_the_estimate_is_of_tensors_and_steps() -> None:
    rows: Any = [None] * 10
    saved, cost = estimate(rows, 1000)
    assert saved == pytest.approx(0.8) and cost == pytest.approx(7.0)


def test_switches_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Recipe.from_toml("compile = true").compile == "best" and Recipe.from_toml("compile = false").compile == "off"
    assert Recipe().override({"compile": True}).compile == Recipe().override({"compile": "True"}).compile == "best"
    told: list[Any] = []
    take = lambda path, value, why: told.append((value, why)) or value
    sharp = Recipe(compile="best").override({"regularize.sharpness": 0.1, "compile": "true"})
    device = choose("cpu")[0]
    assert settle_compile(sharp, (), device, take).compile == "model"
    assert told[0][0] == "not 'step'" and "sharpness" in told[0][1]
    assert settle_compile(Recipe(compile="best"), (), device, take, None, "it is in parts").compile == "off"


class Branching(nn.Module):
    """It branches on a value, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if out.sum() > 0 else -out


def test_who_has_no_graph_is_warned_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A model that cannot be traced, by ``true`` and by ``auto``, with a sink and without, and in one's own loop."""
    monkeypatch.setenv(BACKEND, "eager")
    monkeypatch.setattr(compiled_worth, "eager_step", lambda *given: 1.0)
    monkeypatch.setattr(compiled_worth, "COMPILE_S", 0.0)
    monkeypatch.setattr(compiled_worth, "EACH_S", 0.0)
    why = "The step cannot be compiled as one graph. Data-dependent branching. The last place: File "
    recipe = {"device": "cpu", "precision": "fp32", "train.steps": 3}
    for asked, by in ((True, "with compile='model'"), ("auto", "by plain operators")):
        line = f"compile='step' is not possible here, and the run goes on {by}: {why}"
        heard: list[tuple[str, str]] = []
        ear = Memory()
        ear.event = lambda event, heard=heard: heard.append((event.name, event.text))  # type: ignore[assignment,misc]
        given = {**recipe, "compile": asked}
        assert len(thalweg.train(Branching(), mean_loss, points(), given, sinks=[ear]).records) == 3
        (text,) = [text for name, text in heard if name == "compiled" and "not possible" in text]
        assert text.startswith(line) and "test_compiled_worth.py" in text and "\n" not in text and not recwarn
        with pytest.warns(UserWarning, match="compile='step' is not possible here"):
            thalweg.train(Branching(), mean_loss, points(), given)
        recwarn.clear()
    step = thalweg.TrainStep(Branching(), mean_loss, {"precision": "fp32", "device": "cpu", "compile": True}, steps=2)
    with pytest.warns(UserWarning, match="goes on with compile='model'"):
        assert float(step({name: t[:4] for name, t in points().items()}).loss) > 0


def test_what_is_asked_for_is_tried_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.engine import compiled_measure

    def tried(bench: Any, recipe: Any) -> Tried:
        if recipe.compile == "step":
            raise RuntimeError("a branch")
        return Tried(1.0, 1.0, 0.0)

    monkeypatch.setattr(compiled_measure, "tried", tried)
    task = Task(model=mlp(), loss=mean_loss, data=Split(train=points()))
    plan = resolve(task, Recipe().override({"device": "cpu", "precision": "fp32", "compile": True})).plan
    told = [d for d in plan.decisions if d.path == "compile"]
    assert plan.recipe.compile == "model" and told[0].value == "not 'step'" and "a branch" in told[0].reason


@pytest.mark.parametrize("bad", [0, 65, "many"])
def test_a_number_of_steps_that_no_call_can_take(bad: Any) -> None:
    with pytest.raises(RecipeError, match=f"steps_per_call={bad!r} is no number of steps"):
        Recipe(steps_per_call=bad)


def test_graphs_are_kept_in_the_users_folder_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    ours = str(compiled_cache.folder() / "inductor")
    monkeypatch.setattr(compiled_cache, "_GIVEN", None)
    monkeypatch.setattr(compiled_cache, "_OURS", [])
    monkeypatch.setenv(INDUCTOR, default_cache_dir())  # as torch sets it
    compiled_cache.use_cache()
    assert os.environ[INDUCTOR] == ours and str(tmp_path) in ours
    monkeypatch.setenv("THALWEG_CACHE", str(tmp_path / "moved"))
    compiled_cache.use_cache()
    assert os.environ[INDUCTOR] == str(tmp_path / "moved" / "compiled" / "inductor")
    monkeypatch.setenv(INDUCTOR, "elsewhere")  # by the user, after all was imported
    compiled_cache.use_cache()
    assert os.environ[INDUCTOR] == "elsewhere"
    monkeypatch.setattr(compiled_cache, "_GIVEN", default_cache_dir())  # by the user, who wants torch's own
    monkeypatch.setenv(INDUCTOR, default_cache_dir())
    compiled_cache.use_cache()
    assert os.environ[INDUCTOR] == default_cache_dir()
