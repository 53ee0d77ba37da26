"""What the CPU is asked for: combinations are raced, kept in the plan, applied again, and leave no trace."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thalweg
from thalweg import Recipe
from thalweg.core import ModelError, RunFolderError, Split
from thalweg.device import Device, allocator, threads
from thalweg.device.race import race, simplest
from thalweg.engine import levers
from thalweg.engine.memory_format import convolutions, put
from thalweg.regularize import Dropout, SpatialDropout
from thalweg.regularize.keyed import Keyed

CPU = Device(torch.device("cpu"))
LEVERS = importlib.import_module("thalweg.engine.levers")
SHORT = {"train.steps": 4, "train.batch": 8, "schedule.lr": "constant()"}


class Net(nn.Module):
    """Convolutions, batch normalization, pooling, dropout, a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.drop, self.drop_channels = Dropout(0.2), SpatialDropout(0.2)
        self.pool, self.branch = nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.drop(F.relu(self.norm(self.stem(x)))))
        x = x + self.drop_channels(self.branch(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def images(num: int = 32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"x": torch.randn(num, 1, 8, 8, generator=draw), "y": torch.randint(0, 3, (num,), generator=draw)}


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]).float(), batch["y"])


def train(folder: Path | None = None, resume: bool = False, accept: tuple[str, ...] = (), **changes: Any) -> Any:
    torch.manual_seed(0)
    recipe = {**SHORT, "precision": "fp32", **{k.replace("__", "."): v for k, v in changes.items()}}
    return thalweg.train(Net, mean_loss, Split(train=images()), recipe, folder=folder, resume=resume, accept=accept)


def told(result: Any, path: str) -> Any:
    return next((made for made in result.plan.decisions if made.path == path), None)


# --- racing ----------------------------------------------------------------------------------------------------------


def test_a_race_gives_up_the_slow_early_and_does_not_count_warm_ups() -> None:
    runs = {
        "a": itertools.chain([9.0], itertools.repeat(1.0)),
        "b": itertools.repeat(1.3),
        "c": itertools.repeat(199.0),
    }
    counts = dict.fromkeys(runs, 0)

    def run(way: str) -> float:
        counts[way] += 1
        return next(runs[way])

    found = race(list(runs), run, 10.0)
    assert found == {"a": 1.0, "b": 1.3, "c": 199.0}
    assert counts["c"] == 1 and counts["b"] == 3 and counts["a"] == 3


def test_a_race_ends_with_its_budget_and_a_disturbed_run_counts_little() -> None:
    times = iter([1.0, 1.0, 1.0, 50.0, 1.0, 1.0] * 9)
    assert race(["a"], lambda way: next(times), 10.0) == {"a": 1.0}
    counts = {"a": 0, "b": 0}

    def run(way: str) -> float:
        counts[way] += 1
        return 1.0

    race(["a", "b"], run, 0.0)
    assert counts == {"a": 2, "b": 2}


def test_the_simplest_way_is_taken_unless_another_is_worth_it() -> None:
    found = {"plain": 1.0, "one": 0.95, "two": 0.92}
    changes = {"plain": 0, "one": 1, "two": 2}.__getitem__
    assert simplest(found, changes, 1.1) == "plain"
    assert simplest({**found, "two": 0.8}, changes, 1.1) == "two"
    assert simplest({**found, "two": 0.87}, changes, 1.1) == "one"


# --- what is chosen --------------------------------------------------------------------------------------------------


def fastest(monkeypatch: pytest.MonkeyPatch, **wanted: Any) -> None:
    """As if the way with these parts had been measured to be the fastest, and a pass were worth it."""

    def raced(ways: Any, run: Any, budget_s: float) -> dict[Any, float]:
        for way in ways:
            run(way)
        return {way: 1.0 + sum(getattr(way, k) != v for k, v in wanted.items()) for way in ways}

    monkeypatch.setattr(LEVERS, "race", raced)
    monkeypatch.setattr(LEVERS, "_WORTH_FLOPS", 0)


def test_the_combination_decides_and_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest(monkeypatch, precision="bf16", memory_format="channels_last")
    result = train(precision="auto")
    recipe = result.plan.recipe
    assert (recipe.precision, recipe.memory_format, recipe.threads) == ("bf16", "channels_last", None)
    words = "ms a pass of 8 samples: bf16 channels last on 1 thread 1e+03, fp32 channels last on 1 thread 2e+03"
    assert words in told(result, "precision").reason
    assert told(result, "memory_format").value == "channels_last" and told(result, "threads") is None
    assert all(layer.weight.stride()[1] == 1 for layer in convolutions(result.model))


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.flatten(1))
        if y.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return y


def test_a_model_that_does_not_run_in_half_precision_runs_in_float32() -> None:
    result = thalweg.train(Picky(), mean_loss, Split(train=images()), {**SHORT, "precision": "auto"})
    assert (
        result.plan.recipe.precision == "fp32" and "bf16 on 1 thread does not run" in told(result, "precision").reason
    )


def test_small_convolutions_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LEVERS, "race", lambda *_: pytest.fail("measured"))
    result = train()
    assert result.plan.recipe.memory_format == "contiguous" and "too small" in told(result, "memory_format").reason


def test_what_flows_through_the_model_lies_channels_last() -> None:
    model, seen = Net(), {}
    put(convolutions(model), "channels_last")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, Keyed)):
            module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.stride()}))
    mean_loss(model, images(8)).backward()
    assert len(seen) == 6
    for name, strides in seen.items():
        assert strides[1] == 1 and strides[3] == 4, (name, strides)
    assert model.stem.weight.grad is not None and model.stem.weight.grad.shape == (4, 1, 3, 3)


def test_how_kernels_lie_changes_no_name_and_no_value(tmp_path: Path) -> None:
    plain, last = (train(memory_format=how) for how in ("contiguous", "channels_last"))
    assert plain.model.stem.weight.is_contiguous() and last.model.branch.weight.stride()[1] == 1
    for (name, a), (other, b) in zip(plain.model.state_dict().items(), last.model.state_dict().items()):
        assert name == other and torch.allclose(a, b, atol=1e-5)
    assert told(last, "memory_format") is None  # it was given


def test_a_resumed_run_lies_as_its_plan_says_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(monkeypatch, memory_format="channels_last")
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", checkpoint__every=2)
    monkeypatch.setattr(LEVERS, "race", lambda *_: pytest.fail("measured"))
    again = thalweg.train(
        Net,
        mean_loss,
        Split(train=images()),
        {**SHORT, "precision": "fp32", "checkpoint.every": 2},
        folder=tmp_path / "run",
        resume=2,
    )
    assert again.plan.recipe.memory_format == "channels_last"
    assert again.model.branch.weight.stride()[1] == 1
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)


def test_a_model_that_lies_channels_last_is_left_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LEVERS, "race", lambda *_: pytest.fail("measured"))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3)).to(memory_format=torch.channels_last)
    data = {"x": torch.randn(16, 2, 6, 6), "y": torch.zeros(16, dtype=torch.int64)}
    result = thalweg.train(model, mean_loss, data, {**SHORT, "precision": "fp32"})
    assert told(result, "memory_format").reason == "the model's kernels lie so already"
    assert result.plan.recipe.memory_format == "channels_last" and model[0].weight.stride()[1] == 1


def test_a_format_without_convolutions_is_told() -> None:
    data = {"x": torch.randn(16, 4), "y": torch.zeros(16, dtype=torch.int64)}
    result = thalweg.train(lambda: nn.Linear(4, 3), mean_loss, data, {**SHORT, "memory_format": "channels_last"})
    assert told(result, "memory_format").reason.startswith("not used: the model has no two-dimensional")


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had said how many threads there are, on two cores; torch goes on with one."""
    now = [2]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda num: now.__setitem__(0, num))


def test_threads_are_measured_where_nobody_says_them(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(monkeypatch, threads=1)
    result = train(tmp_path / "run", checkpoint__every=2)
    assert result.plan.recipe.threads == 1 == result.plan.machine["threads"]
    assert told(result, "threads").reason == "measured together with memory_format"
    assert "fp32 on 1 thread 1e+03, fp32 channels last on 1 thread 1e+03, " in told(result, "memory_format").reason
    assert torch.get_num_threads() == 2  # given back
    seen = []
    again = thalweg.train(
        lambda: (seen.append(torch.get_num_threads()), Net())[1],
        mean_loss,
        Split(train=images()),
        {**SHORT, "precision": "fp32", "checkpoint.every": 2},
        folder=tmp_path / "run",
        resume=2,
    )
    assert seen == [1] and again.plan.recipe.threads == 1 and torch.get_num_threads() == 2
    with pytest.raises(RunFolderError, match="threads: None there, 2 here"):
        train(tmp_path / "run", resume=True, checkpoint__every=2, threads=2)


def test_threads_that_are_given_are_left_alone(two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.given() == "" and threads.numbers() == [2, 1]
    assert train(threads=1).plan.machine["threads"] == 1
    torch.set_num_threads(5)
    assert threads.given() == "torch.set_num_threads"
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.given() == "OMP_NUM_THREADS=2"
    result = train()
    assert result.plan.recipe.threads is None and result.plan.machine["threads"] == 2


def test_the_step_of_ones_own_loop_gives_threads_back(two_cores: None) -> None:
    def made(model: nn.Module) -> Any:
        recipe = {**SHORT, "threads": 1, "precision": "fp32", "device": "cpu", "memory_format": "contiguous"}
        return thalweg.TrainStep(model, mean_loss, recipe, steps=3)

    for said in (None, 7):  # what somebody has said since is left alone
        torch.set_num_threads(2)
        step = made(Net())
        step(images())
        assert torch.get_num_threads() == 1
        if said:
            torch.set_num_threads(said)
        step.finish()
        assert torch.get_num_threads() == (said or 2)
    torch.set_num_threads(2)
    with pytest.raises(ModelError, match="float16"):  # refused by the last of all checks
        made(Net().half())
    assert torch.get_num_threads() == 2


def test_another_number_of_threads_is_told_on_resuming(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    train(tmp_path / "run", checkpoint__every=2)
    torch.set_num_threads(1)
    again = train(tmp_path / "run", resume=True, checkpoint__every=2)
    lines = (again.folder / "records.jsonl").read_text()
    assert "The run began on 2 threads, and goes on with 1" in lines


def test_more_threads_than_processors_are_told(two_cores: None) -> None:
    plan = train(threads=9).plan
    ((name, text),) = levers.told_threads(plan, plan, CPU)
    assert name == "threads" and "9 threads, as it began, on 2 processors" in text
    assert levers.told_threads(plan, plan, Device(torch.device("meta"))) == []


# --- the C library ---------------------------------------------------------------------------------------------------


def test_thresholds_that_cannot_be_raised_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(allocator.VARIABLE, "keep")
    assert allocator.against() == "THALWEG_MALLOC=keep" and not allocator.raise_thresholds()
    monkeypatch.delenv(allocator.VARIABLE)
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert allocator.against() == "jemalloc takes the C library's place"
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.against() == "the C library is not glibc"
    assert not allocator.is_raised()


@pytest.mark.skipif(bool(allocator.against()), reason="needs glibc")
def test_freed_memory_stays_while_a_run_lasts_and_not_beyond() -> None:
    """In a process of its own: thresholds are the process's."""
    code = """
import torch
from thalweg.device import allocator
from thalweg.engine.levers import kept
def fresh():
    before = allocator.fresh_bytes()
    for _ in range(4):
        torch.ones(48 << 18)
        torch.ones(48 << 18)
    return allocator.fresh_bytes() - before
fresh()
own = fresh()
with kept():
    assert allocator.raise_thresholds() and allocator.is_raised()
    fresh()
    stays = fresh()
assert not allocator.is_raised()
print(own >> 20, stays >> 20, fresh() >> 20)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own, stays, after = map(int, ran.stdout.split())
    assert own > 300 and stays < 5 and after > 60  # free memory was given back when the run was over


def test_a_pass_that_takes_fresh_pages_is_told_and_a_resumed_run_does_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked before and after each pass: the first of all, the one that is timed, with what the C library does, and without.
    pages = itertools.accumulate(itertools.chain([0, 20 << 20, 0, 9 << 20, 0, 8 << 20], itertools.repeat(0)))
    raised: list[bool] = []
    monkeypatch.setattr(allocator, "fresh_bytes", lambda: next(pages))
    monkeypatch.setattr(allocator, "against", lambda: "")
    monkeypatch.setattr(allocator, "raise_thresholds", lambda: raised.append(True) or True)
    result = train(tmp_path / "run", checkpoint__every=2)
    made = told(result, "allocator")
    assert made.value == "keeps what is freed" and "a pass took 8.00 MiB of fresh pages" in made.reason
    assert "takes 0 B" in made.reason and "THALWEG_MALLOC=keep" in made.reason and raised == [True]
    train(tmp_path / "run", resume=True, checkpoint__every=2)
    assert raised == [True, True]


def test_where_bytes_are_counted_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "raise_thresholds", lambda: pytest.fail("raised"))
    monkeypatch.setattr(LEVERS, "_MANY_BYTES", -1)
    monkeypatch.setattr(LEVERS, "_WORTH_BYTES", -1)
    assert told(train(memory_budget="4GiB"), "allocator") is None
    assert told(train(train__micro_batch="auto"), "allocator") is None


def test_mallopt_is_there_where_we_say_so() -> None:
    assert bool(allocator.against()) or hasattr(ctypes.CDLL(None), "mallopt")


def test_a_loop_of_ones_own_keeps_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LEVERS, "_MANY_BYTES", -1)
    monkeypatch.setattr(LEVERS, "_WORTH_BYTES", -1)
    monkeypatch.setattr(allocator, "raise_thresholds", lambda: pytest.fail("raised"))
    fastest(monkeypatch, memory_format="channels_last")
    step = thalweg.TrainStep(Net(), mean_loss, Recipe().override({**SHORT, "precision": "fp32"}))
    step(images(8))
    assert step.recipe.memory_format == "channels_last" and step.recipe.threads is None
    assert step.model.branch.weight.stride()[1] == 1
