"""Adam-mini: Adam with one second moment for each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.rules.registry import Slot, rule


def _slots(options: Mapping[str, Any]) -> tuple[str | Slot, ...]:
    if options["blocks"] == "row":
        return "m", Slot("v", "row", signed=False)
    return "m", Slot("v", lambda shape: (*shape[:-2], 1, 1), signed=False)


@rule(
    slots=_slots,
    reads="matrix",
    decay="decoupled",
    lr=1e-3,
    paper="Zhang et al. 2024, arXiv:2406.16793",
    year=2024,
    reference="pytorch_optimizer.AdamMini",
    choices={"blocks": ("row", "tensor")},
    ships=("pytorch_optimizer",),
    use="Transformers that should train like AdamW with half of its state.",
    avoid="Matrices whose columns, not rows, differ in scale; a plain momentum of 8 bits saves as much.",
    evidence="On par with AdamW on language models of 39M to 13B (its authors); no independent comparison known to us.",
)
def adam_mini(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    blocks: str = "row",
) -> tuple[Tensor, ...]:
    """m <- b1*m + (1-b1)*g;  v <- b2*v + (1-b2)*mean(g^2 over the block);  p <- p - lr*m^/(sqrt(v^) + eps), hats: x/(1 - b^t).

    Args:
        p, g, m: parameter, gradient and first moment, (..., R, C); a vector is (1, n), so one block.
        v: second moment, one for each block: (..., R, 1) or (..., 1, 1).
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction.
        blocks: "row": the output neuron of a linear layer, the token of an embedding or head: the paper's partition for all
            of them but queries and keys. "tensor": the whole matrix.

    Cost: 1 slot a parameter and 1 number a row (4 B at fp32); reads 3 and writes 2 tensors a step, and a pass for the means.
    Departures: queries and keys have a block for each head in the paper and one for each row here, which is finer; a
        parameter of shape (heads, rows*C) gives the paper's. An embedding in a group with blocks="tensor" is what the paper
        warns of: tokens that do not occur get the others' rate. Vectors are one block, as there.
    """
    m = b1 * m + (1 - b1) * g
    square = g.square().mean(dim=-1 if blocks == "row" else (-2, -1), keepdim=True)
    v = b2 * v + (1 - b2) * square
    return -(lr / (1 - b1**t)) / (v.sqrt() / (1 - b2**t).sqrt() + eps) * m, m, v
