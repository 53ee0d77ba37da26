"""What only a CUDA device can show; skips itself without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import thalweg
from tests.models import batchnorm_net, make_step, mean_loss, points, run_steps, state_bits
from thalweg.core import Recipe, Split, Task
from thalweg.data import to_device
from thalweg.engine import resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CHANGES = {
    "device": "cuda",
    "train.batch": 16,
    "train.micro_batch": 8,
    "optimizer.weight_decay": 0.1,
    "regularize.average": 0.9,
    "schedule.lr": "warmup(2) >> cosine()",
}


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(precision: str, no_synchronisation: None) -> None:
    changes = {**CHANGES, "precision": precision, "compile": "off"}
    step, feed = make_step(batchnorm_net(0.1), mean_loss, points(), **changes)
    windows = list(feed.windows(0, 6))
    for window in windows[:2]:
        step.run(window)
    torch.cuda.set_sync_debug_mode("error")
    for window in windows[2:]:
        step.run(window)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_runs_are_the_same_run(precision: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        step, feed = make_step(batchnorm_net(0.3), mean_loss, points(), **CHANGES, precision=precision)
        run_steps(step, feed, 8)
        states.append(state_bits(step))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("compiled", ["model", "step", "captured"])
def test_what_is_compiled_is_the_step(compiled: str) -> None:
    rows = {}
    for how in ("off", compiled):
        torch.manual_seed(0)
        changes = {**CHANGES, "device": "cuda", "precision": "fp32", "train.micro_batch": 16, "compile": how}
        step, feed = make_step(batchnorm_net(0.3), mean_loss, points(), **changes)
        rows[how] = run_steps(step, feed, 8)
    torch.testing.assert_close(torch.tensor(rows[compiled]), torch.tensor(rows["off"]), rtol=1e-4, atol=1e-5)


def test_blocks_are_the_step_and_share_a_graph(no_synchronisation: None) -> None:
    rows = {}
    for how in ("off", "blocks"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), *(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
        changes = {"device": "cuda", "precision": "fp32", "train.batch": 16, "compile": how}
        step, feed = make_step(nn.Sequential(model, nn.Linear(8, 3)), mean_loss, points(), **changes)
        rows[how] = run_steps(step, feed, 8)
    torch.testing.assert_close(torch.tensor(rows["blocks"]), torch.tensor(rows["off"]), rtol=1e-4, atol=1e-5)
    assert step.recomputation.compiler.made == 1
    window = next(iter(feed.windows(8, 9)))
    torch.cuda.set_sync_debug_mode("error")
    step.run(window)


@pytest.mark.parametrize("compiled", ["step", "captured"])
def test_a_compiled_step_never_waits_for_the_device(compiled: str, no_synchronisation: None) -> None:
    changes = {**CHANGES, "precision": "bf16", "train.micro_batch": 16, "compile": compiled}
    step, feed = make_step(batchnorm_net(0.1), mean_loss, points(), **changes)
    windows = list(feed.windows(0, 9))
    for window in windows[:5]:
        step.run(window)
    torch.cuda.set_sync_debug_mode("error")
    for window in windows[5:]:
        step.run(window)


def test_what_is_fastest_is_measured_and_told() -> None:
    recipe = {**CHANGES, "device": "cuda", "precision": "bf16", "train.steps": 10_000}
    task = Task(model=batchnorm_net(), loss=mean_loss, data=Split(train=points()))
    plan = resolve(task, Recipe().override(recipe)).plan
    told = [d for d in plan.decisions if d.path == "compile"]
    assert plan.recipe.compile == told[-1].value and "ms a step" in told[-1].reason


def test_batches_come_from_pinned_memory(no_synchronisation: None) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    assert to_device({"x": torch.ones(1000)}, torch.device("cuda"))["x"].is_cuda


def test_the_gpu_follows_the_cpu(tmp_path: Path) -> None:
    finals = {}
    for device in ("cpu", "cuda"):
        recipe = {**CHANGES, "device": device, "precision": "fp32", "train.steps": 20}
        result = thalweg.train(batchnorm_net, mean_loss, Split(train=points(), test=points(seed=1)), recipe)
        finals[device] = result.metrics["loss"]
    assert finals["cuda"] == pytest.approx(finals["cpu"], rel=1e-3)


def test_the_table_of_capabilities_is_what_a_gpu_shows() -> None:
    from thalweg.device import capabilities_of
    from thalweg.device.probes import _PROBES

    gpu = torch.device("cuda", 0)
    row = capabilities_of(gpu)
    names = _PROBES.keys() - {"compile_backend"}  # torch has inductor for it, which no entry point says
    shown = {name: _PROBES[name](gpu) for name in names}
    assert shown == {name: getattr(row, name) for name in names}


def test_a_move_to_a_gpu_keeps_ties_and_says_flops_use() -> None:
    from thalweg.device import choose
    from thalweg.device.chips import chip_here

    device, _ = choose("cuda")
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False))
    model[1].weight = weight = model[0].weight
    device.move(model)
    assert model[0].weight is weight and model[1].weight is weight and weight.is_cuda
    recipe = {**CHANGES, "precision": "fp32", "train.steps": 10}
    result = thalweg.train(batchnorm_net, mean_loss, Split(train=points()), recipe)
    known = chip_here(device.name(), device.memory_bytes()) is not None
    assert (result.flops_use is not None and 0 < result.flops_use < 1) if known else result.flops_use is None
