"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules._kronecker import grow, kept, refresh, sandwich, side_slots
from thalweg.rules.registry import Slot, rule


@rule(
    slots=lambda options: (
        "m",
        Slot("v", signed=False),
        *side_slots("gram", options["max_dim"]),
        *side_slots("basis", options["max_dim"], "eye"),
    ),
    reads="matrix",
    decay="decoupled",
    lr=3e-3,
    paper="Vyas et al. 2024, arXiv:2409.11321",
    year=2024,
    reference="pytorch_optimizer.SOAP, github.com/nikhilvyas/SOAP",
    ships=("pytorch_optimizer", "heavyball", "distributed_shampoo", "emerging_optimizers"),
    use="The fewest steps where they cost more than the optimizer: large batches, matrices of moderate size, no memory limit.",
    avoid="Memory-bound jobs (6 numbers a parameter for square matrices) and small batches, where its matrix products show.",
    evidence="With Muon in the top group of arXiv:2509.02046; 2.925 and 2.816 at 720M after 16B and 48B tokens, AdamW 2.930 and "
    "2.815: the gain fades with tokens (arXiv:2509.01440). 3,125 NanoGPT steps with fixed-norm weights, tuned Muon 3,250.",
    least_ndim=2,
    clock="frequency",
)
def soap(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    gram_left: Tensor,
    gram_right: Tensor,
    basis_left: Tensor,
    basis_right: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    due: bool,
    fresh: bool,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    frequency: int = 10,
    max_dim: int = 10000,
) -> tuple[Tensor, ...]:
    """h = Ql^T g Qr;  m, v: Adam's moments of h;  p <- p - lr*Ql (m^/(sqrt(v^) + eps)) Qr^T;  then the sides' Grams and bases.

    Args:
        p, g: parameter and gradient, (..., R, C); leading dimensions are a batch of matrices.
        m, v: moments in the present basis, of the same shape.
        gram_left, gram_right: running means of g g^T and g^T g.
        basis_left, basis_right: Ql and Qr, their eigenvectors by falling eigenvalues.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        due: whether the bases are refreshed after this update.
        fresh: whether this is the first time.
        b1, b2: decay of the moments, in [0, 1); b2 is that of the Gram matrices too.
        eps: added to the root, before the bias correction (in adam after it).
        frequency: updates from one refresh to the next.
        max_dim: a larger side keeps no Gram matrix and its own basis.

    Cost: 2 slots a parameter and 2*(R^2 + C^2) numbers a matrix; for square matrices 6 matrix products a step, and each
    ``frequency`` steps 2 QR and 6 products (the first time 2 eigh).
    Departures: none but for order from the reference: its first update sets the bases and moves nothing, t is counted from the
    second. It keeps m in the parameter's basis and turns it at every step; we turn it when the basis changes, the same maths
    in two thirds of the products. With decay it shrinks p after the change, we before. As there, v is sorted with the
    eigenvalues but not turned. While a Gram matrix lacks rank, we
    fix the basis of its null space, which rounding decides there.
    """
    sides = kept(g, max_dim)
    h = sandwich(basis_left.mT, g, basis_right, sides)
    moving = (t > 1).to(t.dtype)  # the first gradient sets the bases alone: in its own, its small entries are noise
    m = m + (1 - b1) * moving * (h - m)
    v = v + (1 - b2) * moving * (h * h - v)
    count = (t - 1).clamp(min=1)
    rate = lr * moving * (1 - b2**count).sqrt() / (1 - b1**count)
    change = -rate * sandwich(basis_left, m / (v.sqrt() + eps), basis_right.mT, sides)
    gram_left, gram_right = grow(gram_left, gram_right, g, b2, 1 - b2, sides)
    if due:
        if sides[0]:
            old, (basis_left, order) = basis_left, refresh(gram_left, basis_left, fresh=fresh, sort=True)
            m, v = basis_left.mT @ (old @ m), v.gather(-2, order.unsqueeze(-1).expand_as(v))
        if sides[1]:
            old, (basis_right, order) = basis_right, refresh(gram_right, basis_right, fresh=fresh, sort=True)
            m, v = (m @ old.mT) @ basis_right, v.gather(-1, order.unsqueeze(-2).expand_as(v))
    return change, m, v, gram_left, gram_right, basis_left, basis_right
