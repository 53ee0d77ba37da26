"""Training on torch-tpu, simulated on the CPU: digits and a small pycode, held against the CPU's own runs. See docs/tpu.md."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg import Recipe, Split, Task, TokenWindows, train, train_task
from thalweg.core import DeviceError, Event
from thalweg.device import Device, choose, simulated
from thalweg.device.silent import mend, untrainable_in_graphs
from thalweg.recipes import find_task, recipe_for

if reason := simulated.why_not():
    pytest.skip(f"{reason} ('make test-tpu' has an environment of its own)", allow_module_level=True)
warnings.simplefilter("ignore")
simulated.begin()

NEAR = 1e-5  # of a loss, in float32
MOST = 3  # compilations after the first step


class Heard:
    """A sink that keeps what is told, and how many programs torch-tpu had compiled by then."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def start(self, plan: Any, step: int) -> None: ...

    def steps(self, records: Any) -> None: ...

    def evaluation(self, evaluation: Any) -> None: ...

    def event(self, event: Event) -> None:
        self.events.append(event)

    def stop(self, reason: Any) -> None: ...

    def compiled(self) -> list[Event]:
        return [event for event in self.events if event.name == "compiled"]


@contextmanager
def plainly() -> Iterator[None]:
    """Attention as plain operators: torch-tpu's own kernel for it needs a TPU."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(task: Task, device: str, changes: dict[str, Any], **more: Any) -> Any:
    recipe = recipe_for(task) if task.name == "digits" else Recipe().override(dict(task.recipe))
    recipe = recipe.override({"device": device, "precision": "fp32", "regularize.by_sample": True, **changes})
    with plainly():
        return train_task(task, recipe, **more)


def pycode() -> Task:
    """Ten windows of sixteen bytes: the second window of an epoch has two samples, and its only micro-batch is short."""
    task = find_task("pycode")
    text = Path(__file__).read_bytes()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    data = Split(train=TokenWindows(tokens[:161], 16), test=TokenWindows(tokens[200:361], 16))
    return replace(task, data=lambda: data, sample=None)


SMALL = {"model.context": 16, "model.width": 16, "model.heads": 2, "model.layers": 1}
PYCODE = {**SMALL, "train.steps": 5, "train.batch": 8, "train.micro_batch": 4, "evaluate.batch": 5}
DIGITS = {"model.width": 8, "train.epochs": None, "train.steps": 4, "train.batch": 512, "train.micro_batch": 256}
# Two micro-batches a step; the third step is an epoch's last window, of 256 and 157 samples.


def check_same(here: Any, there: Any) -> None:
    assert [r.step for r in there.records] == [r.step for r in here.records]
    for mine, theirs in zip(here.records, there.records):
        assert theirs.loss == pytest.approx(mine.loss, abs=NEAR), f"step {mine.step}"
    for name, value in here.evaluations[-1].metrics.items():
        assert there.evaluations[-1].metrics[name] == pytest.approx(value, abs=5 * NEAR if name == "loss" else 1e-9)


def decided(result: Any, path: str) -> str:
    return "; ".join(f"{d.value}: {d.reason}" for d in result.plan.decisions if d.path == path)


def test_digits_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    task, heard = find_task("digits"), Heard()
    constant = {**DIGITS, "schedule.lr": "hold()"}
    here = run(task, "cpu", constant)
    there = run(task, "tpu", constant, sinks=[heard])
    check_same(here, there)
    after = [event for event in heard.compiled() if "after the first step" in event.text]
    assert len(heard.compiled()) >= 2 and len(after) <= MOST, [event.text for event in heard.compiled()]
    assert decided(there, "compile").startswith("step")
    assert "did not move" in decided(
        there, "operator batch_norm"
    )  # and its statistics, in the evaluation, are the CPU's
    assert decided(there, "float32 products").startswith("highest")
    assert "normalise by the batch" in decided(there, "padding")

    folder = tmp_path / "run"
    run(task, "tpu", {**constant, "train.steps": 2}, folder=folder)
    again = run(task, "tpu", constant, folder=folder, resume=True, accept=("train.steps",))
    assert [r.loss for r in again.records] == [r.loss for r in there.records[2:]]
    for p, q in zip(again.model.parameters(), there.model.parameters()):
        assert torch.equal(p.cpu(), q.cpu())


def test_pycode_pads_its_last_window(tmp_path: Path) -> None:
    heard = Heard()
    here = run(pycode(), "cpu", PYCODE)
    there = run(pycode(), "tpu", PYCODE, sinks=[heard])
    check_same(here, there)
    assert decided(there, "padding").startswith("4")
    assert there.records[1].weight == here.records[1].weight == 2 * 16  # what was added does not count
    after = [event.text for event in heard.compiled() if "after the first step" in event.text]
    assert len(after) <= MOST and not any("after tokens" in text for text in after), after


def test_bf16_trains_and_fp16_is_refused() -> None:
    there = run(pycode(), "tpu", {**PYCODE, "precision": "bf16", "train.steps": 2})
    here = run(pycode(), "cpu", {**PYCODE, "precision": "bf16", "train.steps": 2})
    assert [r.loss for r in there.records] == pytest.approx([r.loss for r in here.records], rel=5e-3)
    with pytest.raises(DeviceError, match="precision='fp16' is not possible on tpu"):
        run(pycode(), "tpu", {**PYCODE, "precision": "fp16"})


PRODUCT = """
module @product {
  func.func @main(%a: tensor<128x256xf32>, %b: tensor<256x128xf32>) -> tensor<128x128xf32> {
    %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0], precision = [HIGHEST, HIGHEST]
      : (tensor<128x256xf32>, tensor<256x128xf32>) -> tensor<128x128xf32>
    return %0 : tensor<128x128xf32>
  }
}
"""


def test_the_compiler_of_a_tpu_is_asked_ahead_of_time(tmp_path: Path) -> None:
    good, bad = tmp_path / "product.mlir", tmp_path / "bad.mlir"
    good.write_text(PRODUCT)
    bad.write_text("module {")
    found = []
    for file in (good, bad):
        done = subprocess.run([sys.executable, "-m", "thalweg.device.aot", "tpu-v5e", str(file)], capture_output=True)
        found.append(json.loads(done.stdout.decode().strip().splitlines()[-1]))
    ((one,), refused) = found
    assert one["arguments"] == 2 * 128 * 256 * 4 and one["outputs"] == 128 * 128 * 4 and one["peak"] >= one["outputs"]
    assert one["flops"] == 2 * 128 * 256 * 128 and one["accessed"] >= one["arguments"]
    assert "refused (compile)" in refused["refused"]


class Pooled(nn.Module):
    """What torch-tpu 0.2.0 gives no gradient, or no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = (
            nn.Conv1d(1, 4, 3, padding=1),
            nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        )
        self.pool, self.out = nn.AvgPool1d(2), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(self.norm(self.conv(x))).flatten(1))


def test_operators_without_effect_are_replaced() -> None:
    model, device = Pooled(), torch.device("tpu", 0)
    told = dict(mend(model, device))
    assert set(told) == {"instance_norm", "avg_pool1d"}
    torch.manual_seed(0)
    x = torch.randn(6, 1, 8)
    here = Pooled()
    there = Pooled()
    there.load_state_dict(here.state_dict())
    Device(device).move(there)
    here(x).square().sum().backward()
    there(x.to(device)).square().sum().backward()
    for (name, p), q in zip(here.named_parameters(), there.parameters()):
        assert q.grad is not None and torch.allclose(p.grad, q.grad.cpu(), atol=1e-4), name
    for (name, b), c in zip(here.named_buffers(), there.named_buffers()):
        assert torch.allclose(b.float(), c[1].cpu().float(), atol=1e-6), name
    assert float(here.norm.running_mean.abs().max()) > 0


def test_a_recurrent_model_is_not_compiled() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x)[0][:, -1])

    device, _ = choose("tpu")
    assert "no gradient" in untrainable_in_graphs(Recurrent(), device.torch_device, device.compile_backend)
    torch.manual_seed(0)
    data = {"x": torch.randn(8, 3, 2), "y": torch.randn(8, 1)}
    wanted = {"train.steps": 2, "train.batch": 4, "train.micro_batch": 4, "optimizer.rule": "sgd", "precision": "fp32"}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    losses = {}
    for kind in ("cpu", "tpu"):
        torch.manual_seed(1)
        found = train(Recurrent(), loss, data, {**wanted, "device": kind})
        losses[kind] = [r.loss for r in found.records]
    assert losses["tpu"] == pytest.approx(losses["cpu"], abs=NEAR)
    assert decided(found, "compile").startswith("off")
