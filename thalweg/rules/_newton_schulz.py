"""Orthogonalization of matrices by odd polynomials: what Muon and its kin share.

For a wide matrix X = U S V^T an iteration X <- a*X + (b*A + c*A^2) X with A = X X^T keeps U and V and sends each singular
value s to a*s + b*s^3 + c*s^5; a few of them bring all singular values near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]

#: Jordan 2024: the steepest slope at 0; the values end between about 0.68 and 1.13, not at 1.
_NEWTON_SCHULZ: Coefficients = ((3.4445, -4.7750, 2.0315),)

#: Amsel et al. 2025, arXiv:2505.16932: the best polynomial of each iteration for singular values from 1e-3 to 1.
_POLAR_EXPRESS: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

#: Their safety factor: rounding must not carry a singular value above 1, where a polynomial may send it to infinity.
_SAFETY = 1.01

COEFFICIENTS = ("newton-schulz", "polar-express")


def schedule(name: str, steps: int) -> Coefficients:
    """The coefficients (a, b, c) of each of ``steps`` iterations; the last ones repeat.

    >>> schedule("newton-schulz", 2)
    ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if name == "newton-schulz":
        return _NEWTON_SCHULZ * steps
    safe = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1])
    return (*safe[:steps], *_POLAR_EXPRESS[-1:] * (steps - len(safe)))


def orthogonalize(x: Tensor, *, steps: int, coefficients: str, gram: bool, eps: float = 1e-7) -> Tensor:
    """The nearest matrix with singular values near 1, of each matrix in ``x`` (..., R, C); zero stays zero.

    Args:
        steps: iterations.
        coefficients: "newton-schulz" or "polar-express".
        gram: two iterations for each pass over a matrix at least twice as wide as high: see ``_pair``.
        eps: least Frobenius norm that is divided by.

    Returns:
        A tensor like ``x``, iterated in its dtype; the norm is taken in at least float32.
    """
    left = schedule(coefficients, steps)
    shrink = 1.0 if coefficients == "newton-schulz" else 1 / _SAFETY
    lead, rows, columns = x.shape[:-2], *x.shape[-2:]
    if not lead:
        return _iterated(x, left, shrink, gram, eps)
    return _iterated(x.reshape(-1, rows, columns), left, shrink, gram, eps).reshape(x.shape)


def _iterated(x: Tensor, left: Coefficients, shrink: float, gram: bool, eps: float) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide).clamp(min=eps)
    y = x * (shrink / norm).to(x.dtype)  # its rounding moves all singular values alike
    y = y.mT if tall else y  # the Gram matrix is then the small one
    paired = gram and y.shape[-1] >= 2 * y.shape[-2]
    while left:
        if paired and len(left) > 1:
            y, left = _pair(y, left[0], left[1]), left[2:]
        else:
            y, left = _once(y, left[0]), left[1:]
    return y.mT if tall else y


def addmm(base: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> Tensor:
    """beta*base + alpha*(a @ b) in one call, for matrices and for batches of them."""
    if base.ndim == 2:
        return torch.addmm(base, a, b, beta=beta, alpha=alpha)
    lead = base.shape[:-2]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (base, a, b)]
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).reshape(*lead, *base.shape[-2:])


def _once(x: Tensor, abc: tuple[float, float, float]) -> Tensor:
    a, b, c = abc
    g = x @ x.mT
    return _apply(addmm(g, g, g, beta=b, alpha=c), a, x)


def _apply(square: Tensor, by: float, x: Tensor) -> Tensor:
    """(by + square) x.

    With ``by`` on the diagonal x is read once, where by*x + square @ x copies it first. In bf16 that rounds the diagonal to 0.4 %:
    harmless at Jordan's coefficients, whose singular values end between 0.68 and 1.13, too coarse for large ones.
    """
    if by > 12.0 and square.dtype == torch.bfloat16:
        return addmm(x, square, x, beta=by, alpha=1)
    square.diagonal(dim1=-2, dim2=-1).add_(by)
    return square @ x


def _pair(x: Tensor, first: tuple[float, float, float], second: tuple[float, float, float]) -> Tensor:
    """Two iterations as one product Q x, Q made of the Gram matrix alone: 2 passes over x instead of 4.

    With P = a + b*G + c*G^2 the second iteration's Gram matrix is P G P. For n x m that saves 2*n^2*m - 3*n^3 multiplications.
    Not more than two: the Gram matrix holds squares, so that in bf16 its small eigenvalues are noise, which each iteration
    multiplies by a^2: after three in a row some matrices diverge (one of rank one with noise), after two none did.
    """
    a1, b1, c1 = first
    a2, b2, c2 = second
    g = x @ x.mT
    p = addmm(g, g, g, beta=b1, alpha=c1)  # without the a1 on its diagonal, here and below
    h = addmm(g, p, g, beta=a1, alpha=1)
    g = addmm(h, h, p, beta=a1, alpha=1)
    q = addmm(g, g, g, beta=b2, alpha=c2)
    both = addmm(p, q, p, beta=a2, alpha=1).add_(q, alpha=a1)  # (a1 + P)(a2 + Q) - a1*a2, as all commute
    return _apply(both, a1 * a2, x)
