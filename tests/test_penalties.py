"""Penalties: values and gradients in float64, and the same weight in a step whatever it is split into."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import three_parts
from thalweg.core import Loss, LossError, ModelError, RecipeError
from thalweg.regularize import PENALTIES, cross_entropy, penalised
from thalweg.regularize.penalties import l1, orthogonal, spectral

IGNORED = -100
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
#: A strength for each registered penalty, so that all of them pass the tests below.
STRENGTHS = dict.fromkeys(PENALTIES, 0.01)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def batch_of(num: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num)
    labels = torch.randint(0, 3, (num,), generator=generator)
    return {"x": torch.randn(num, 1, 4, 4, generator=generator, dtype=torch.float64), "y": labels}


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    return cross_entropy(model(batch["x"]), batch["y"])


def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def gradient_of_step(model: nn.Module, loss: Any, parts: list[dict[str, Tensor]]) -> list[Tensor]:
    """As the engine takes it: sum(total) / sum(weight)."""
    values = [(loss(model, part), len(part["y"])) for part in parts]
    pairs = [value if isinstance(value, tuple) else (value * num, num) for value, num in values]
    whole = sum(total for total, _ in pairs) / sum(weight for _, weight in pairs)
    return list(torch.autograd.grad(whole, list(model.parameters())))


def cut(batch: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    return [
        dict(zip(batch, parts, strict=True)) for parts in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]


@pytest.mark.parametrize("loss", [summed, mean])
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [6, 6], [7, 4, 1]])
def test_the_step_is_mean_plus_penalty_whatever_the_split(loss: Any, sizes: list[int]) -> None:
    model, batch = small(), batch_of(12)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    value = mean(model, batch) + sum(0.01 * PENALTIES[name](weights) for name in STRENGTHS)
    wanted = torch.autograd.grad(value, list(model.parameters()))
    found = gradient_of_step(model, penalised(loss, STRENGTHS), cut(batch, sizes))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sets(st.integers(0, 11)))
@settings(max_examples=20, deadline=None)
def test_ignored_targets_change_the_weight_of_no_penalty(sizes: list[int], ignored: set[int]) -> None:
    """Ragged weights, and micro-batches that weigh 0: torch's own mean would be NaN there."""
    model, batch = small(), batch_of(sum(sizes))
    batch["y"][[i for i in ignored if i < len(batch["y"])]] = IGNORED
    batch["y"][0] = 1  # something counts
    loss = penalised(summed, STRENGTHS)
    whole = gradient_of_step(model, loss, [batch])
    for a, b in zip(gradient_of_step(model, loss, cut(batch, sizes)), whole, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_micro_batch_of_weight_0_adds_nothing() -> None:
    model, batch = small(), batch_of(4)
    batch["y"][:] = IGNORED
    loss = penalised(summed, STRENGTHS)(model, batch)
    assert loss.total.item() == 0 and loss.weight.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss.total, list(model.parameters())))


def test_a_naive_penalty_depends_on_the_split() -> None:
    """The trap: added once to each total, it counts once a micro-batch."""
    model, batch = small(), batch_of(12)

    def naive(model: nn.Module, part: dict[str, Tensor]) -> Loss:
        loss = summed(model, part)
        return Loss(loss.total + 0.01 * l1([p for p in model.parameters() if p.ndim >= 2]), loss.weight)

    one, many = (gradient_of_step(model, naive, cut(batch, sizes))[0] for sizes in ([12], [1] * 12))
    assert not torch.allclose(one, many, rtol=1e-3)


def test_evaluation_is_the_loss_alone() -> None:
    model, batch = small(), batch_of(5)
    plain, loss = summed(model, batch), penalised(summed, STRENGTHS)
    assert loss(model, batch).total > plain.total
    model.eval()
    assert loss(model, batch).total.item() == plain.total.item()


def test_options_and_name_are_the_losss_own() -> None:
    def own(model: nn.Module, batch: Any, smoothing: float = 0.0) -> Loss:
        return cross_entropy(model(batch["x"]), batch["y"], label_smoothing=smoothing)

    model, batch = small(), batch_of(5)
    wrapped = penalised(own, {"l1": 0.0})
    assert wrapped.__name__ == "own"
    torch.testing.assert_close(wrapped(model, batch, smoothing=0.3).total, own(model, batch, 0.3).total)


def test_scheduled_strengths_are_read_at_each_call() -> None:
    model, batch = small(), batch_of(5)
    strength = torch.tensor(0.0, dtype=torch.float64)
    loss = penalised(summed, {"l1": strength})
    first = loss(model, batch).total.item()
    strength.fill_(0.5)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    torch.testing.assert_close(loss(model, batch).total.item() - first, (5 * 0.5 * l1(weights)).item())


def test_only_matrices_unless_named_and_never_fewer_dimensions() -> None:
    model, batch = small(), batch_of(5)
    every = torch.autograd.grad(penalised(summed, {"l1": 1.0})(model, batch).total, list(model.parameters()))
    plain = torch.autograd.grad(summed(model, batch).total, list(model.parameters()))
    for (_, p), a, b in zip(model.named_parameters(), every, plain, strict=True):
        torch.testing.assert_close(a, b + (5 * p.sign() if p.ndim >= 2 else 0), **EXACT)
    some = torch.autograd.grad(
        penalised(summed, {"l1": 1.0}, only=["4.*"])(model, batch).total, list(model.parameters())
    )
    changed = [
        name for (name, _), a, b in zip(model.named_parameters(), some, plain, strict=True) if not torch.equal(a, b)
    ]
    assert changed == ["4.weight"]
    for p in model[4].parameters():
        p.requires_grad_(False)
    with pytest.raises(ModelError, match="No parameter matches") as caught:
        penalised(summed, {"l1": 1.0}, only=["4.*"])(model, batch)
    three_parts(caught.value)


def test_names_are_read_without_the_compilers_prefix() -> None:
    model, batch = small(), batch_of(5)
    compiled = torch.compile(model, backend="eager")
    loss = penalised(lambda model, batch: summed(small(), batch), {"l1": 1.0}, only=["4.weight"])
    torch.testing.assert_close(loss(compiled, batch).total, loss(model, batch).total)


# --- what each penalty is --------------------------------------------------------------------------------------------


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def test_l1_is_torchs_norm() -> None:
    w = matrix(4, 3)
    w[0, 0] = 0
    w.requires_grad_()
    value = l1([w, w])
    torch.testing.assert_close(value, 2 * torch.linalg.vector_norm(w, 1), **EXACT)
    (grad,) = torch.autograd.grad(value, w)
    assert torch.equal(grad, 2 * w.detach().sign())


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)])
def test_orthogonal_by_formula(shape: tuple[int, int]) -> None:
    w = matrix(*shape).requires_grad_()
    value = orthogonal([w])
    sigma = torch.linalg.svdvals(w)
    torch.testing.assert_close(value, (sigma.square() - 1).square().sum(), rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(value, w)
    gram = w @ w.T - torch.eye(shape[0], dtype=torch.float64) if shape[0] <= shape[1] else None
    wanted = 4 * gram @ w if gram is not None else 4 * w @ (w.T @ w - torch.eye(shape[1], dtype=torch.float64))
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)


def test_orthogonal_is_0_for_orthonormal_rows_or_columns_and_reads_kernels_as_matrices() -> None:
    q = torch.linalg.qr(matrix(6, 4))[0]
    assert orthogonal([q, q.T.contiguous()]).item() < 1e-25
    kernel = matrix(4, 18).view(4, 2, 3, 3)
    torch.testing.assert_close(orthogonal([kernel]), orthogonal([kernel.view(4, 18)]), **EXACT)


def with_values(rows: int, columns: int, values: list[float]) -> Tensor:
    u, v = torch.linalg.qr(matrix(rows, len(values), 1))[0], torch.linalg.qr(matrix(columns, len(values), 2))[0]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize(
    "w",
    [
        matrix(5, 8),
        matrix(64, 8),
        matrix(1, 6),
        with_values(40, 60, [3.0, 1.5, *[1.0] * 30]),
        with_values(9, 9, [2.0, 1.9]),
    ],
    ids=["flat", "tall", "one row", "with a gap", "low rank"],
)
def test_spectral_value_and_gradient_are_the_singular_values(w: Tensor) -> None:
    w = w.clone().requires_grad_()
    value = spectral([w])
    u, s, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    torch.testing.assert_close(value, s[0].square(), rtol=1e-9, atol=0)
    (grad,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(grad, 2 * s[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 110), st.integers(1, 110), st.integers(0, 10**6))
def test_spectral_without_a_gap_is_never_above_and_hardly_below(rows: int, columns: int, seed: int) -> None:
    w = matrix(rows, columns, seed)
    true = torch.linalg.svdvals(w)[0].square()
    assert true * (1 - 1e-6) < spectral([w]) <= true * (1 + 1e-9)


def test_spectral_where_values_are_equal_zero_or_not_finite() -> None:
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(spectral([eye]).item(), 1.0)
    zero = torch.zeros(12, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(spectral([zero]), zero)
    assert spectral([zero]).item() == 0 and not grad.any()
    assert not spectral([torch.full((12, 12), math.nan)]).isfinite()  # a skipped step, and no exception
    for tiny in (1e-12, 1e12):
        torch.testing.assert_close(spectral([tiny * eye.float()]).item(), tiny**2, rtol=1e-5, atol=0)


def test_spectral_carries_nothing_and_draws_nothing() -> None:
    w = matrix(30, 30)
    before = torch.get_rng_state()
    first = spectral([w])
    spectral([matrix(30, 30, 5)])
    assert torch.equal(first, spectral([w])) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", STRENGTHS)
def test_low_precision_and_autocast_are_computed_wide(name: str) -> None:
    model = nn.Linear(40, 30)
    loss = penalised(lambda m, b: Loss(m(b).float().sum() * 0, 1), {name: 1.0})
    wanted = loss(model, torch.zeros(2, 40)).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(model, torch.zeros(2, 40)).total, wanted, rtol=0, atol=0)
    half = nn.Linear(40, 30).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    value = PENALTIES[name]([half.weight])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, PENALTIES[name]([half.weight.float()]), rtol=0, atol=0)


@pytest.mark.parametrize("name", STRENGTHS)
def test_descent_makes_it_smaller(name: str) -> None:
    w = matrix(10, 12).requires_grad_()
    first = PENALTIES[name]([w])
    (grad,) = torch.autograd.grad(first, w)
    assert PENALTIES[name]([w.detach() - 1e-4 * grad]) < first


@pytest.mark.parametrize("strength", [-1.0, math.inf, math.nan])
def test_bad_strengths(strength: float) -> None:
    with pytest.raises(RecipeError) as caught:
        penalised(summed, {"l1": strength})
    three_parts(caught.value)


def test_other_bad_input() -> None:
    with pytest.raises(RecipeError, match="orthogonl") as caught:
        penalised(summed, {"orthogonl": 1.0})
    assert "Did you mean orthogonal" in three_parts(caught.value)[2]
    with pytest.raises(LossError) as caught_shape:
        penalised(summed, {"l1": torch.zeros(2)})
    three_parts(caught_shape.value)
    with pytest.raises(ModelError) as caught_model:
        penalised(lambda model, batch: Loss(torch.zeros(()), 1), {"l1": 1.0})(nn.LayerNorm(3), None)
    three_parts(caught_model.value)
