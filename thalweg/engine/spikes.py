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

    Args:
        limits: (4,), where limits are written.

    Attributes:
        ring: (2, window + 1): losses and norms; the column that is written next does not count.
        seen: applied steps so far, (1,).
        limits: of the loss and the norm, then their medians; infinite while the window is not full.

    All three are state. The limits are taken anew after every 16th step, by the number of steps attempted.
    """

    def __init__(self, deviations: float, window: int, limits: Tensor) -> None:
        self.deviations, self.window, self.limits = deviations, window, limits.fill_(math.inf)
        self.ring = limits.new_zeros(2, window + 1)
        self.seen = torch.zeros(1, dtype=torch.int64, device=limits.device)
        self._now, self._most = limits.new_zeros(2, 1), limits[:2].unsqueeze(1)
        self._loss, self._norm = self._now[0, 0], self._now[1, 0]
        self._later = torch.arange(1, window + 1, device=limits.device)

    def slots(self) -> dict[str, Tensor]:
        return {"guard/ring": self.ring, "guard/seen": self.seen, "guard/limits": self.limits}

    def above(self, losses: Tensor, weights: Tensor, norm: Tensor) -> Tensor:
        """Whether the loss and the norm of this step are too large, (2, 1) bool; false for NaN."""
        loss, last = self._loss, self._norm
        if torch.compiler.is_compiling():  # a tracer forgets what is written to a number (torch 2.13)
            loss, last = self._now[0, 0], self._now[1, 0]
        torch.div(losses, weights, out=loss)
        last.copy_(norm)
        return self._now > self._most

    def take_in(self, ok: Tensor, step: int) -> None:
        """Remember the values of step ``step`` (from 1) where it was applied (``ok``)."""
        self.remember(ok)
        self.turn(step)

    def turn(self, step: int) -> None:
        """Step ``step`` (from 1) is over: the limits are taken anew when it is time."""
        if step % REFRESH == 0:
            self.refresh()

    def remember(self, ok: Tensor) -> None:
        """As ``take_in``, without a look at the limits."""
        self.ring.index_copy_(1, self.seen % (self.window + 1), self._now)
        self.seen.add_(ok)

    def refresh(self) -> None:
        """Take the limits anew."""
        last = self.ring.index_select(1, (self.seen + self._later) % (self.window + 1))
        middle, deviation = robust(torch.cat([last[:1], last.log()]))
        least = torch.stack(
            [LOSS_FLOOR * middle[0].abs(), torch.zeros_like(middle[0]), torch.full_like(middle[0], NORM_FLOOR)]
        )
        loss, longer, norm = middle + self.deviations * torch.maximum(deviation, least)
        longer = longer.exp()
        loss = torch.where(longer > loss, longer, loss)  # NaN, where a loss is not above 0, is not
        limits = torch.stack([loss, norm.exp(), middle[0], middle[2].exp()])
        self.limits.copy_(torch.where(self.seen >= self.window, limits, math.inf))


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
        still: where the loss scale stays as it is, 0-dim bool; None: nowhere.
    """

    def __init__(self, guard: Guard, device: torch.device, exact: torch.dtype, *, scaled: bool) -> None:
        self.guard, self.scaled = guard, scaled
        self.told = torch.full((len(JUDGED),), math.inf, dtype=exact, device=device)
        self._kind = self.told[0]
        self.spikes = None if guard.spike == "off" else Spikes(guard.deviations, guard.window, self.told[1:])
        self.tripped = torch.zeros((), dtype=torch.bool, device=device)
        self.still: Tensor | None = None

    def judge(self, finite: Tensor, norm: Tensor, losses: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        """Whether a step may be applied, 0-dim bool.

        Args:
            finite: whether loss and gradient are.
            norm: of the mean gradient; losses, weights: sums over the window; scale: of the loss. All 0-dim.
        """
        guard = self.guard
        fault = ~finite & (weights > 0)
        if self.scaled:
            fault = fault & (~torch.isfinite(losses) | (scale <= LEAST))
        kind = self.told[0] if torch.compiler.is_compiling() else self._kind  # as in ``Spikes.above``
        kind.copy_(fault)
        ok, trips, wild = finite, fault if guard.nonfinite != "skip" else None, None
        if self.spikes is not None:
            above = self.spikes.above(losses, weights, norm)
            if self.scaled:  # a gradient that overflows is no spike, and does not hide one of the loss
                wild = (above[0, 0] | (above[1, 0] & finite)) & ~fault
            else:
                wild = above.any() & finite
            ok = ok & ~wild
            kind.add_(wild, alpha=SPIKE)
            if guard.spike != "skip":
                trips = wild if trips is None else trips | wild
        self.still = wild
        if trips is not None:
            before = self.tripped.clone()
            ok = ok & ~before
            self.still = before if wild is None else before | wild
            self.tripped.logical_or_(trips)
        return ok

    def end(self, ok: Tensor, step: int) -> None:
        """Step ``step`` (from 1) is over, applied where ``ok``."""
        if self.spikes is not None:
            self.spikes.take_in(ok, step)

    def slots(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; nothing where no spikes are looked for."""
        return {} if self.spikes is None else self.spikes.slots()

    def release(self) -> None:
        """The host has acted: steps count again."""
        self.tripped.zero_()
