"""What training takes, predicted: storages followed through a pass, state sized from shapes alone, bytes of this machine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thalweg.core import Ledger, Recipe, RecipeError, Split, Task
from thalweg.device import choose, memory
from thalweg.device.scratch import scratch_bytes
from thalweg.engine import resolve
from thalweg.engine.memory.predict import begun, predict
from thalweg.engine.memory.trace import Block, CannotFake, Line, Trace, trace, trace_line
from thalweg.optim import make_arenas, named_trainable, parameter_table
from thalweg.optim.arena import How
from thalweg.optim.codecs import CODECS
from thalweg.optim.sizes import StateSizes, state_sizes
from thalweg.precision import POLICIES
from thalweg.rules import RULES

CPU, _ = choose("cpu")
FP32 = POLICIES["fp32"]
MIB = 1 << 20


class Layer(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.up, self.down = again, nn.Linear(16, 64), nn.Linear(64, 16)

    def work(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(x))), 0.1)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.work, x, use_reentrant=False) if self.again else self.work(x)


class Net(nn.Module):
    def __init__(self, again: bool = False, looks: bool = False) -> None:
        super().__init__()
        self.looks = looks
        self.blocks = nn.Sequential(*(Layer(again) for _ in range(3)))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and bool((x.sum() > 1e9).item()):
            return x
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def batch_of(num: int) -> dict[str, Tensor]:
    return {"x": torch.randn(num, 16), "y": torch.zeros(num, dtype=torch.int64)}


def sizes_of(traced: Trace) -> list[tuple[int, str, bool]]:
    return sorted((b.nbytes, b.module, b.kept) for b in traced.blocks)


# ------------------------------------------------------------------ traces


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).exp().sum()


def test_a_trace_knows_what_is_alive_when() -> None:
    x = torch.zeros(8, 256)
    traced = trace(Square(), lambda model, batch: model(batch), x, CPU, FP32)
    whole = x.nbytes
    assert traced.samples == 8 and traced.inputs == whole
    # the result of exp is kept; x itself is the batch's, and the product is not needed once exp is there
    assert whole <= traced.kept < whole + 64
    # backward: the gradient of the product, its product with x, and the sum of that; before, exp's result and the gradient
    assert 2 * whole + 1024 <= traced.peak < 2 * whole + 1024 + 64
    assert traced.peak_at.startswith("backward pass")
    assert sorted(e for e in traced.events if e >= 0) == list(range(len(traced.blocks)))
    assert {~e for e in traced.events if e < 0} == set(range(len(traced.blocks)))  # all of it is gone afterwards


def test_modules_say_what_they_keep_and_add_up() -> None:
    traced = trace(Net(), loss, batch_of(8), CPU, FP32)
    rows = {row.name: row.kept for row in traced.modules}
    assert rows["blocks"] == sum(rows[f"blocks.{k}"] for k in range(3)) > 0
    tops = [kept for name, kept in rows.items() if "." not in name]
    assert sum(tops) == traced.kept
    kept = [row.kept for row in traced.modules]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_trace_leaves_nothing_behind(fake: bool, again: bool) -> None:
    model = Net(again)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    grads, batch = [p.grad for p in model.parameters()], batch_of(8)
    state = torch.get_rng_state()
    trace(model, loss, batch, CPU, FP32, fake=fake)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is grad and bool((p.grad == 1).all()) for p, grad in zip(model.parameters(), grads))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True])
def test_shapes_alone_give_the_same_trace(policy: str, again: bool) -> None:
    model = Net(again)
    real = trace(model, loss, batch_of(8), CPU, POLICIES[policy])
    fake = trace(model, loss, batch_of(8), CPU, POLICIES[policy], fake=True)
    assert (real.kept, real.modules) == (fake.kept, fake.modules)
    assert abs(real.peak - fake.peak) <= 0.05 * real.peak


def test_a_model_without_memory_can_be_traced() -> None:
    with torch.device("meta"):
        model, batch = Net(), batch_of(8)
    assert trace(model, loss, batch, CPU, FP32, fake=True).kept == trace(Net(), loss, batch_of(8), CPU, FP32).kept


def test_recomputation_keeps_less() -> None:
    kept, again = (trace(Net(again), loss, batch_of(64), CPU, FP32) for again in (False, True))
    assert again.kept < kept.kept / 2 and again.peak < kept.peak


def test_a_line_through_two_traces_is_exact() -> None:
    model = Net()
    line = Line(*(trace(model, loss, batch_of(n), CPU, FP32) for n in (2, 4)))
    assert line.exact
    wanted = trace(model, loss, batch_of(24), CPU, FP32)
    assert sizes_of(line.at(24)) == sizes_of(wanted)
    assert (line.at(24).peak, line.at(24).inputs, line.at(24).samples) == (wanted.peak, wanted.inputs, 24)
    assert line.at(2) is line.first


def test_where_traces_differ_totals_are_on_a_line() -> None:
    def of(samples: int, *sizes: int) -> Trace:
        blocks = tuple(Block(size, "", False, True) for size in sizes)
        return Trace(samples, samples, blocks, tuple(range(len(blocks))))

    line = Line(of(2, 300), of(4, 200, 300))
    assert not line.exact
    assert line.at(8).peak == pytest.approx(900, abs=2)


def test_a_model_that_looks_at_values_is_traced_on_real_tensors() -> None:
    model = Net(looks=True)
    with pytest.raises(CannotFake, match=r"(?s)on shapes alone.*DataDependent.*control flow"):
        trace(model, loss, batch_of(8), CPU, FP32, fake=True)
    line = trace_line(model, loss, batch_of(8), CPU, FP32)
    assert (line.first.samples, line.second.samples) == (2, 4)
    wanted = trace(model, loss, batch_of(32), CPU, FP32)
    assert line.at(32).peak == wanted.peak


def test_a_broken_loss_leaves_no_hooks() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        model(batch["x"])
        raise ValueError("broken")

    model = Net()
    with pytest.raises(ValueError, match="broken"):
        trace(model, broken, batch_of(8), CPU, FP32)
    assert not nn.modules.module._global_forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# ------------------------------------------------------------------ training state


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 300), nn.LayerNorm(300), nn.Linear(300, 7, bias=False)
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"sophia"}))
def test_sizes_are_those_of_the_arena(rule: str, codec: str) -> None:
    model = _model()
    optimizer = Recipe().override({"optimizer.rule": rule, "optimizer.slots": codec}).optimizer
    rows = parameter_table(model, optimizer=optimizer)
    try:
        arenas = make_arenas(named_trainable(model), rows, optimizer, How(slots=codec, average=True, way="eager"))
    except RecipeError as err:
        with pytest.raises(RecipeError, match=str(err).splitlines()[0]):
            state_sizes(named_trainable(_model()), rows, optimizer, average=True)
        return
    wanted = [arena.nbytes() for arena in arenas]
    found = state_sizes(named_trainable(_model()), rows, optimizer, average=True)
    assert found.parameters == sum(one["parameters"] for one in wanted)
    assert found.gradients == sum(one["gradients"] for one in wanted)
    assert found.slots == sum(one["slots"] for one in wanted)
    assert found.averages == sum(one["average"] for one in wanted) > 0
    assert found.update > 0


def test_released_gradients_and_slots_elsewhere_do_not_count() -> None:
    model = _model()
    base = Recipe().optimizer
    rows = parameter_table(model, optimizer=base)
    plain = state_sizes(named_trainable(model), rows, base)
    released = state_sizes(named_trainable(model), rows, dataclasses.replace(base, release_gradients="one-pass"))
    away = state_sizes(named_trainable(model), rows, dataclasses.replace(base, offload=True))
    assert plain.gradients > 0 and released.gradients == 0 and released.slots >= plain.slots * 0.9
    assert (away.slots, away.offloaded) == (0, plain.slots)


def test_gradients_may_be_wider_than_parameters() -> None:
    model = _model().to(torch.bfloat16)
    base = Recipe().optimizer
    rows = parameter_table(model, optimizer=base)
    narrow = state_sizes(named_trainable(model), rows, base)
    wide = state_sizes(named_trainable(model), rows, base, gradients=torch.float32)
    assert (narrow.gradients, wide.gradients) == (narrow.parameters, 2 * narrow.parameters)


# ------------------------------------------------------------------ the ledger


def test_a_ledger_adds_up() -> None:
    blocks = (Block(100 * MIB, "a", False, True), Block(10 * MIB, "a", True, False))
    traced = Trace(4, 3 * MIB, blocks, (0, 1, ~1, ~0))
    sizes = StateSizes(MIB, 2 * MIB, 3 * MIB, 4 * MIB, update=50 * MIB)
    ledger = predict(traced, sizes, CPU, micro_batches=2, buffers=5 * MIB, data=6 * MIB, process=200 * MIB)
    assert ledger.peak == sum(nbytes for _, nbytes in ledger.rows())
    assert (ledger.state, ledger.activations, ledger.micro_batch) == (21 * MIB, 100 * MIB, 4)
    # beyond what is kept: the rest of the passes, two micro-batches, and what the heap loses of its 10 MiB
    assert ledger.temporary == 10 * MIB + 6 * MIB + 10 * MIB
    elsewhere = predict(traced, sizes, CPU, process=0, accelerator=True)
    assert elsewhere.temporary == 10 * MIB + 3 * MIB
    heavy = predict(traced, dataclasses.replace(sizes, update=500 * MIB), CPU, process=0, accelerator=True)
    assert heavy.peak_at == "update" and heavy.peak == 10 * MIB + 3 * MIB + 500 * MIB


def test_the_heap_loses_as_much_as_is_in_it_and_a_part_beyond() -> None:
    assert memory.lost_in_heap(CPU, 5 * MIB) == 5 * MIB
    assert memory.lost_in_heap(CPU, 100 * MIB) == 64 * MIB
    assert memory.lost_in_heap(CPU, 1000 * MIB) == 300 * MIB


def test_a_convolution_counts_the_kernel_it_reorders() -> None:
    x, kernel = torch.zeros(1, 2, 4, 4), torch.zeros(8, 2, 3, 3)
    assert scratch_bytes("cpu", "aten::convolution", [x, kernel]) == kernel.nbytes
    assert scratch_bytes("cpu", "aten::convolution_backward", [x, x, kernel]) == kernel.nbytes
    assert scratch_bytes("cuda", "aten::convolution", [x, kernel]) == scratch_bytes("cpu", "aten::mm", [x, x]) == 0


def test_what_passes_were_seen_to_take_is_predicted_instead_of_the_heap() -> None:
    traced = Trace(4, 3 * MIB, (Block(100 * MIB, "a", False, True), Block(10 * MIB, "a", True, False)), (0, 1, ~1, ~0))
    sizes = StateSizes(MIB, MIB, MIB, MIB, update=50 * MIB)
    later = 8 * MIB + 12 * MIB  # and what holes grow by while steps repeat
    assert predict(traced, sizes, CPU, process=0, seen=150 * MIB).temporary == 50 * MIB + 3 * MIB + later
    # memory that lay there already was used again: no less than live tensors
    assert predict(traced, sizes, CPU, process=0, seen=0).temporary == 10 * MIB + 3 * MIB + 8 * MIB
    assert (
        predict(traced, dataclasses.replace(sizes, update=500 * MIB), CPU, process=0, seen=150 * MIB).peak_at
        == "update"
    )


class Hidden(nn.Module):
    """Takes memory that torch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        here = np.ones(64 * MIB, np.uint8)
        logits: Tensor = self.inner(x)
        return logits + float(here[-1]) * 0


def _predicted(model: nn.Module, batch: Any, **changes: Any) -> Ledger:
    recipe = Recipe().override({"train.batch": len(batch["y"]), "train.steps": 1, "device": "cpu", **changes})
    split = Split(train=batch)
    ledger = resolve(Task(name="t", model=model, loss=loss, data=split), recipe).plan.ledger
    assert ledger is not None
    return ledger


@pytest.mark.skipif(sys.platform != "linux", reason="the mark of a process's peak is set anew on Linux alone")
def test_a_pass_is_measured_with_all_that_it_takes() -> None:
    assert 68 * MIB < _predicted(Hidden(), batch_of(8)).temporary < 96 * MIB


def test_what_building_loads_is_the_processs() -> None:
    traced = Trace(4, 0, (Block(MIB, "", False, True),), (0, ~0))
    ledger = predict(traced, StateSizes(MIB, MIB, MIB, MIB), CPU, process=MIB, seen=9 * MIB)
    settled = begun(ledger, CPU)
    assert abs(settled.process - (memory.in_use(CPU) - 4 * MIB)) < 8 * MIB
    assert settled.peak == sum(nbytes for _, nbytes in settled.rows())


def test_frozen_weights_count_among_the_process() -> None:
    frozen = nn.Linear(4096, 4096).requires_grad_(False)
    model = nn.Sequential(nn.Linear(16, 4), nn.Identity())
    model[1].register_module("frozen", frozen)
    before = memory.in_use(CPU)
    assert _predicted(model, batch_of(8)).process > before - 32 * MIB


def test_where_the_peak_cannot_be_marked_the_heap_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reset_peak", lambda device: False)
    monkeypatch.setattr(memory, "lost_in_heap", lambda device, live: 123 * MIB)
    ledger = _predicted(Hidden(), batch_of(8))
    assert 123 * MIB < ledger.temporary < 124 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell the most ever alone")
@pytest.mark.parametrize("micro", [1 << 20, 1 << 18])
def test_a_window_is_counted_once(micro: int) -> None:
    batch = batch_of(1 << 20)  # 72 MiB
    model = nn.Sequential(nn.AvgPool1d(16), nn.Linear(1, 4))
    ledger = _predicted(model, batch, **{"train.micro_batch": micro})
    memory.release(CPU)
    assert abs(ledger.process - memory.in_use(CPU)) < 30 * MIB  # the window is gone by now; the data set is not
    assert ledger.temporary >= sum(x.nbytes for x in batch.values())


def test_a_run_imports_no_compiler() -> None:
    """It would take seconds and 130 MB of every run's start; asked in a process of its own."""
    code = """
import sys
import torch
from torch import nn
import thalweg
from thalweg.optim import named_trainable, parameter_table
from thalweg.optim.sizes import state_sizes
from thalweg.core import Recipe

model, recipe = nn.Linear(16, 4), Recipe().override({"train.batch": 8, "train.steps": 2})
state_sizes(named_trainable(model), parameter_table(model, optimizer=recipe.optimizer), recipe.optimizer)
assert "sympy" not in sys.modules, "sizes"
data = {"x": torch.randn(16, 16), "y": torch.zeros(16, dtype=torch.int64)}
loss = lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"])
ledger = thalweg.train(model, loss, data, recipe).plan.ledger
assert ledger is not None
assert "torch._dynamo" not in sys.modules, "training"
"""  # a compiled update's stand-ins on the meta device still load it (torch._refs)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ this machine's bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell the most ever alone")
def test_a_process_is_seen_to_grow() -> None:
    memory.release(CPU)
    memory.reset_peak(CPU)
    before = memory.in_use(CPU)
    x = torch.ones(64 * MIB // 4)
    assert memory.in_use(CPU) - before > 60 * MIB
    del x
    most = memory.peak(CPU)
    assert most is not None and most - before > 60 * MIB
    memory.release(CPU)  # the heap may have had room for it, and keeps it
    assert memory.in_use(CPU) - before < 20 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's here")
def test_a_limit_of_address_space_is_what_is_left() -> None:
    import resource

    old = resource.getrlimit(resource.RLIMIT_AS)
    size = memory._status()["VmSize"]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size + 300 * MIB, old[1]))
        assert memory.available(CPU) <= 301 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert memory.available(CPU) > 0


def test_control_groups_of_both_versions_are_read(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text("0::/a/b\n5:memory:/c\n3:cpu:/d\n")
    inner, old = tmp_path / "a/b", tmp_path / "memory/c"
    for folder, names in (
        (inner, {"memory.max": "max", "memory.current": "70"}),
        (tmp_path / "a", {"memory.max": "100", "memory.current": "80", "memory.stat": "inactive_file 15\n"}),
        (
            old,
            {
                "memory.limit_in_bytes": "50",
                "memory.usage_in_bytes": "20",
                "memory.stat": "cache 1\ntotal_inactive_file 3\n",
            },
        ),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in names.items():
            (folder / name).write_text(text)
    assert memory._group_free(str(groups), str(tmp_path)) == [35, 33]
