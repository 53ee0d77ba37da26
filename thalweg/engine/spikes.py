"""Whether a step may be applied, judged on the device: nothing is read back to Python, and nothing is timed by the clock."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.core import Guard
from thalweg.core.guard import REFRESH
from thalweg.precision import LEAST

#: What a judged step writes into its row beside all that every step does.
JUDGED = ("fault", "loss_limit", "norm_limit", "loss_middle", "norm_middle")
NONE, NONFINITE, SPIKE = 0, 1, 2
#: Least deviation: of losses as a share of their median, of norms as a share of themselves.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.1
_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def medians(values: Tensor) -> Tensor:
    """The median of each row, (rows, num) to (rows,); of an even number the mean of the two in the middle."""
    ordered, num = values.sort(dim=1).values, values.shape[1]
    return (ordered[:, (num - 1) // 2] + ordered[:, num // 2]) / 2


def robust(values: Tensor) -> tuple[Tensor, Tensor]:
    """(median, robust standard deviation) of each row: 1.4826 times the median distance from the median."""
    middle = medians(values)
    return middle, _NORMAL * medians((values - middle[:, None]).abs())


class Spikes:
    """What losses and gradient norms have been of late, and how far they may go.

    A loss may go to ``deviations`` robust standard deviations above the median of the last ``window`` applied steps, on its own
    scale or, where all losses are above 0, on that of its logarithm, whichever is further: losses near 0 have long tails. A norm
    is looked at on the scale of its logarithm. A deviation is at least a hundredth of the median loss, or a tenth of the norm.
    Median and MAD: Leys et al. 2013, "Detecting outliers: do not use standard deviation around the mean".

    Attributes:
        ring: (2, window): losses, and logarithms of norms.
        seen: applied steps so far, (1,).
        limits: (4,): of the loss and the norm, then their medians; infinite while the window is not full.

    All three are state. The limits are taken anew after every 16th step, by the number of steps attempted.
    """

    def __init__(self, deviations: float, window: int, device: torch.device, exact: torch.dtype) -> None:
        self.deviations, self.window = deviations, window
        self.ring = torch.zeros(2, window, dtype=exact, device=device)
        self.seen = torch.zeros(1, dtype=torch.int64, device=device)
        self._young = torch.full((4,), math.inf, dtype=exact, device=device)
        self.limits = self._young.clone()
        self._parts = self.limits[0], self.limits[1]

    def slots(self) -> dict[str, Tensor]:
        return {"guard/ring": self.ring, "guard/seen": self.seen, "guard/limits": self.limits}

    def beyond(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step is one, 0-dim bool. A value that is not finite says nothing: it is another fault, or the loss scale's."""
        return ((loss > self._parts[0]) & torch.isfinite(loss)) | ((norm > self._parts[1]) & torch.isfinite(norm))

    def take_in(self, loss: Tensor, norm: Tensor, ok: Tensor, step: int) -> None:
        """Remember the values of step ``step`` (from 1) where it was applied (``ok``)."""
        place = self.seen % self.window
        now = torch.stack([loss, norm.to(loss.dtype).log()]).unsqueeze(1)
        self.ring.index_copy_(1, place, torch.where(ok, now, self.ring.index_select(1, place)))
        self.seen.add_(ok)
        if step % REFRESH == 0:
            self.refresh()

    def refresh(self) -> None:
        """Take the limits anew."""
        middle, deviation = robust(self.ring)
        logs, spread = robust(self.ring[:1].log())
        far = self.deviations
        loss = middle[0] + far * torch.maximum(deviation[0], LOSS_FLOOR * middle[0].abs())
        longer = (logs[0] + far * spread[0]).exp()
        loss = torch.where(longer > loss, longer, loss)  # NaN, where a loss is not above 0, is not
        norm = (middle[1] + far * deviation[1].clamp(min=NORM_FLOOR)).exp()
        limits = torch.stack([loss, norm, middle[0], middle[1].exp()])
        self.limits.copy_(torch.where(self.seen >= self.window, limits, self._young))


class Watch:
    """Judges each step of a run whose recipe's guard asks for more than to skip what is not finite.

    The first step that trips makes all later ones inert: they move nothing, until the host has seen it and acted.

    Args:
        guard: of the recipe.
        scaled: whether there is a loss scale. A gradient that is not finite is then its work, not a fault, unless the loss
            is not finite either or the scale is the least one.

    Attributes:
        tripped: 0-dim bool.
        told: (5,), as in ``JUDGED``, of the last step.
        still: where the loss scale stays as it is, 0-dim bool.
    """

    def __init__(self, guard: Guard, device: torch.device, exact: torch.dtype, *, scaled: bool) -> None:
        self.guard, self.scaled = guard, scaled
        self.spikes = None if guard.spike == "off" else Spikes(guard.deviations, guard.window, device, exact)
        self.tripped = torch.zeros((), dtype=torch.bool, device=device)
        self.still = torch.zeros((), dtype=torch.bool, device=device)
        self.told = torch.full((len(JUDGED),), math.nan, dtype=exact, device=device)
        self._loss = self._norm = torch.zeros((), dtype=exact, device=device)

    def judge(self, finite: Tensor, norm: Tensor, losses: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        """Whether a step may be applied, 0-dim bool.

        Args:
            finite: whether loss and gradient are.
            norm: of the mean gradient; losses, weights: sums over the window; scale: of the loss. All 0-dim.
        """
        guard, still = self.guard, self.tripped.clone()
        fault = ~finite & (weights > 0)
        if self.scaled:
            fault = fault & (~torch.isfinite(losses) | (scale <= LEAST))
        ok, trips = finite & ~still, fault if guard.nonfinite != "skip" else torch.zeros_like(still)
        kind = fault * NONFINITE
        if self.spikes is not None:
            self._loss, self._norm = losses / weights, norm
            wild = self.spikes.beyond(self._loss, norm) & ~fault
            ok, still, kind = ok & ~wild, still | wild, kind + wild * SPIKE
            trips = trips | wild if guard.spike != "skip" else trips
            self.told[1:].copy_(self.spikes.limits)
        if guard.trips:
            self.tripped.logical_or_(trips)
        self.told[0].copy_(kind)
        self.still = still
        return ok

    def end(self, ok: Tensor, step: int) -> None:
        """Step ``step`` (from 1) is over, applied where ``ok``."""
        if self.spikes is not None:
            self.spikes.take_in(self._loss, self._norm, ok, step)

    def slots(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; nothing where no spikes are looked for."""
        return {} if self.spikes is None else self.spikes.slots()

    def release(self) -> None:
        """The host has acted: steps count again."""
        self.tripped.zero_()
