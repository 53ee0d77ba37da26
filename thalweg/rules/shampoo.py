"""Shampoo: a preconditioner for each side of a matrix; and KL-Shampoo, whose sides are whitened by each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.rules._kronecker import grow, inverse_root, kept, refresh, sandwich, side_slots
from thalweg.rules.registry import Slot, Slots, rule


def _shampoo_slots(options: Mapping[str, Any]) -> Slots:
    sides = (*side_slots("gram", options["max_dim"]), *side_slots("root", options["max_dim"], "eye"))
    return (*sides, Slot("m"), *((Slot("v", signed=False),) if options["graft"] == "adam" else ()))


@rule(
    slots=_shampoo_slots,
    reads="matrix",
    decay="decoupled",
    lr=1e-3,
    paper="Gupta, Koren and Singer 2018, arXiv:1802.09568; Shi et al. 2023, arXiv:2309.06497",
    year=2018,
    reference="Meta's distributed_shampoo in its formulas; variant='sum' is pytorch_optimizer.Shampoo",
    ships=("pytorch_optimizer", "distributed_shampoo", "emerging_optimizers"),
    use="Large batches, and jobs that have Adam's rate and schedule already: with grafting they carry over.",
    avoid="Memory-bound jobs; small matrices by the thousand, whose roots take longer than the model.",
    evidence="Won AlgoPerf's external track of 2024 (.778, 28 % faster than tuned NAdamW) and of 2025 (.624, baseline .459). "
    "Plain, 4,100 NanoGPT steps where tuned Muon needs 3,250 (modded-nanogpt track 3).",
    least_ndim=2,
    clock="frequency",
    choices={"graft": ("adam", "sgd", "none"), "variant": ("mean", "sum")},
)
def shampoo(
    p: Tensor,
    g: Tensor,
    gram_left: Tensor,
    gram_right: Tensor,
    root_left: Tensor,
    root_right: Tensor,
    m: Tensor,
    v: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    due: bool,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-12,
    graft: str = "adam",
    graft_eps: float = 1e-8,
    exponent: float = 0.0,
    frequency: int = 10,
    max_dim: int = 8192,
    variant: str = "mean",
) -> tuple[Tensor, ...]:
    """L <- b2*L + (1-b2)*g g^T;  R <- b2*R + (1-b2)*g^T g;  s = (L^+eps)^-1/4 m^ (R^+eps)^-1/4;  p <- p - lr*s*|a|/|s|.

    Args:
        p, g: parameter and gradient, (..., R, C); leading dimensions are a batch of matrices.
        gram_left, gram_right: L and R. root_left, root_right: their inverse roots when last computed.
        m, v: running mean of the gradient, and of its squares for ``graft="adam"``, of p's shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        due: whether the roots are computed anew.
        b1, b2: decay of m, and of v, L and R, in [0, 1).
        eps: added to the eigenvalues of L and R.
        graft: whose length the change has: a = m^/(sqrt(v^) + graft_eps) "adam", m^ "sgd", or s itself "none".
        graft_eps: added to the root of v.
        exponent: of the roots; 0: 1/(2*sides), so 1/4, and 1/2 where one side is larger than ``max_dim``.
        frequency: updates from one computation of the roots to the next; until the second one the change is a (m^ for "none"),
            since the roots of a single gradient blow up what that gradient lacks.
        max_dim: a larger side is left alone.
        variant: "mean" as above, divided by 1-b2^t; "sum" is the paper's L <- L + g g^T, with eps its L_0.

    Cost: 2 slots a parameter and 2*(R^2 + C^2) numbers a matrix; for square matrices 4 matrix products a step, and each
    ``frequency`` steps 2 eigh.
    Departures: the paper has no grafting, no running means and no frequency: b1=0, graft="none", frequency=1, variant="sum",
    eps=1e-4 is its algorithm 1. Meta's cuts large sides into blocks of 1024 and computes roots at multiples of the frequency,
    we one update later; its defaults are b2=1 (a sum), frequency=1 and no grafting, ours what makes Adam's rates carry over.
    pytorch_optimizer's ScalableShampoo takes the momentum of the preconditioned gradient: another rule, not compared.
    """
    sides = kept(g, max_dim)
    whole = variant == "sum"
    gram_left, gram_right = grow(gram_left, gram_right, g, 1 if whole else b2, 1 if whole else 1 - b2, sides)
    correct = 1 / (1 - b2**t)
    if due:
        power = exponent or 1 / (2 * max(sum(sides), 1))
        scale = 1.0 if whole else correct
        root_left = inverse_root(gram_left, scale, eps, power) if sides[0] else root_left
        root_right = inverse_root(gram_right, scale, eps, power) if sides[1] else root_right
    m = torch.lerp(m, g, 1 - b1)
    mean = (1 / (1 - b1**t)) * m
    like = mean
    if v is not None:
        v = b2 * v + (1 - b2) * g * g
        like = mean / (v.sqrt() * correct.sqrt() + graft_eps)
    s = sandwich(root_left, mean, root_right, sides)
    if graft != "none":
        s = s * (_norm(like) / _norm(s).clamp(min=torch.finfo(s.dtype).tiny))
    change = -lr * (s if frequency == 1 else torch.where(t > frequency, s, like))
    factors = (gram_left, gram_right, root_left, root_right, m)
    return (change, *factors) if v is None else (change, *factors, v)


def _kl_slots(options: Mapping[str, Any]) -> Slots:
    values = (
        Slot("values_left", shape="row", start=options["start"], signed=False),
        Slot("values_right", shape="column", start=options["start"], signed=False),
    )
    grams, bases = side_slots("gram", options["max_dim"]), side_slots("basis", options["max_dim"], "eye")
    return (Slot("m"), *grams, *bases, *values)


@rule(
    slots=_kl_slots,
    reads="matrix",
    decay="decoupled",
    lr=1e-4,
    paper="Lin et al. 2025, arXiv:2509.03378",
    year=2025,
    reference="github.com/yorkerlin/KL-Methods, kl_opt.py, in its formulas",
    ships=("heavyball", "distributed_shampoo"),
    use="Where Shampoo or SOAP would serve: it needs no grafting, and one slot less than SOAP.",
    avoid="Expecting a rate of AdamW to carry over: the change is not normalized.",
    evidence="Its SOAP form with fixed-norm weights needs 3,125 NanoGPT steps (3,040 with another schedule), as SOAP 3,125 "
    "(modded-nanogpt track 3, 2026). No independent evidence for this form itself.",
    least_ndim=2,
    clock="frequency",
    unmoved=("start",),
)
def kl_shampoo(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    gram_left: Tensor,
    gram_right: Tensor,
    basis_left: Tensor,
    basis_right: Tensor,
    values_left: Tensor,
    values_right: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    due: bool,
    fresh: bool,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    start: float = 0.1,
    limit: float = 4000,
    frequency: int = 10,
    max_dim: int = 10000,
) -> tuple[Tensor, ...]:
    """h = Ql^T g Qr;  p <- p - lr*Ql (m/sqrt(l r^T)) Qr^T, m the running mean of h;  then with (l, r) as they were
    L <- b2*L + (1-b2)/C*g R^-1 g^T;  l <- b2*l + (1-b2)*mean_j(h_ij^2/r_j);  and R, r with sides exchanged.

    Args:
        p, g: parameter and gradient, (..., R, C); leading dimensions are a batch of matrices.
        m: running mean of the gradient in the present basis, of the same shape.
        gram_left, gram_right: L and R; of R^-1 and L^-1 only their eigenvectors and the values below are used.
        basis_left, basis_right: Ql and Qr, their eigenvectors.
        values_left, values_right: l (..., R, 1) and r (..., 1, C), followed at every update.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        due: whether the bases are refreshed after this update.
        fresh: whether this is the first time.
        b1, b2: decay of m, and of L, R, l and r, in [0, 1).
        eps: added to the root of l r^T.
        start: of l and r.
        limit: largest 1/sqrt(l), where the side has as many rows; else as many, but at least 10.
        frequency: updates from one refresh to the next.
        max_dim: a larger side keeps no Gram matrix and its own basis, and its values are 1.

    Cost: 1 slot a parameter and 2*(R^2 + C^2) + R + C numbers a matrix; for square matrices 7 matrix products a step, and each
    ``frequency`` steps 2 QR and 4 products (the first time 2 eigh).
    Departures: follows the authors' code (its defaults too), which adds to the paper the followed values, their limit and a
    first update that sets the bases and moves nothing. It works in bf16, we in the parameter's precision; max_dim is ours.
    With decay it shrinks p after the change, we before.
    """
    sides = kept(g, max_dim)
    moving = (t > 1).to(t.dtype)
    inverse_left: Tensor | float = values_left.rsqrt() if sides[0] else 1.0
    inverse_right: Tensor | float = values_right.rsqrt() if sides[1] else 1.0
    up = basis_left.mT @ g if sides[0] else g
    across = g @ basis_right if sides[1] else g
    h = up @ basis_right if sides[1] else up
    m = m + (1 - b1) * moving * (h - m)
    scaled = (m * inverse_left) * inverse_right
    root = inverse_left * inverse_right
    change = -(lr * moving) * sandwich(basis_left, scaled / (1 + eps * root), basis_right.mT, sides)
    # the first gradient is not whitened: the values are not its own yet
    whiten_left = 1 + moving * (inverse_left - 1)
    whiten_right = 1 + moving * (inverse_right - 1)
    rows, columns = g.shape[-2:]
    gram_left, _ = grow(gram_left, gram_right, across * whiten_right, b2, (1 - b2) / columns, (sides[0], False))
    _, gram_right = grow(gram_left, gram_right, up * whiten_left, b2, (1 - b2) / rows, (False, sides[1]))
    new = (1 - b2) * moving
    if sides[0]:
        seen = (h * inverse_right).square().mean(-1, keepdim=True)
        values_left = _floored(values_left + new * (seen - values_left), rows, limit)
    if sides[1]:
        seen = (h * inverse_left).square().mean(-2, keepdim=True)
        values_right = _floored(values_right + new * (seen - values_right), columns, limit)
    if due:
        if sides[0]:
            old, (basis_left, _) = basis_left, refresh(gram_left, basis_left, fresh=fresh, sort=False)
            m = basis_left.mT @ (old @ m)
        if sides[1]:
            old, (basis_right, _) = basis_right, refresh(gram_right, basis_right, fresh=fresh, sort=False)
            m = (m @ old.mT) @ basis_right
    return change, m, gram_left, gram_right, basis_left, basis_right, values_left, values_right


def _floored(values: Tensor, size: int, limit: float) -> Tensor:
    return values.clamp(min=1 / max(10.0, min(size, limit)) ** 2)


def _norm(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return size
