"""Layers and statistics that know the micro-batch: ranks, recomputation, ghost batches, frozen, synced, precise, conversion."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import join_ranks, spawn, three_parts
from tests.models import assert_same_bits
from thalweg.core import DataError, ModelError
from thalweg.regularize import (
    Change,
    FrozenBatchNorm,
    GhostBatchNorm,
    PooledStatistics,
    PreciseStatistics,
    SyncedBatchNorm,
    check_batch,
    convert_batchnorm,
    freeze_batchnorm,
    reestimate,
    watch_batch,
)

APPLIED = torch.tensor(True)


def pooled_step(
    pool: PooledStatistics, model: Callable[[Tensor], Tensor], parts: list[Tensor], ok: Tensor = APPLIED
) -> None:
    """What a training step does: forward and backward each part, statistics once."""
    pool.begin()
    for place, part in enumerate(parts):
        model(part).square().sum().backward()
        pool.collect(last=place == len(parts) - 1)
    pool.end(ok)


def images(num: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(num, 1, 5, 5, generator=draw, dtype=torch.float64).to(dtype)


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(5)
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).to(dtype)


# --- the split and the rank -------------------------------------------------------------------------------------------


def test_four_micro_batches_give_torch_a_momentum_of_0344_and_ours_one_of_01() -> None:
    """A constant mean: after one step the running mean is the momentum itself."""
    parts = [torch.randn(8, 3).sub_(0.5) for _ in range(4)]
    parts = [part - part.mean(0) + 1 for part in parts]
    plain, ours = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for part in parts:
        plain(part)
    pooled_step(PooledStatistics(ours, torch.float64), ours, parts)
    assert plain.running_mean.tolist() == pytest.approx([1 - 0.9**4] * 3, abs=1e-6)
    assert round(1 - 0.9**4, 3) == 0.344
    assert ours.running_mean.tolist() == pytest.approx([0.1] * 3, abs=1e-6)


def _sizes_of(rank: int, world: int, case: str) -> list[int]:
    """Samples of each micro-batch of a rank; "idle": the last rank has nothing; "ragged": batches differ."""
    if case == "idle" and rank == world - 1:
        return []
    return {"one": [4], "even": [3, 3, 3], "ragged": [4, 3, 2 + rank], "idle": [5, 2]}[case]


CASES = ("one", "even", "ragged", "idle")


def _part(rank: int, step: int, place: int, num: int) -> Tensor:
    return 3 * images(num, seed=100 * rank + 10 * step + place) + rank


def _everything(rank: int, world: int, port: int, folder: str) -> None:
    """All that needs ranks, in one set of processes; each rank leaves what it found in a file."""
    join_ranks(rank, world, port)
    found: dict[str, Any] = {"buffers": {}, "synced": _synced(rank, world), "both": _both(rank, world)}
    for case in CASES:
        model, unused = conv_net(), nn.BatchNorm1d(2).double()
        pool = PooledStatistics(nn.ModuleList([unused, model]), torch.float64)
        for step in range(2):
            sizes = _sizes_of(rank, world, case)
            pooled_step(pool, model, [_part(rank, step, i, n) for i, n in enumerate(sizes)])
        found["buffers"][case] = {name: b.clone() for name, b in model.named_buffers()}
        found["unused"] = unused.running_mean.tolist() + unused.running_var.tolist()
    model = conv_net()
    pool = PooledStatistics(model, torch.float64)
    before = {name: b.clone() for name, b in model.named_buffers()}
    x = _part(rank, 0, 0, 4)
    pooled_step(pool, model, [x / 0 if rank == 0 else x], torch.tensor(rank != 0))
    found["one rank skips"] = all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    parts = [_part(rank, 0, i, n) for i, n in enumerate(_sizes_of(rank, world, "ragged"))]
    reestimate(model, parts[: 1 + rank])
    found["precise"] = {name: b.clone() for name, b in model.named_buffers()}
    refused = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SyncBatchNorm(2))
    with pytest.raises(ModelError) as err:
        PooledStatistics(refused, torch.float64).begin()
    found["refused"] = str(err.value)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def _whole(world: int) -> list[Tensor]:
    """The inputs of each rank for synchronised layers: ragged, and in a world of 3 one has nothing."""
    return [3 * images(0 if rank == 2 else 3 + 2 * rank, seed=rank) + rank for rank in range(world)]


def _synced_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(6)
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Tanh(), nn.Flatten())
    with torch.no_grad():
        net[0].weight.fill_(1.5)
        net[0].bias.fill_(0.2)
    return net.to(dtype)


def _synced(rank: int, world: int) -> dict[str, Any]:
    model = _synced_net()
    convert_batchnorm(model, to="synced")
    x = _whole(world)[rank].requires_grad_()
    y = model(x)
    y.pow(3).sum().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    halves = {}
    for half in (torch.bfloat16, torch.float16):
        layer, wide = SyncedBatchNorm(1), SyncedBatchNorm(1).double()
        given = _whole(world)[rank].to(half).requires_grad_()
        out, wanted = layer(given), wide(given.detach().double())
        (out * out).sum().backward()
        (wanted * wanted).sum().backward()
        gap = torch.cat(
            [(out - wanted).abs().flatten(), (layer.weight.grad / wide.weight.grad - 1).abs() * bool(len(given))]
        )
        dtypes = [out.dtype, given.grad.dtype, layer.running_var.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype]
        halves[half] = (dtypes, gap.nan_to_num(0).max().item())
    return {"y": y.detach(), "gradients": gradients, "buffers": dict(model.named_buffers()), "halves": halves}


def _both(rank: int, world: int) -> dict[str, Tensor]:
    """Synced layers whose statistics are pooled over micro-batches too, each checkpointed."""
    layer = SyncedBatchNorm(1).double()
    pool = PooledStatistics(layer, torch.float64)
    parts = [_part(rank, 0, i, n) for i, n in enumerate((4, 3 + rank))]
    pooled_step(pool, lambda x: checkpoint(layer, x, use_reentrant=False), parts)
    return dict(layer.named_buffers())


@pytest.mark.parametrize("world", [2, 3])
def test_ranks(world: int, tmp_path: Path) -> None:
    """Processes cost seconds to start: one set of them finds what all these checks look at."""
    spawn(_everything, world, str(tmp_path))
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(world)]
    for case in CASES:
        check_running_statistics_are_those_of_all_ranks_and_micro_batches(ranks, case)
    assert all(found["one rank skips"] for found in ranks), "where one rank skips, all do"
    assert all("synced" in found["refused"] for found in ranks), "torch's synchronised layers are not pooled twice"
    assert all(found["unused"] == [0, 0, 1, 1] for found in ranks), "a layer that no rank used stays as it is"
    check_precise_statistics_are_pooled_over_ranks(ranks)
    check_synced_layers_are_one_process_with_the_whole_batch(ranks)
    check_synced_layers_keep_float32_in_half_precision(ranks)
    check_synced_layers_in_a_pooled_step_count_each_value_once(ranks)


def by_definition(parts_of_steps: list[list[Tensor]]) -> dict[str, Tensor]:
    """The declared statistics, by torch.var over the concatenation of all that reached a layer in each step."""
    model = conv_net()
    for parts in parts_of_steps:
        seen: dict[int, list[Tensor]] = {i: [] for i in (1, 4, 7)}
        for x in parts:
            for i, layer in enumerate(model):
                if i in seen:
                    seen[i].append(x.transpose(0, 1).flatten(1).detach())
                    x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
                else:
                    x = layer(x)
        for i, values in seen.items():
            everything = torch.cat(values, 1)
            model[i].running_mean.lerp_(everything.mean(1), 0.1)
            model[i].running_var.lerp_(torch.var(everything, 1), 0.1)
            model[i].num_batches_tracked.add_(1)
    return dict(model.named_buffers())


def check_running_statistics_are_those_of_all_ranks_and_micro_batches(ranks: list[dict[str, Any]], case: str) -> None:
    world = len(ranks)
    steps = [
        [_part(rank, step, i, n) for rank in range(world) for i, n in enumerate(_sizes_of(rank, world, case))]
        for step in range(2)
    ]
    wanted = by_definition(steps)
    for found in ranks:
        assert_same_bits(found["buffers"][case], ranks[0]["buffers"][case])
    for name, buffer in ranks[0]["buffers"][case].items():
        torch.testing.assert_close(buffer, wanted[name], rtol=1e-6, atol=1e-6)


def check_precise_statistics_are_pooled_over_ranks(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    parts = [
        _part(rank, 0, i, n)
        for rank in range(world)
        for i, n in enumerate(_sizes_of(rank, world, "ragged")[: 1 + rank])
    ]
    for name, wanted in moments_by_hand(conv_net(), parts).items():
        torch.testing.assert_close(ranks[-1]["precise"][name], wanted, rtol=1e-9, atol=1e-9)


def check_synced_layers_are_one_process_with_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    model, x = _synced_net(), torch.cat(_whole(world)).requires_grad_()
    y = model(x)
    y.pow(3).sum().backward()
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    close(torch.cat([found["synced"]["y"] for found in ranks]), y.detach())
    close(torch.cat([found["synced"]["gradients"][0] for found in ranks]), x.grad)
    for found in ranks:
        for mine, parameter in zip(found["synced"]["gradients"][1:], model.parameters(), strict=True):
            close(mine, parameter.grad)
        for name, buffer in model.named_buffers():
            close(found["synced"]["buffers"][name], buffer)


def check_synced_layers_keep_float32_in_half_precision(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for half, (dtypes, gap) in found["synced"]["halves"].items():
            assert dtypes == [half, half, torch.float32, torch.float32, torch.float32]
            assert gap < (0.02 if half == torch.bfloat16 else 0.003)


def check_synced_layers_in_a_pooled_step_count_each_value_once(ranks: list[dict[str, Any]]) -> None:
    everything = torch.cat([_part(r, 0, i, n) for r in range(len(ranks)) for i, n in enumerate((4, 3 + r))])
    for found in ranks:
        torch.testing.assert_close(found["both"]["running_mean"], 0.1 * everything.mean().view(1), rtol=1e-9, atol=0)
        wanted = 0.9 + 0.1 * everything.var().view(1)
        torch.testing.assert_close(found["both"]["running_var"], wanted, rtol=1e-9, atol=0)
        assert int(found["both"]["num_batches_tracked"]) == 1


def test_on_one_rank_a_synced_layer_is_torchs() -> None:
    ours, plain, x = SyncedBatchNorm(4), nn.BatchNorm2d(4), torch.randn(6, 4, 3, 3)
    for _ in range(2):
        assert torch.equal(ours(x), plain(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.eval()(x), ours(x)) and not torch.equal(ours(x), plain(x))


# --- recomputation ----------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A block that is recomputed in the backward pass; ``twice``: it is run on two inputs, both recomputed."""

    def __init__(self, reentrant: bool, norm: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.reentrant, self.twice = reentrant, twice
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh()).double()
        self.outputs: list[Tensor] = []
        self.body.register_forward_hook(lambda module, inputs, out: self.outputs.append(out.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        y = self._run(x)
        return y + self._run(3 * x + 1) if self.twice else y

    def _run(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=self.reentrant)


def norms() -> dict[str, Callable[[], nn.Module]]:
    return {
        "torch": lambda: nn.BatchNorm1d(4),
        "ghost": lambda: GhostBatchNorm(4, 3),
        "synced": lambda: SyncedBatchNorm(4),
        "no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    }


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", norms())
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("sizes", [[8], [5, 3]])
def test_recomputation_is_not_counted(reentrant: bool, kind: str, twice: bool, sizes: list[int]) -> None:
    parts = [torch.randn(n, 3, dtype=torch.float64) for n in sizes]
    models = [Checkpointed(how, norms()[kind](), twice) for how in (None, reentrant)]
    for model in models:
        pool = PooledStatistics(model, torch.float64)
        for _ in range(2):
            pooled_step(pool, model, parts)
    plain, recomputed = models
    assert_same_bits(dict(plain.named_buffers()), dict(recomputed.named_buffers()))
    for mine, other in zip(recomputed.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-13, atol=1e-13)
    if kind != "no statistics":
        assert int(recomputed.body[1].num_batches_tracked) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_output(reentrant: bool) -> None:
    model = Checkpointed(reentrant, nn.BatchNorm1d(4))
    model.body[1].register_forward_hook(lambda module, inputs, out: normed.append(out.detach().clone()))
    normed: list[Tensor] = []
    pooled_step(PooledStatistics(model, torch.float64), model, [torch.randn(6, 3, dtype=torch.float64)])
    assert len(normed) == 2 and torch.equal(*normed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_torch_counts_a_recomputed_batch_twice_and_our_layers_do_not(reentrant: bool) -> None:
    """The trap, in a loop that knows nothing of pooling."""
    counted = {}
    for kind in ("torch", "ghost", "synced"):
        model = Checkpointed(reentrant, norms()[kind]())
        model(torch.ones(6, 3, dtype=torch.float64)).sum().backward()
        counted[kind] = int(model.body[1].num_batches_tracked)
    assert counted == {"torch": 2, "ghost": 1, "synced": 1}


@pytest.mark.parametrize("kind", ["torch", "ghost", "synced"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_are_counted_alike(kind: str, recomputed: bool) -> None:
    """One graph without a break; with checkpointing a second one for the recomputation, which ``forward_done`` tells it of."""
    torch._dynamo.reset()
    body = nn.Sequential(nn.Linear(3, 4), norms()[kind](), nn.Tanh()).double()
    models, graphs = [body, copy.deepcopy(body)], []
    for model, run in zip(models, (body, torch.compile(models[1], backend="aot_eager", fullgraph=True))):
        pool = PooledStatistics(model, torch.float64)
        for step in range(3):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            pool.begin()
            for place, x in enumerate(images(8, seed=step).view(8, -1)[:, :3].split(4)):
                y = checkpoint(run, x, use_reentrant=False) if recomputed else run(x)
                pool.forward_done()
                y.square().sum().backward()
                pool.collect(last=place == 1)
            pool.end(APPLIED)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-12, atol=1e-12)
    assert [num - graphs[0] for num in graphs[3:]] == ([0, 2, 2] if recomputed else [0, 1, 1]), (
        "later steps compile nothing"
    )


# --- ghost batches ----------------------------------------------------------------------------------------------------


def ghost_net(size: int = 4) -> nn.Sequential:
    model = conv_net()
    model[8].p = 0.0
    convert_batchnorm(model, to="ghost", size=size)
    return model


def test_splits_into_multiples_of_the_ghost_size_are_the_same_run() -> None:
    x, outcome = images(8), []
    for sizes in ([8], [4, 4]):
        model = ghost_net()
        pool = PooledStatistics(model, torch.float64)
        losses = []
        pool.begin()
        for place, part in enumerate(x.split(sizes)):
            loss = model(part).square().sum()
            loss.backward()
            losses.append(loss.detach())
            pool.collect(last=place == len(sizes) - 1)
        pool.end(APPLIED)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        outcome.append({"loss": sum(losses), **gradients, **dict(model.named_buffers())})
    torch.testing.assert_close(outcome[0], outcome[1], rtol=1e-12, atol=1e-12)
    plain = conv_net()
    plain[8].p = 0.0
    assert abs(plain(x).square().sum().item() - outcome[0]["loss"].item()) > 1e-3, "whole batches are another function"


@given(
    num=st.integers(2, 19),
    size=st.integers(2, 7),
    values=st.sampled_from([1, 4]),
    momentum=st.sampled_from([0.1, None]),
)
@settings(max_examples=60, deadline=None)
def test_ghost_groups_are_normalised_by_themselves(num: int, size: int, values: int, momentum: float | None) -> None:
    """Each group against torch's function; the running statistics against torch.var over the whole batch."""
    x = torch.randn(num, 3, values, dtype=torch.float64) * 3 + 50
    layer = GhostBatchNorm(3, size, momentum=momentum).double()
    sizes = [len(part) for part in x.split(size)]
    if len(sizes) > 1 and sizes[-1] * values == 1:
        sizes = [*sizes[:-2], sizes[-2] + 1]
    y = layer(x)
    for mine, part in zip(y.split(sizes), x.split(sizes), strict=True):
        torch.testing.assert_close(mine, F.batch_norm(part, None, None, training=True), rtol=1e-10, atol=1e-10)
    share, flat = (0.1 if momentum else 1.0), x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, share * flat.mean(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_var, 1 - share + share * flat.var(1), rtol=1e-10, atol=1e-10)
    layer(x - 1)
    if momentum is None:
        torch.testing.assert_close(layer.running_mean, flat.mean(1) - 0.5, rtol=1e-10, atol=1e-10)


def test_a_ghost_layer_evaluates_as_torchs() -> None:
    layer, plain, x = GhostBatchNorm(3, 4), nn.BatchNorm1d(3), torch.randn(9, 3)
    layer(x)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    assert "size=4" in repr(layer)


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True])
def test_a_ghost_size_that_is_none(size: Any) -> None:
    for make in (lambda: GhostBatchNorm(3, size), lambda: convert_batchnorm(conv_net(), to="ghost", size=size)):
        with pytest.raises(ModelError) as err:
            make()
        assert repr(size) in three_parts(err.value)[0]


@pytest.mark.parametrize("num, size", [(1, 4), (4, 1)])
def test_a_ghost_batch_of_one_value_is_refused(num: int, size: int) -> None:
    with pytest.raises(DataError) as err:
        GhostBatchNorm(3, size)(torch.randn(num, 3))
    assert f"({num}, 3)" in three_parts(err.value)[1]
    with pytest.raises(ModelError):
        GhostBatchNorm(3, size)(torch.randn(3))


# --- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_layers_keep_their_statistics_in_training_mode(affine: bool) -> None:
    model = conv_net()
    model(images(6))
    changes = freeze_batchnorm(model, affine=affine)
    assert [str(c) for c in changes] == [
        f"{name}: BatchNorm{dims}d -> FrozenBatchNorm{dims}d{'(affine too)' * affine}"
        for name, dims in (("1", 2), ("4", 2), ("7", 1))
    ]
    before = {name: b.clone() for name, b in model.named_buffers()}
    pool = PooledStatistics(model, torch.float64)
    model.train()
    assert model[8].training and not any(model[i].training for i in (1, 4, 7))
    x = images(1)
    wanted = F.batch_norm(
        model[0](x), before["1.running_mean"], before["1.running_var"], model[1].weight, model[1].bias
    )
    assert torch.equal(model[:2](x), wanted)
    pooled_step(pool, model, [x, images(3)])
    reestimate(model, [images(8)])
    assert_same_bits(before, dict(model.named_buffers()))
    assert (model[1].weight.grad is None) == affine == (not model[1].weight.requires_grad)
    assert freeze_batchnorm(model, affine=affine) == []


def test_frozen_layers_thaw() -> None:
    model = conv_net()
    freeze_batchnorm(model)
    assert [c.after for c in convert_batchnorm(model, to="torch")] == ["BatchNorm2d", "BatchNorm2d", "BatchNorm1d"]
    assert all(module.training for module in model.modules())
    model(images(4))
    assert int(model[1].num_batches_tracked) == 1
    freeze_batchnorm(model.eval())
    convert_batchnorm(model, to="ghost", size=2)
    assert not any(module.training for module in model.modules())


def test_layers_without_statistics_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ModelError) as err:
        freeze_batchnorm(model)
    assert "'1'" in three_parts(err.value)[0]
    assert type(model[0]) is nn.BatchNorm1d, "nothing has been changed"


# --- precise statistics -----------------------------------------------------------------------------------------------


def moments_by_hand(model: nn.Sequential, parts: list[Tensor], drop: bool = False) -> dict[str, Tensor]:
    """Mean and variance of the concatenation of all that reaches each layer, each batch normalised by itself."""
    seen: dict[int, list[Tensor]] = {
        i: [] for i, m in enumerate(model) if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    for x in parts:
        for i, layer in enumerate(model):
            if i in seen:
                seen[i].append(x.transpose(0, 1).flatten(1).detach())
                x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
            elif isinstance(layer, nn.Dropout):
                x = F.dropout(x, layer.p, training=drop)
            else:
                x = layer(x)
    found = {}
    for i, values in seen.items():
        found[f"{i}.running_mean"], found[f"{i}.running_var"] = (
            torch.cat(values, 1).mean(1),
            torch.cat(values, 1).var(1),
        )
    return found


def everything_of(model: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, modes, hooks and generators."""
    return {
        **{name: p.detach().clone() for name, p in model.state_dict().items()},
        "random": torch.get_rng_state(),
        "modes": torch.tensor([module.training for module in model.modules()]),
        "hooks": torch.tensor([len(module._forward_pre_hooks) for module in model.modules()]),
        "tracks": torch.tensor([getattr(module, "track_running_stats", False) for module in model.modules()]),
        "momentum": torch.tensor([getattr(module, "momentum", 0) for module in model.modules()]),
    }


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5), mode=st.booleans(), shift=st.sampled_from([0.0, 1e3]))
@settings(max_examples=25, deadline=None)
def test_precise_statistics_are_the_pooled_ones(sizes: list[int], mode: bool, shift: float) -> None:
    model = conv_net().train(mode)
    parts = [images(n, seed=i) + shift for i, n in enumerate(sizes)]
    wanted, before = moments_by_hand(model, parts), everything_of(model)
    assert reestimate(model, parts) == ["1", "4", "7"]
    for name, tensor in wanted.items():
        torch.testing.assert_close(model.get_buffer(name), tensor, rtol=1e-7, atol=1e-7)
    after = everything_of(model)
    assert_same_bits(*({n: t for n, t in state.items() if n not in wanted} for state in (before, after)))


def test_torch_averages_what_we_pool() -> None:
    """Two batches whose means differ, and a small last one: torch's figure is not the variance of the data."""
    parts = [torch.randn(50, 3) + 5, torch.randn(50, 3) - 5, torch.randn(2, 3)]
    ours, torchs = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    reestimate(ours, parts)
    torch.optim.swa_utils.update_bn(parts, torchs)
    torch.testing.assert_close(ours[0].running_var, torch.cat(parts).var(0), rtol=1e-5, atol=1e-5)
    assert float(torchs[0].running_var.max()) < 0.2 * float(ours[0].running_var.min())


def test_dropout_is_off_unless_asked_for() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
    parts = [torch.ones(200, 3, dtype=torch.float64) + images(200).view(200, -1)[:, :3] for _ in range(2)]
    reestimate(model, parts)
    still = model[1].running_var.clone()
    torch.testing.assert_close(still, torch.cat(parts).var(0))
    dropped = []
    for seed in (0, 0, 1):
        before = torch.get_rng_state()
        reestimate(model, parts, training=True, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        assert (model[1].running_var > 1.5 * still).all()
        dropped.append(model[1].running_var.clone())
        torch.rand(1)
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[1], dropped[2])


def test_estimates_stay_until_the_weights_change() -> None:
    model, asked = conv_net(), []

    def batches() -> list[Tensor]:
        asked.append(1)
        return [images(6)]

    precise = PreciseStatistics(model, batches)
    before = everything_of(model)
    for version, num in ((0, 1), (0, 1), (1, 2), (1, 2), (None, 3), (None, 4)):
        with precise.put_in(version):
            inside = everything_of(model)
        assert len(asked) == num
        assert not torch.equal(inside["4.running_var"], before["4.running_var"])
        assert_same_bits(before, everything_of(model))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with precise.put_in(2):
        changed = model[1].running_var / inside["1.running_var"]
    torch.testing.assert_close(changed, torch.full((4,), 4.0, dtype=torch.float64))


def test_what_breaks_off_leaves_no_trace() -> None:
    model = conv_net()

    def broken(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        raise KeyError("user code")

    before = everything_of(model)
    with pytest.raises(KeyError):
        reestimate(model, [images(4)], broken)
    assert_same_bits(before, everything_of(model))
    with pytest.raises(KeyError), PreciseStatistics(model, lambda: [images(4)]).put_in(0):
        raise KeyError
    assert_same_bits(before, everything_of(model))


def test_precise_statistics_in_a_pooled_model_of_averaged_weights() -> None:
    """As evaluation does it: averaged weights in, their statistics in, and both out again to the bit."""
    from tests.models import batchnorm_net, make_step, mean_loss, points, run_steps

    step, feed = make_step(batchnorm_net(), mean_loss, points(), **{"train.batch": 16, "regularize.average": 0.9})
    run_steps(step, feed, 3)
    model, parts = step.state.model, [points(9, seed=1)["x"], points(14, seed=2)["x"]]
    precise = PreciseStatistics(model, lambda: parts)
    before = everything_of(model)
    with step.state.averaged():
        averaged = copy.deepcopy(nn.Sequential(*model))
        with precise.put_in(step.state.step):
            for name, wanted in moments_by_hand(averaged, parts).items():
                torch.testing.assert_close(model.get_buffer(name), wanted, rtol=1e-5, atol=1e-6)
    assert_same_bits(before, everything_of(model))


def test_models_without_statistics_and_no_batch() -> None:
    assert reestimate(nn.Linear(2, 2), []) == []
    assert reestimate(nn.BatchNorm1d(2, track_running_stats=False), [torch.ones(2, 2)]) == []
    with pytest.raises(DataError) as err:
        reestimate(conv_net(), [])
    assert "3 layers" in three_parts(err.value)[1]


def test_batches_of_any_form_and_layers_left_out() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].eval()
    x = torch.tensor([[0.0, 4.0], [2.0, 8.0]])
    assert reestimate(model, [(x, "label")]) == ["0"]
    assert model[0].running_mean.tolist() == [1.0, 6.0] and model[1].running_mean.tolist() == [0.0, 0.0]
    assert reestimate(model, [{"x": 2 * x}], lambda model, batch: model[0](input=batch["x"])) == ["0"]
    assert model[0].running_mean.tolist() == [2.0, 12.0]
    precise = PreciseStatistics(model, lambda: [x])
    model.eval()
    assert [*precise.estimate().moments] == ["0"], "it remembers that layer 1 was held in evaluation mode"
    assert reestimate(model, [x], lambda model, batch: model[0](batch)) == ["0", "1"]
    assert model[1].running_mean.tolist() == [0.0, 0.0] and model[1].running_var.tolist() == [1.0, 1.0]


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to, options", [("ghost", {"size": 4}), ("synced", {}), ("frozen", {}), ("torch", {})])
def test_conversion_keeps_all_but_the_class(to: str, options: dict[str, Any]) -> None:
    model = conv_net()
    model(images(5))
    model[4].eval()
    tied = nn.ModuleDict({"body": model, "again": model[1]})
    objects = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model).eval()(images(3))
    changes = convert_batchnorm(tied, to=to, **options)
    assert [c.name for c in changes] == ([] if to == "torch" else ["body.1", "body.4", "body.7"])
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == objects
    assert tied["again"] is model[1] and isinstance(model[1], nn.BatchNorm2d)
    if to != "frozen":
        assert [m.training for m in model.modules()] == modes
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1]) is type(model[1]) and twin[1].weight is not model[1].weight
        assert torch.equal(twin.eval()(images(3)), before)
    assert [(c.before, c.after) for c in convert_batchnorm(tied, to="torch")] == [(c.after, c.before) for c in changes]
    assert type(model[1]) is nn.BatchNorm2d and type(model[7]) is nn.BatchNorm1d


def test_kinds_follow_each_other() -> None:
    model = conv_net()
    told = []
    for to, options in (("ghost", {"size": 4}), ("ghost", {"size": 8}), ("ghost", {"size": 8}), ("synced", {})):
        told.append([c.after for c in convert_batchnorm(model, to=to, **options)][:1])
    assert told == [["GhostBatchNorm2d(size=4)"], ["GhostBatchNorm2d(size=8)"], [], ["SyncedBatchNorm2d"]]
    assert "size" not in vars(model[1])
    assert str(Change("a.b", "X", "Y")) == "a.b: X -> Y"
    with pytest.raises(ValueError, match="4D"):
        model[1](torch.randn(2, 4).double())


def test_a_model_that_is_one_layer_and_torchs_synchronised_ones() -> None:
    layer = nn.BatchNorm3d(2)
    convert_batchnorm(layer, to="ghost", size=2)
    assert isinstance(layer, GhostBatchNorm) and layer(torch.randn(4, 2, 1, 1, 2)).shape == (4, 2, 1, 1, 2)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(conv_net())
    assert convert_batchnorm(model, to="torch") == []
    convert_batchnorm(model, to="synced")
    assert type(model[1]) is SyncedBatchNorm and model(images(3)).shape == (3, 2)
    with pytest.raises(ModelError) as err:
        convert_batchnorm(model, to="torch")
    assert "'1'" in three_parts(err.value)[0]


def test_group_normalization_is_another_function_and_says_so() -> None:
    model = conv_net()
    convert_batchnorm(model, to="ghost", size=4)
    shared, gain = nn.ModuleDict({"body": model, "again": model[1]}), model[1].weight
    changes = convert_batchnorm(shared["body"], to="group", groups=1)
    assert str(changes[0]) == "1: GhostBatchNorm2d(size=4) -> GroupNorm(groups=1; another function)"
    assert isinstance(model[1], nn.GroupNorm) and model[1].weight is gain
    x = model[0](images(3))
    assert torch.equal(model[1](x), F.group_norm(x, 1, gain, model[1].bias))
    assert not [m for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for wrong, groups in ((conv_net(), 4), (conv_net(), 0), (nn.BatchNorm1d(4), 2)):
        before = repr(wrong)
        with pytest.raises(ModelError) as err:
            convert_batchnorm(wrong, to="group", groups=groups)
        three_parts(err.value)
        assert repr(wrong) == before


class WithActivation(nn.BatchNorm2d):
    """As timm has it: more than normalization in one layer."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    "to, options, word",
    [
        ("ghosts", {}, "ghost?"),
        ("ghost", {}, "size=None"),
        ("synced", {"size": 3}, "size=3"),
        ("ghost", {"size": 3, "groups": 2}, "groups=2"),
        ("torch", {"affine": True}, "affine=True"),
        ("group", {}, "groups=None"),
        ("group", {"groups": 2}, "forward pass of its own"),
        ("ghost", {"size": 2}, "forward pass of its own"),
        ("synced", {}, "forward pass of its own"),
    ],
)
def test_what_cannot_be_converted(to: str, options: dict[str, Any], word: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), WithActivation(4))
    with pytest.raises(ModelError) as err:
        convert_batchnorm(model, to=to, **options)
    assert word in " ".join(three_parts(err.value))
    assert [type(m) for m in model] == [nn.BatchNorm2d, WithActivation], "nothing has been changed"


def test_layers_with_more_in_them_are_frozen_whole() -> None:
    model = nn.Sequential(WithActivation(4))
    freeze_batchnorm(model)
    x = torch.randn(2, 4, 3, 3)
    assert isinstance(model[0], FrozenBatchNorm) and isinstance(model.train()[0], WithActivation)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), x.relu() / (1 + 1e-5) ** 0.5)
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ModelError) as err:
        freeze_batchnorm(lazy)
    assert "one batch" in three_parts(err.value)[2]


class Block(nn.Module):
    """As others build residual nets: layers by name, inside blocks, in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def test_a_model_built_by_others() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ModuleDict({"blocks": nn.Sequential(Block(4), Block(4))})["blocks"])
    x = images(6, torch.float32)
    wanted = copy.deepcopy(model)(x)
    changes = convert_batchnorm(model, to="ghost", size=6)
    assert [c.name for c in changes] == ["1.0.bn1", "1.0.bn2", "1.1.bn1", "1.1.bn2"]
    assert torch.equal(model(x), wanted), "one group is the whole batch, and eps is kept"
    convert_batchnorm(model, to="ghost", size=3)
    assert not torch.allclose(model(x), wanted)


# --- precision and batches that cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["torch", "ghost", "synced", "frozen"])
def test_statistics_stay_float32_under_autocast(half: torch.dtype, kind: str) -> None:
    models = []
    for dtype in (half, None):
        model = conv_net(torch.float32)
        convert_batchnorm(model, to=kind, **({"size": 4} if kind == "ghost" else {}))
        pool = PooledStatistics(model, torch.float64)
        pool.begin()
        with torch.autocast("cpu", dtype=dtype or half, enabled=dtype is not None):
            normed = model[:2](images(8, torch.float32))
            model[2:](normed).float().sum().backward()
            pool.collect(last=True)
        pool.end(APPLIED)
        assert normed.dtype == (dtype or torch.float32)
        reestimate(model, [images(8, torch.float32)], lambda m, x: torch.autocast("cpu", dtype=half)(m)(x))
        models.append(model)
    for name, tensor in models[0].state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64), name
        torch.testing.assert_close(tensor, models[1].state_dict()[name], rtol=0.05, atol=0.02)
    assert all(p.grad.dtype == torch.float32 for p in models[0].parameters() if p.grad is not None)


def test_a_micro_batch_of_one_value_a_channel_is_refused() -> None:
    model = conv_net()
    check_batch(model, 2)
    with watch_batch(model, 3) as values:
        model(images(3))
    assert values == {"1": 9.0, "4": 1.0, "7": 1.0}
    check_batch(model, 1, {"1": 9.0})
    for given_values, num in ((None, 3), (values, 2)):
        with pytest.raises(DataError) as err:
            check_batch(model, 1, given_values, "train.batch=5, train.micro_batch=4")
        asked, numbers, _ = three_parts(err.value)
        assert "1 sample," in asked and f"{num} layers, such as" in numbers and "micro_batch=4" in numbers
    with watch_batch(model, 1), pytest.raises(DataError, match="'4'"):
        model(images(1))
    assert not any(m._forward_pre_hooks for m in model.modules())
    freeze_batchnorm(model)
    check_batch(model, 1)
    with watch_batch(model, 1):
        model(images(1))


def test_the_last_group_of_a_ghost_batch_counts_too() -> None:
    model = nn.Sequential(GhostBatchNorm(3, 1), GhostBatchNorm(3, 2))
    with pytest.raises(DataError) as err:
        check_batch(model, 8)
    assert "1 layer, such as '0'" in three_parts(err.value)[1]
    check_batch(model, 8, {"0": 4.0, "1": 1.0})
    check_batch(nn.Linear(2, 2), 1)
