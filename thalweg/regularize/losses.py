"""Losses that say what they cover, so that their gradients can be put together exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.core import Loss, LossError
from thalweg.regularize.labels import check_indices, check_smoothing, checks


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
    class_weights: Tensor | None = None,
    z_loss: float | Tensor = 0.0,
) -> Loss:
    """Sum of cross-entropies and the number of targets that count; an all-ignored batch weighs 0 and is no NaN.

    Each target costs ``-sum_c q_c log p_c + z_loss * logsumexp(logits)**2`` where ``q`` is its smoothed distribution. Sums
    are taken in float32 at least.

    Args:
        logits: (..., num_classes), float.
        targets: (...), integers in [0, num_classes) or ``ignore_index``; or soft: (..., num_classes), float, rows that sum
            to 1, or to less where a mixed sample was in part ignored.
        label_smoothing: share of the target mass that is spread over all classes, in [0, 1]
            (Szegedy et al. 2015, arXiv:1512.00567); a 0-dim tensor is scheduled and never read back. Pass 0 when evaluating.
        class_weights: (num_classes,); each target counts as its class does. They weigh the smoothing term too, as in torch.
        z_loss: strength of the penalty that keeps the logits' normalizer near 1, 0 or more; 1e-4 is common
            (PaLM, arXiv:2204.02311; ST-MoE, arXiv:2202.08906). A 0-dim tensor is scheduled.

    Returns:
        Loss(total, weight): in nats, and in targets: their number, or their mass in soft rows, times their class weights.

    Raises:
        LossError: for shapes that do not belong together or a negative ``z_loss``. Inside ``checking()`` also for soft
            targets that are no distributions, and for smoothing of targets that were smoothed before: with 3 classes or
            more, soft targets without a single 0 are smooth already (one-hot and mixed targets have zeros).
        RecipeError: for ``label_smoothing`` outside [0, 1].

    Departures: torch divides weighted soft targets by their number; here they weigh as the same targets given as indices.

    >>> loss = cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, -100]))
    >>> round(float(loss.total), 4), int(loss.weight)
    (2.7726, 2)
    """
    check_smoothing(label_smoothing)
    _check_z(z_loss)
    soft = _is_soft(logits, targets)
    if not soft:
        check_indices(targets, logits.shape[-1], ignore_index)
    flat = _wide(logits.reshape(-1, logits.shape[-1]))
    if soft:
        total, weights = _soft(flat, targets.reshape(flat.shape).to(flat.dtype), label_smoothing, class_weights)
        weight = weights.sum()
    else:
        wanted = targets.reshape(-1).to(torch.int64)
        total = _hard(flat, wanted, label_smoothing, ignore_index, class_weights)
        counted = wanted != ignore_index
        weights = counted if class_weights is None else _of_classes(class_weights, wanted, counted)
        weight = weights.sum()
    if isinstance(z_loss, Tensor) or z_loss:
        total = total + z_loss * (torch.where(weights != 0, torch.logsumexp(flat, -1), 0.0).square() * weights).sum()
    return Loss(total, weight)


def accuracy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Loss:
    """How many predictions are right, and how many count, for a task's metrics.

    Args:
        logits: (..., num_classes), float.
        targets: (...), integers; or (..., num_classes), float, of which the largest is the class: of mixed samples, the one
            that gave more. Rows of zeros and ``ignore_index`` do not count.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    >>> [int(x) for x in accuracy(logits, torch.tensor([0, 0, -100]))]
    [1, 2]
    >>> [int(x) for x in accuracy(logits, torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.0, 0.0]]))]
    [2, 2]
    """
    if _is_soft(logits, targets):
        wanted, counted = targets.argmax(-1), targets.sum(-1) > 0
    else:
        wanted, counted = targets, targets != ignore_index
    return Loss(((logits.argmax(-1) == wanted) & counted).sum(), counted.sum())


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float | Tensor = 0.5,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
) -> Loss:
    """Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531).

    ``alpha * T**2 * KL(softmax(teacher / T) || softmax(logits / T)) + (1 - alpha) * cross_entropy``, summed over the targets
    that count. ``T**2`` keeps the gradient of the first part at its size for any temperature. The sum over classes is a
    sum (torch's ``reduction="mean"`` divides by their number too). Smoothing acts on the second part alone.

    Args:
        logits, teacher_logits: (..., num_classes); no gradient flows into the teacher's.
        targets: as in ``cross_entropy``.
        temperature: above 0.
        alpha: share of the teacher, in [0, 1]; a 0-dim tensor is scheduled.

    Raises:
        LossError: for shapes that do not belong together, a temperature of 0 or less, ``alpha`` outside [0, 1].

    >>> logits, label = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> float(distillation(logits, logits, label, alpha=1.0).total)
    0.0
    """
    if temperature <= 0 or (not isinstance(alpha, Tensor) and not 0 <= alpha <= 1):
        raise LossError(
            "This is no distillation.",
            f"temperature={temperature}, alpha={alpha}.",
            "Give a temperature above 0 (2 is common) and alpha in [0, 1].",
        )
    if teacher_logits.shape != logits.shape:
        raise LossError(
            "Teacher and student do not have the same outputs.",
            f"Logits {tuple(logits.shape)}, the teacher's {tuple(teacher_logits.shape)}.",
            "Give both the same inputs, and the same classes.",
        )
    hard = cross_entropy(logits, targets, label_smoothing=label_smoothing, ignore_index=ignore_index)
    student = F.log_softmax(_wide(logits) / temperature, -1)
    teacher = F.log_softmax(_wide(teacher_logits.detach()) / temperature, -1)
    apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    apart = _over(apart, logits, targets, ignore_index)
    return Loss(alpha * temperature**2 * apart + (1 - alpha) * hard.total, hard.weight)


def r_drop(
    forward: Callable[[], Tensor],
    targets: Tensor,
    *,
    alpha: float | Tensor,
    training: bool = True,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
) -> Loss:
    """R-Drop (Liang et al. 2021, arXiv:2106.14448): two passes with other dropout masks should agree.

    ``(ce_1 + ce_2) / 2 + alpha * (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2``, summed over the targets that count. Each target
    weighs 1, though it is seen twice: rates, token counts and averages stay as they are.

    Args:
        forward: gives logits (..., num_classes), each time it is called with fresh masks: ``lambda: model(batch["x"])``.
        targets: as in ``cross_entropy``.
        alpha: strength, 0 or more; the paper uses 1 to 5. A 0-dim tensor is scheduled.
        training: ``model.training``. Otherwise one pass, and plain ``cross_entropy`` without smoothing.

    Cost: two forward and two backward passes. Batch-normalization layers see the batch twice.
    Departures: the mean of the two cross-entropies, as in the authors' code; the paper's formula has their sum.

    Raises:
        LossError: for a negative ``alpha``.

    >>> same = torch.tensor([[0.0, 0.0]])
    >>> loss = r_drop(lambda: same, torch.tensor([1]), alpha=5.0)
    >>> round(float(loss.total), 4), int(loss.weight)
    (0.6931, 1)
    """
    if not isinstance(alpha, Tensor) and alpha < 0:
        raise LossError("R-Drop would drive the passes apart.", f"alpha={alpha}.", "Give 0 or more; 1 to 5 is common.")
    if not training:
        return cross_entropy(forward(), targets, ignore_index=ignore_index)
    one, two = forward(), forward()
    kept = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    first, second = (cross_entropy(logits, targets, **kept) for logits in (one, two))  # type: ignore[arg-type]
    p, q = F.log_softmax(_wide(one), -1), F.log_softmax(_wide(two), -1)
    apart = ((p.exp() - q.exp()) * (p - q)).sum(-1)  # the sum of both divergences
    apart = _over(apart, one, targets, ignore_index)
    return Loss((first.total + second.total) / 2 + alpha * apart / 2, first.weight)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _hard(
    flat: Tensor, wanted: Tensor, smoothing: float | Tensor, ignore_index: int, class_weights: Tensor | None
) -> Tensor:
    """Torch's own loss; where the smoothing is a tensor, the same from its two parts."""
    if not isinstance(smoothing, Tensor):
        return F.cross_entropy(
            flat, wanted, class_weights, ignore_index=ignore_index, reduction="sum", label_smoothing=smoothing
        )
    log_p = F.log_softmax(flat, -1)
    plain = F.nll_loss(log_p, wanted, class_weights, ignore_index=ignore_index, reduction="sum")
    everywhere = log_p.sum(-1) if class_weights is None else log_p @ class_weights.to(log_p.dtype)
    everywhere = torch.where(wanted != ignore_index, everywhere, 0.0).sum()
    return (1 - smoothing) * plain - smoothing / flat.shape[-1] * everywhere


def _soft(flat: Tensor, soft: Tensor, smoothing: float | Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(total, weight of each row). Rows keep their mass: of a row of zeros nothing is smoothed."""
    log_p = F.log_softmax(flat, -1)
    if class_weights is not None:
        log_p = log_p * class_weights.to(log_p.dtype)
    mass = soft.sum(-1)
    total = -(soft * log_p).sum()
    if isinstance(smoothing, Tensor) or smoothing:
        _check_not_smooth(soft, smoothing)
        total = (1 - smoothing) * total - smoothing / flat.shape[-1] * (mass * log_p.sum(-1)).sum()
    return total, mass if class_weights is None else soft @ class_weights.to(soft.dtype)


def _of_classes(class_weights: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, class_weights[torch.where(counted, wanted, 0)], 0.0)


def _over(values: Tensor, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The sum of a value a target, over those that count."""
    if _is_soft(logits, targets):
        return (values * targets.sum(-1)).sum()
    return torch.where(targets != ignore_index, values, 0.0).sum()


def _is_soft(logits: Tensor, targets: Tensor) -> bool:
    num_classes, soft = logits.shape[-1], targets.is_floating_point()
    if not logits.is_floating_point() or targets.shape != (logits.shape if soft else logits.shape[:-1]):
        raise LossError(
            "Logits and targets do not belong together.",
            f"Logits {tuple(logits.shape)} of {logits.dtype}, targets {tuple(targets.shape)} of {targets.dtype}.",
            f"Give logits (..., {num_classes}) of floats, and targets (...) of integers or (..., {num_classes}) of floats.",
        )
    if soft and checks():
        _check_distributions(targets)
    return soft


def _check_z(z_loss: float | Tensor) -> None:
    if not isinstance(z_loss, Tensor) and not z_loss >= 0:
        raise LossError("z_loss would drive the logits up.", f"z_loss={z_loss}.", "Give 0 or more; 1e-4 is common.")


def _check_distributions(targets: Tensor) -> None:
    low, most = float(targets.min()), float(targets.sum(-1).max())
    if not (low >= 0 and most < 1.001):
        raise LossError(
            "The soft targets are no distributions.",
            f"Their least entry is {low:.4g}, their largest sum over classes {most:.4g}.",
            "Give probabilities: 0 or more, with a sum of 1 over the last dimension.",
        )


def _check_not_smooth(soft: Tensor, smoothing: float | Tensor) -> None:
    """With two classes a mixed target cannot be told from a smoothed one: nothing is said then."""
    if not checks() or soft.shape[-1] < 3 or not soft.numel() or not bool((soft > 0).all()):
        return
    given = "scheduled" if isinstance(smoothing, Tensor) else f"{smoothing:g}"
    raise LossError(
        "Soft targets would be smoothed twice.",
        f"label_smoothing is {given}, and no entry of the {soft.shape[0]} x {soft.shape[1]} targets is 0: the least is "
        f"{float(soft.min()):.4g}.",
        "Smooth in one place: pass label_smoothing=0 here, or give targets that are not smooth yet.",
    )
