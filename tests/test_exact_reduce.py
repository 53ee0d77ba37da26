"""Sums that are the same bits in any order, and what ``exact_reduce`` refuses."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thalweg
from tests.conftest import three_parts
from tests.models import batchnorm_net, mean_loss, mlp, points
from tests.ranks_cases import BASE, FOUR
from thalweg.core import DeviceError, Recipe, RecipeError, Task
from thalweg.device import Device
from thalweg.engine import resolve
from thalweg.engine.inorder import check_exact
from thalweg.optim.norm import global_norm
from thalweg.regularize.ordered import ordered_norm, ordered_sum

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(numbers, min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_a_norm_hangs_neither_on_the_order_nor_on_the_ranks(values: list[float], random: Any) -> None:
    whole = ordered_norm([torch.tensor(values)])
    exact = math.sqrt(sum(Fraction(v) ** 2 for v in values))
    assert whole.item() == pytest.approx(exact, rel=1e-12)
    mixed = random.sample(values, len(values))
    cut = random.randint(0, len(values))
    parts = [torch.tensor(mixed[:cut]), torch.tensor(mixed[cut:])]
    assert torch.equal(ordered_norm(parts), whole)
    tops = torch.stack([p.abs().amax() if p.numel() else p.new_zeros(()) for p in parts]).amax().double()
    seen: list[torch.Tensor] = []
    for part in parts:  # what each rank adds

        def added(sums: torch.Tensor) -> torch.Tensor:
            seen.append(sums)
            return sums

        ordered_norm([part], len(values), lambda _: tops, added)
    both = ordered_norm(parts[:1], len(values), lambda _: tops, lambda _: seen[0] + seen[1])
    assert torch.equal(both, whole)


def test_a_norm_of_many_numbers_is_right_and_keeps_its_bits() -> None:
    x = torch.randn(700_001, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = ordered_norm([x])
    assert found.item() == pytest.approx(x.double().norm().item(), rel=1e-13)
    assert torch.equal(ordered_norm([x.flip(0)]), found)
    assert torch.equal(ordered_norm(list(x.split(1000))[::-1]), found)
    assert found.item() == pytest.approx(global_norm([x]).item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    assert not torch.isfinite(ordered_norm([torch.tensor([1.0, bad]), torch.ones(3)]))
    assert ordered_norm([torch.zeros(5), torch.zeros(0)]).item() == 0
    assert ordered_norm([torch.tensor([1e-44])]).item() == pytest.approx(1e-44, rel=1e-2)


@given(st.lists(st.tuples(numbers, numbers), max_size=30), st.randoms(use_true_random=False))
def test_a_sum_of_rows_hangs_on_no_order(values: list[tuple[float, float]], random: Any) -> None:
    rows = torch.tensor(values, dtype=torch.float64).reshape(-1, 2)
    found = ordered_sum(rows)
    mixed = torch.tensor(random.sample(values, len(values)), dtype=torch.float64).reshape(-1, 2)
    assert torch.equal(ordered_sum(mixed), found)
    for column in range(2):
        exact = float(sum((Fraction(row[column]) for row in values), Fraction(0)))
        scale = max((abs(row[column]) for row in values), default=0.0)
        assert abs(found[column].item() - exact) <= 1e-20 * scale + 2**-52 * abs(exact)


@pytest.mark.parametrize("micro", [None, 4])
def test_memory_that_runs_out_in_one_micro_batch_is_its_own_trouble(micro: int | None) -> None:
    """Also where memory has taught the size: the micro-batch stays what is added to the total."""
    data = points(50, torch.float64)

    def run(fails_at: int) -> Any:
        calls = []

        def loss(model: Any, batch: Any) -> Any:
            if model.training and torch.is_grad_enabled():
                calls.append(len(batch["x"]))
                if len(calls) == fails_at:
                    raise torch.OutOfMemoryError("CUDA out of memory, says the test")
            return mean_loss(model, batch)

        recipe = {**BASE, **FOUR, "train.micro_batch": micro, "exact_reduce": True}
        return thalweg.train(lambda: mlp().double(), loss, data, recipe)

    plain, failed = run(0), run(12)
    assert [r.loss for r in failed.records] == pytest.approx([r.loss for r in plain.records], rel=1e-12)


def test_what_exact_reduce_refuses() -> None:
    recipe = Recipe().override({"exact_reduce": "true", "optimizer.release_gradients": "one-pass"})
    with pytest.raises(RecipeError) as err:
        resolve(Task(model=mlp, loss=mean_loss, data=points(20)), recipe)
    assert "exact_reduce does not go with optimizer.release_gradients='one-pass'" in three_parts(err.value)[0]
    with pytest.raises(DeviceError) as none:
        check_exact(Recipe(exact_reduce=True), Device(torch.device("mps")))
    assert "not possible on mps" in three_parts(none.value)[0]


def test_the_plan_counts_the_second_buffer() -> None:
    task = Task(model=batchnorm_net, loss=mean_loss, data=points(20))
    ledgers = [
        resolve(task, Recipe().override({"exact_reduce": on, "train.batch": 10, "train.micro_batch": 5}), planning=True)
        for on in ("true", "false")
    ]
    twice, once = (found.plan.ledger.gradients for found in ledgers)  # type: ignore[union-attr]
    assert twice == 2 * once > 0
