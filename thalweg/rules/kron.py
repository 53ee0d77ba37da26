"""Kron: preconditioned SGD whose triangular Kronecker factors are learnt by whitening the momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, Slots, rule


def _factors(max_dim: int) -> Slots:
    """Two triangular factors, or where a side is too large two diagonals, as (..., R, 1) and (..., C, 1)."""

    def left(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-2] if shape[-2] <= max_dim else 1)

    def right(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], shape[-1], shape[-1] if shape[-1] <= max_dim else 1)

    return (
        Slot("q_left", shape=left, start="eye", compressible=False),
        Slot("q_right", shape=right, start="eye", compressible=False),
    )


@rule(
    slots=lambda options: ("m", *_factors(options["max_dim"])),
    reads="matrix",
    decay="decoupled",
    lr=1e-3,
    paper="Li 2015, arXiv:1512.04202; Pooladzandi and Li 2024, arXiv:2402.04553",
    year=2024,
    reference="timm.optim.Kron, github.com/evanatyourservice/kron_torch",
    ships=("timm", "heavyball", "emerging_optimizers"),
    use="Where SOAP would serve: one slot less, no eigenvectors, and nothing that can fail to converge.",
    avoid="Comparing runs bit by bit across machines: its factors follow random numbers.",
    evidence="With Muon and SOAP in the top group of arXiv:2509.02046. With fixed-norm weights 3,375 NanoGPT steps, tuned Muon "
    "3,250 (modded-nanogpt track 3, 2026).",
    least_ndim=2,
    clock="frequency",
)
def kron(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    q_left: Tensor,
    q_right: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    due: bool,
    noise: Tensor,
    b1: float = 0.9,
    precond_lr: float = 0.1,
    most_rms: float = 1.1,
    frequency: int = 1,
    max_dim: int = 8192,
) -> tuple[Tensor, ...]:
    """s = (Ql^T Ql) m^ (Qr^T Qr);  p <- p - lr*s*min(1, most_rms/rms(s));  Q <- Q - precond_lr*triu(T1 - T2)/|T1 + T2| Q,
    with A = Ql m^ Qr^T, B = Ql^-T noise Qr^-1, and T1 = A A^T, T2 = B B^T on the left, A^T A and B^T B on the right.

    Args:
        p, g, m: parameter, gradient and its running mean, (..., R, C); leading dimensions are a batch of matrices.
        q_left, q_right: Ql and Qr, upper triangular; (..., R, 1) and (..., C, 1) where diagonal.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        due: whether the factors are updated, before they are used.
        noise: standard normal, of g's shape.
        b1: decay of m, in [0, 1); m^ = m/(1 - b1^t).
        precond_lr: step size of the factors.
        most_rms: largest root mean square of s.
        frequency: updates from one update of the factors to the next. They learn for hundreds of them: keep 1 at first.
        max_dim: a larger side has a diagonal factor.

    Cost: 1 slot a parameter and R^2 + C^2 numbers a matrix; for square matrices 4 matrix products a step, and with the factors
    updated 8 more and 2 triangular solves.
    Departures: the published code updates its factors with a chance that falls from 1 to 0.03 in 4,000 updates, ours at a
    fixed frequency; it balances the factors' sizes once in 100 of those, ours each time, which changes rounding alone. A
    matrix whose momentum is zero keeps its factors: by the formula they would grow by up to a tenth at each update, for ever.
    Their first value is 1, with no option. timm's largest triangular side is 2048.
    """
    m = torch.lerp(m, g, 1 - b1)
    mean = (1 / (1 - b1**t)) * m
    if due:
        q_left, q_right = _balanced(*_learnt(mean, noise, q_left, q_right, precond_lr))
    s = _twice(q_right, _twice(q_left, mean).mT).mT
    rms = s.square().mean((-2, -1), keepdim=True).sqrt()
    return -(lr * (most_rms / (rms + 1e-8)).clamp(max=1.0)) * s, m, q_left, q_right


def _learnt(x: Tensor, noise: Tensor, q_left: Tensor, q_right: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    a = _times(q_right, _times(q_left, x).mT).mT
    b = _solved(q_right, _solved(q_left, noise).mT).mT
    alive = rate * (x.abs().amax((-2, -1), keepdim=True) > 0).to(x.dtype)
    return _step(q_left, a, b, alive), _step(q_right, a.mT, b.mT, alive)


def _step(q: Tensor, a: Tensor, b: Tensor, rate: Tensor) -> Tensor:
    tiny = torch.finfo(torch.bfloat16).tiny
    if _is_diagonal(q):
        first, second = a.square().sum(-1, keepdim=True), b.square().sum(-1, keepdim=True)
        size = (first + second).amax((-2, -1), keepdim=True)
        return q - (rate / (size + tiny)) * (first - second) * q
    first, second = a @ a.mT, b @ b.mT
    return q - (rate / (_norm_bound(first + second) + tiny)) * (first - second).triu() @ q


def _norm_bound(x: Tensor) -> Tensor:
    """A lower bound of the spectral norm of symmetric matrices: |X y| for the unit vector y along X times its longest row."""
    tiny = torch.finfo(x.dtype).tiny
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / largest.clamp(min=tiny)
    longest = x.square().sum(-1, keepdim=True).argmax(-2, keepdim=True)
    y = x @ x.take_along_dim(longest, -2).mT
    y = y / torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp(min=tiny)
    bound: Tensor = largest * torch.linalg.vector_norm(x @ y, dim=-2, keepdim=True)
    return bound


def _balanced(q_left: Tensor, q_right: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors with the same largest entry: only their product counts."""
    left, right = (q.abs().amax((-2, -1), keepdim=True) for q in (q_left, q_right))
    ratio = (right / left).sqrt()
    return q_left * ratio, q_right * (1 / ratio)


def _is_diagonal(q: Tensor) -> bool:
    return q.shape[-1] == 1


def _times(q: Tensor, x: Tensor) -> Tensor:
    return q * x if _is_diagonal(q) else q @ x


def _twice(q: Tensor, x: Tensor) -> Tensor:
    return q * q * x if _is_diagonal(q) else q.mT @ (q @ x)


def _solved(q: Tensor, x: Tensor) -> Tensor:
    """Q^-T x."""
    return x / q if _is_diagonal(q) else torch.linalg.solve_triangular(q.mT, x, upper=False)
