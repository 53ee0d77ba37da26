"""APOLLO: Adam's scaling of rows or of whole matrices, estimated in a random subspace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


def _slots(options: Mapping[str, Any]) -> tuple[Slot, ...]:
    def low(shape: tuple[int, ...]) -> tuple[int, ...]:
        small, large = sorted(shape[-2:])
        return (*shape[:-2], min(int(options["rank"]), small), large)

    def onto(shape: tuple[int, ...]) -> tuple[int, ...]:
        small = min(shape[-2:])
        return (*shape[:-2], min(int(options["rank"]), small), small)

    def one(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], 1, 1)

    return Slot("projection", onto), Slot("m", low), Slot("v", low, signed=False), Slot("size", one, signed=False)


_ABOUT: dict[str, Any] = {
    "slots": _slots,
    "reads": "matrix",
    "decay": "decoupled",
    "lr": 1e-2,
    "least_ndim": 2,
    "paper": "Zhu et al. 2024, arXiv:2412.05270",
    "year": 2024,
    "ships": ("pytorch_optimizer",),
    "choices": {"scaling": ("channel", "tensor")},
    "clock": "refresh",
    "avoid": "Where AdamW or its 8-bit slots fit: what is saved there costs less quality.",
    "evidence": "AdamW's perplexity on Llama 60M to 7B (its authors); no independent comparison known to us.",
}


@rule(
    name="apollo_mini",
    fixed={"rank": 1, "scaling": "tensor", "scale": math.sqrt(128)},
    use="Pretraining with the memory of SGD without momentum.",
    **_ABOUT,
)
@rule(
    use="Pretraining with little memory: rank numbers for each row of the longer side.",
    **_ABOUT,
)
def apollo(
    p: Tensor,
    g: Tensor,
    projection: Tensor,
    m: Tensor,
    v: Tensor,
    size: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    due: bool,
    noise: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    rank: int = 256,
    refresh: int = 200,
    scale: float = 1.0,
    scaling: str = "channel",
    growth: float = 1.01,
) -> tuple[Tensor, ...]:
    """x = P*g;  m, v as in Adam, of x;  a = |m^/(sqrt(v^) + eps)|/|x| by column or of all;  u = a*g, held to
    |u| <= growth*|last u|;  p <- p - lr*scale*u;  hats: x/(1 - b^t); g with its shorter side as rows.

    Args:
        p, g: parameter and gradient, (..., R, C).
        projection: P, (..., rank, min(R, C)), normal numbers of variance 1/rank, drawn anew each ``refresh`` updates.
        m, v: moments of x, (..., rank, max(R, C)).
        size: norm of the last u, (..., 1, 1).
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        due: whether P is drawn now; the engine says so at the first update.
        noise: standard normal numbers, shaped like g.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction.
        rank: of the subspace, at most min(R, C).
        refresh: updates between draws.
        scale: multiple of the update; sqrt(128) makes up for rank 1.
        scaling: "channel": a for each column of the longer side; "tensor": one for the matrix.
        growth: most that |u| grows by in a step, above 1.

    Cost: 2*rank*max(R, C) + rank*min(R, C) numbers a matrix (apollo_mini: 2*max + min); reads 2 tensors and writes 1 a step.
    Departures: bias correction is in a, as in the paper's AdamW; the authors' code has it in the rate, so their limiter does
        not see it. A last update of 0 sets no limit; there it holds all later ones near 0. Parameters of fewer than 2
        dimensions go to adamw.
    """
    wide = g.shape[-2] <= g.shape[-1]
    x, num = g if wide else g.mT, projection.shape[-2]
    if due:
        # A corner of the noise for g is noise enough for P, whose sides are no longer.
        projection = (noise if wide else noise.mT)[..., :num].mT * num**-0.5
    low = projection @ x
    m = b1 * m + (1 - b1) * low
    v = b2 * v + (1 - b2) * low * low
    adam = (1 / (1 - b1**t)) * m / (v.sqrt() / (1 - b2**t).sqrt() + eps)
    over = -2 if scaling == "channel" else (-2, -1)
    u = x * (_norm(adam, over) / _norm(low, over).clamp(min=1e-30))
    now = _norm(u, (-2, -1))
    held = torch.where(size > 0, now / (growth * size.clamp(min=1e-30)), 1.0).clamp(min=1.0)
    u = u / held
    change = -(lr * scale) * u
    return change if wide else change.mT, projection.clone(), m, v, now / held


def _norm(x: Tensor, over: int | tuple[int, int]) -> Tensor:
    return x.square().sum(dim=over, keepdim=True).sqrt()
