"""Batch normalization: running statistics pooled over the micro-batches of a step, once a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models import assert_same_bits, make_step, mean_loss, run_steps, state_bits
from thalweg.regularize import PooledStatistics


def net(momentum: float | None = 0.1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    bn = lambda n: nn.BatchNorm1d(n, momentum=momentum)
    return nn.Sequential(nn.Linear(6, 5), bn(5), nn.ReLU(), nn.Linear(5, 4), bn(4), nn.Linear(4, 3)).to(dtype)


def pooled_by_hand(model: nn.Sequential, parts: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and unbiased variance of all inputs of each layer, each micro-batch normalised by itself: plain torch alone."""
    model = copy.deepcopy(model).train()
    seen: dict[int, list[torch.Tensor]] = {i: [] for i, m in enumerate(model) if isinstance(m, nn.BatchNorm1d)}
    for x in parts:
        for i, layer in enumerate(model):
            if i in seen:
                seen[i].append(x)
                x = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
            else:
                x = layer(x)
    return [(torch.cat(xs).mean(0).detach(), torch.cat(xs).var(0, unbiased=True).detach()) for xs in seen.values()]


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6), shift=st.sampled_from([0.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_running_statistics_are_the_pooled_ones(sizes: list[int], shift: float) -> None:
    model = net()
    parts = [torch.randn(n, 6, dtype=torch.float64) + shift for n in sizes]
    wanted = pooled_by_hand(model, parts)
    pool = PooledStatistics(model, torch.float64)
    model.train()
    pool.begin()
    for place, part in enumerate(parts):
        model(part)
        pool.collect(last=place == len(parts) - 1)
    pool.end(torch.tensor(True))
    for layer, (mean, var) in zip((model[1], model[4]), wanted):
        torch.testing.assert_close(layer.running_mean, 0.1 * mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var, rtol=1e-7, atol=1e-7)
        assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_effective_momentum_does_not_hang_on_the_split(precision: str) -> None:
    """A constant input: after one step the running mean has moved by the momentum, whatever the number of parts."""
    moved = []
    for micro in (32, 8, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        data = {"x": torch.randn(32, 6), "y": torch.zeros(32, dtype=torch.int64)}
        step, feed = make_step(
            model, mean_loss, data, **{"train.batch": 32, "train.micro_batch": micro, "precision": precision}
        )
        run_steps(step, feed, 1)
        moved.append(model[1].running_mean.clone())
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-5, atol=1e-6)


def test_plain_torch_and_one_micro_batch_agree() -> None:
    model = net(dtype=torch.float32)
    twin, x = copy.deepcopy(model).train(), torch.randn(16, 6)
    twin(x)
    pool = PooledStatistics(model, torch.float64)
    model.train()
    pool.begin()
    model(x)
    pool.collect(last=True)
    pool.end(torch.tensor(True))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-6, atol=1e-7)


def test_layers_without_momentum_keep_the_plain_mean() -> None:
    model = net(momentum=None)
    pool = PooledStatistics(model, torch.float64)
    model.train()
    batches = [torch.randn(8, 6, dtype=torch.float64) for _ in range(3)]
    wanted = torch.stack([pooled_by_hand(model, [b])[0][0] for b in batches]).mean(0)
    for batch in batches:
        pool.begin()
        model(batch)
        pool.collect(last=True)
        pool.end(torch.tensor(True))
    torch.testing.assert_close(model[1].running_mean, wanted, rtol=1e-10, atol=1e-12)
    assert model[1].momentum is None


def test_a_layer_used_twice_pools_both_uses() -> None:
    bn = nn.BatchNorm1d(4).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = bn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(x) + self.bn(3 * x)

    model = Twice().train()
    pool = PooledStatistics(model, torch.float64)
    parts = [torch.randn(n, 4, dtype=torch.float64) for n in (5, 7)]
    pool.begin()
    for place, part in enumerate(parts):
        model(part)
        pool.collect(last=place == 1)
    pool.end(torch.tensor(True))
    everything = torch.cat([torch.cat([x, 3 * x]) for x in parts])
    torch.testing.assert_close(bn.running_mean, 0.1 * everything.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * everything.var(0), rtol=1e-10, atol=1e-12)
    pool.begin()
    model(parts[0])
    pool.collect(last=True)
    pool.end(torch.tensor(True))
    both = torch.cat([parts[0], 3 * parts[0]])
    torch.testing.assert_close(bn.running_mean, 0.09 * everything.mean(0) + 0.1 * both.mean(0), rtol=1e-10, atol=1e-12)


def test_frozen_layers_stay_as_they_are() -> None:
    model = net(dtype=torch.float32)
    model.train()
    model[4].eval()
    pool = PooledStatistics(model, torch.float64)
    frozen = {name: t.clone() for name, t in model[4].named_buffers()}
    for parts in ([8], [4, 4]):
        pool.begin()
        for place, n in enumerate(parts):
            model(torch.randn(n, 6) + 2)
            pool.collect(last=place == len(parts) - 1)
        pool.end(torch.tensor(True))
    assert all(torch.equal(t, frozen[name]) for name, t in model[4].named_buffers())
    assert not torch.equal(model[1].running_mean, torch.zeros(5)) and int(model[1].num_batches_tracked) == 2


def test_a_step_that_breaks_off_gives_the_statistics_back() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        value = mean_loss(model, batch)
        if broken:
            raise KeyError("user code")
        return value

    broken = False
    data = {"x": torch.randn(16, 6), "y": torch.zeros(16, dtype=torch.int64)}
    step, feed = make_step(net(dtype=torch.float32), loss, data, **{"train.batch": 8, "train.micro_batch": 4})
    run_steps(step, feed, 2)
    before, broken = state_bits(step), True
    with pytest.raises(KeyError):
        run_steps(step, feed, 1)
    step.state.statistics.restore()
    assert_same_bits(state_bits(step), before)
    broken = False
    run_steps(step, feed, 1)
    assert step.state.model[1].momentum == 0.1


def test_averaged_weights_have_averaged_statistics() -> None:
    data = {"x": torch.randn(32, 6), "y": torch.zeros(32, dtype=torch.int64)}
    step, feed = make_step(net(dtype=torch.float32), mean_loss, data, **{"train.batch": 8, "regularize.average": 0.5})
    bn, wanted = step.state.model[1], step.state.model[1].running_mean.clone()
    for t in range(1, 5):
        run_steps(step, feed, 1)
        wanted = wanted + (1 - min(0.5, (1 + t) / (10 + t))) * (bn.running_mean - wanted)
    with step.state.averaged():
        torch.testing.assert_close(bn.running_mean, wanted, rtol=1e-5, atol=1e-6)
        assert int(bn.num_batches_tracked) == 4
