"""Cross-entropy, smoothing, soft targets, distillation and R-Drop: held against torch and float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import three_parts
from thalweg.core import DataError, LossError, RecipeError
from thalweg.regularize import checking, cross_entropy, distillation, r_drop, soft_targets
from thalweg.regularize.labels import smoothed

IGNORED = -100
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
SMOOTHINGS = (0.0, 0.1, torch.tensor(0.1, dtype=torch.float64))


def some(num: int = 12, classes: int = 5, ignored: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (num,), generator=generator)
    labels[:ignored] = IGNORED
    return logits.requires_grad_(), labels


def gradient(total: Tensor, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
    return grad


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_mean_and_gradient_are_torchs(smoothing: Any, weighted: bool) -> None:
    logits, labels = some()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64) if weighted else None
    loss = cross_entropy(logits, labels, label_smoothing=smoothing, class_weights=weights)
    wanted = F.cross_entropy(logits, labels, weights, label_smoothing=float(smoothing))
    torch.testing.assert_close(loss.total / loss.weight, wanted, **EXACT)
    torch.testing.assert_close(gradient(loss.total, logits) / loss.weight, gradient(wanted, logits), **EXACT)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_soft_targets_that_are_one_hot_are_the_hard_ones(smoothing: Any, weighted: bool, z_loss: float) -> None:
    logits, labels = some()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64) if weighted else None
    options: dict[str, Any] = {"label_smoothing": smoothing, "class_weights": weights, "z_loss": z_loss}
    hard = cross_entropy(logits, labels, **options)
    soft = cross_entropy(logits, soft_targets(labels, 5, dtype=torch.float64), **options)
    torch.testing.assert_close(soft.total, hard.total, **EXACT)
    torch.testing.assert_close(soft.weight.double(), hard.weight.double(), **EXACT)
    torch.testing.assert_close(gradient(soft.total, logits), gradient(hard.total, logits), **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_are_torchs(smoothing: float) -> None:
    logits, _ = some()
    soft = torch.softmax(torch.randn(12, 5, dtype=torch.float64), -1)
    loss = cross_entropy(logits, soft, label_smoothing=smoothing)
    torch.testing.assert_close(
        loss.total, F.cross_entropy(logits, soft, reduction="sum", label_smoothing=smoothing), **EXACT
    )
    torch.testing.assert_close(loss.weight, torch.tensor(12.0, dtype=torch.float64), **EXACT)


def test_all_ignored_weighs_nothing_where_torch_is_nan() -> None:
    logits, labels = some(ignored=12)
    assert F.cross_entropy(logits, labels).isnan()  # the trap
    every: list[dict[str, Any]] = [
        {},
        {"label_smoothing": 0.1},
        {"label_smoothing": torch.tensor(0.1)},
        {"z_loss": 0.1},
    ]
    for options in every:
        for targets in (labels, soft_targets(labels, 5, dtype=torch.float64)):
            loss = cross_entropy(logits, targets, **options)
            assert loss.total.item() == 0 and loss.weight.item() == 0
            assert torch.equal(gradient(loss.total, logits), torch.zeros_like(logits))


def test_z_loss_is_per_counted_target_in_float32() -> None:
    logits, labels = some()
    extra = cross_entropy(logits, labels, z_loss=0.5).total - cross_entropy(logits, labels).total
    normalizers = torch.logsumexp(logits, -1)[labels != IGNORED]
    torch.testing.assert_close(extra, 0.5 * normalizers.square().sum(), **EXACT)
    half = logits.detach().to(torch.bfloat16)
    ours = cross_entropy(half, labels, z_loss=0.5)
    assert ours.total.dtype == torch.float32
    torch.testing.assert_close(ours.total, cross_entropy(half.float(), labels, z_loss=0.5).total, rtol=0, atol=0)


def test_half_precision_logits_are_summed_wide() -> None:
    logits, labels = torch.zeros(4096, 7, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.int64)
    wanted = 4096 * torch.log(torch.tensor(7.0))
    torch.testing.assert_close(cross_entropy(logits, labels).total, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(cross_entropy(logits, soft_targets(labels, 7)).total, wanted, rtol=1e-6, atol=0)


def test_any_leading_shape_and_narrow_integers() -> None:
    logits, labels = some(12)
    flat = cross_entropy(logits, labels)
    folded = cross_entropy(logits.view(3, 4, 5), labels.view(3, 4).to(torch.int32))
    assert folded.total.item() == flat.total.item() and folded.weight.item() == flat.weight.item() == 9


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.integers(0, 10**6), st.sampled_from([0.0, 0.1]))
def test_any_split_adds_up(sizes: list[int], seed: int, smoothing: float) -> None:
    num = sum(sizes)
    logits, labels = some(max(num, 1), seed=seed)
    logits, labels = logits[:num], labels[:num]
    whole = cross_entropy(logits, labels, label_smoothing=smoothing, z_loss=1e-3)
    parts = [
        cross_entropy(x, y, label_smoothing=smoothing, z_loss=1e-3)
        for x, y in zip(logits.split(sizes), labels.split(sizes), strict=True)
    ]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total, **EXACT)
    assert sum(int(p.weight) for p in parts) == int(whole.weight)


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_smoothing_and_mixing_can_change_places(seed: int, smoothing: float, share: float) -> None:
    _, labels = some(seed=seed)
    soft = soft_targets(labels, 5, dtype=torch.float64)
    mixed_then = smoothed(share * soft + (1 - share) * soft.flip(0), smoothing)
    smooth = soft_targets(labels, 5, smoothing, dtype=torch.float64)
    torch.testing.assert_close(mixed_then, share * smooth + (1 - share) * smooth.flip(0), **EXACT)


def test_soft_targets_by_formula() -> None:
    soft = soft_targets(torch.tensor([[1, IGNORED]]), 4, 0.2, dtype=torch.float64)
    wanted = torch.tensor([[[0.05, 0.85, 0.05, 0.05], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(soft, wanted, **EXACT)


def test_smoothed_twice_is_found_while_checking_only() -> None:
    logits, labels = some(ignored=0)
    smooth = soft_targets(labels, 5, 0.1, dtype=torch.float64)
    cross_entropy(logits, smooth, label_smoothing=0.1)  # a step reads no values
    for given_ in (0.1, torch.tensor(0.1)):
        with checking(), pytest.raises(LossError, match="smoothed twice") as caught:
            cross_entropy(logits, smooth, label_smoothing=given_)
        assert "0.02" in three_parts(caught.value)[1]
    with checking():
        cross_entropy(logits, smooth)  # once is right
        cross_entropy(logits, labels, label_smoothing=0.1)
        mixed = 0.3 * soft_targets(labels, 5) + 0.7 * soft_targets(labels.roll(1), 5)
        cross_entropy(logits, mixed, label_smoothing=0.1)  # mixed targets have zeros
        two = torch.tensor([[0.3, 0.7]])
        cross_entropy(torch.zeros(1, 2), two, label_smoothing=0.1)  # mixed or smoothed: cannot be told


def test_checks_end_with_their_block() -> None:
    bad = torch.tensor([[0.5, -0.5, 1.0]])
    with checking(), pytest.raises(LossError, match="no distributions") as caught:
        cross_entropy(torch.zeros(1, 3), bad)
    assert "-0.5" in three_parts(caught.value)[1]
    cross_entropy(torch.zeros(1, 3), bad)


@pytest.mark.parametrize("wrong", [3, -1])
def test_labels_out_of_range(wrong: int) -> None:
    """The CPU finds them at once; elsewhere ('meta' stands for it) nothing is read except while checking."""
    labels = torch.tensor([0, wrong, IGNORED])
    with pytest.raises(DataError, match="out of range") as caught:
        soft_targets(labels, 3)
    assert "1 of 3" in three_parts(caught.value)[1]
    with checking(), pytest.raises(DataError, match="out of range"):
        cross_entropy(torch.zeros(3, 3), labels)
    assert soft_targets(labels.to("meta"), 3).shape == (3, 3)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_smoothing_out_of_range(smoothing: float) -> None:
    logits, labels = some()
    for call in (
        lambda: cross_entropy(logits, labels, label_smoothing=smoothing),
        lambda: soft_targets(labels, 5, smoothing),
    ):
        with pytest.raises(RecipeError, match="label_smoothing") as caught:
            call()
        three_parts(caught.value)


@pytest.mark.parametrize(
    "logits, targets",
    [
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 4), torch.zeros(3, 5)),
        (torch.zeros(3, 4), torch.zeros(3)),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool)),
    ],
)
def test_shapes_that_do_not_belong_together(logits: Tensor, targets: Tensor) -> None:
    with pytest.raises((LossError, DataError)) as caught:
        cross_entropy(logits, targets)
    three_parts(caught.value)


def test_bad_strengths() -> None:
    logits, labels = some()
    calls = [
        lambda: cross_entropy(logits, labels, z_loss=-1.0),
        lambda: distillation(logits, logits, labels, temperature=0.0),
        lambda: distillation(logits, logits, labels, alpha=1.5),
        lambda: distillation(logits, logits[:, :3], labels),
        lambda: r_drop(lambda: logits, labels, alpha=-1.0),
    ]
    for call in calls:
        with pytest.raises(LossError) as caught:
            call()
        three_parts(caught.value)
    with pytest.raises(RecipeError, match="num_classes=1"):
        soft_targets(labels, 1)


def test_distillation_by_formula() -> None:
    logits, labels = some()
    teacher = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    t, alpha, eps = 3.0, 0.7, 0.1
    loss = distillation(logits, teacher, labels, temperature=t, alpha=alpha, label_smoothing=eps)
    p, q = torch.softmax(teacher.detach() / t, -1), torch.log_softmax(logits / t, -1)
    apart = (p * (p.log() - q)).sum(-1)[labels != IGNORED].sum()
    hard = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=eps)
    wanted = alpha * t**2 * apart + (1 - alpha) * hard
    torch.testing.assert_close(loss.total, wanted, **EXACT)
    torch.testing.assert_close(gradient(loss.total, logits), gradient(wanted, logits), **EXACT)
    assert loss.weight.item() == 9
    assert torch.autograd.grad(loss.total, teacher, allow_unused=True) == (None,)


def test_distillation_keeps_its_size_at_any_temperature_and_number_of_classes() -> None:
    """T**2, and a sum over classes: at high temperature the gradient tends to (logits - teacher) / classes, whatever T."""
    logits = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher, label = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    for t in (100.0, 1000.0):
        grad = gradient(distillation(logits, teacher, label, temperature=t, alpha=1.0).total, logits)
        torch.testing.assert_close(grad, logits.detach() / 3, rtol=0, atol=3e-3)


def test_distillation_with_mixed_targets_weighs_them_alike() -> None:
    logits, labels = some()
    soft = soft_targets(labels, 5, dtype=torch.float64)
    ours, wanted = distillation(logits, logits * 2, soft), distillation(logits, logits * 2, labels)
    torch.testing.assert_close(ours.total, wanted.total, **EXACT)


def test_r_drop_by_formula_with_the_weight_counted_once() -> None:
    one, labels = some()
    two, _ = some(seed=1)
    passes = iter((one, two))
    loss = r_drop(lambda: next(passes), labels, alpha=4.0, label_smoothing=0.1)
    counted = labels != IGNORED
    p, q = torch.softmax(one, -1), torch.softmax(two, -1)
    apart = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))[counted].sum() / 2
    hard = [F.cross_entropy(x, labels, reduction="sum", label_smoothing=0.1) for x in (one, two)]
    torch.testing.assert_close(loss.total, (hard[0] + hard[1]) / 2 + 4.0 * apart, rtol=1e-10, atol=1e-10)
    assert loss.weight.item() == 9
    assert gradient(loss.total, one).abs().sum() > 0 and gradient(loss.total, two).abs().sum() > 0


def test_r_drop_passes_draw_other_masks_and_evaluation_draws_none() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
    x, y = torch.randn(16, 8), torch.arange(16) % 3
    forward = lambda: model(x)
    assert r_drop(forward, y, alpha=5.0).total > r_drop(forward, y, alpha=0.0).total + 0.1
    model.eval()
    plain = r_drop(forward, y, alpha=5.0, training=False, label_smoothing=0.1)
    torch.testing.assert_close(plain.total, F.cross_entropy(model(x), y, reduction="sum"))


def test_compiles_in_one_graph() -> None:
    """A switch for checks must not break a compiled loss in two."""
    compiled = torch.compile(lambda x, y: cross_entropy(x, y, label_smoothing=0.1), backend="eager", fullgraph=True)
    logits, labels = some()
    torch.testing.assert_close(compiled(logits, labels).total, cross_entropy(logits, labels, label_smoothing=0.1).total)
    soft = soft_targets(labels, 5, dtype=torch.float64)
    assert compiled(logits, soft).total.isfinite()
