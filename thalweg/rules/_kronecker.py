"""Preconditioners of a matrix's two sides: Gram matrices, eigenbases and inverse roots, for Shampoo, SOAP and their kin.

A side with more than ``max_dim`` rows or columns is not kept: its slots are 1 x 1, and what acts on it is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules._newton_schulz import addmm
from thalweg.rules.registry import Slot


def kept(x: Tensor, max_dim: int) -> tuple[bool, bool]:
    """Whether the left and the right side of ``x`` have a preconditioner."""
    return x.shape[-2] <= max_dim, x.shape[-1] <= max_dim


def side_slots(name: str, max_dim: int, start: float | str = 0.0) -> tuple[Slot, Slot]:
    """A square matrix for each side; never in few bits, as their small eigenvalues matter most."""

    def left(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], *_square(shape[-2], max_dim))

    def right(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], *_square(shape[-1], max_dim))

    return (
        Slot(f"{name}_left", shape=left, start=start, compressible=False),
        Slot(f"{name}_right", shape=right, start=start, compressible=False),
    )


def _square(size: int, max_dim: int) -> tuple[int, int]:
    return (size, size) if size <= max_dim else (1, 1)


def grow(
    left: Tensor, right: Tensor, g: Tensor, old: float, new: float, sides: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """left <- old*left + new*g g^T and right <- old*right + new*g^T g, of the sides that are kept."""
    if sides[0]:
        left = addmm(left, g, g.mT, beta=old, alpha=new)
    if sides[1]:
        right = addmm(right, g.mT, g, beta=old, alpha=new)
    return left, right


def sandwich(left: Tensor, x: Tensor, right: Tensor, sides: tuple[bool, bool]) -> Tensor:
    """left x right, of the sides that are kept."""
    x = left @ x if sides[0] else x
    return x @ right if sides[1] else x


def inverse_root(gram: Tensor, scale: Tensor | float, eps: float, power: float) -> Tensor:
    """(scale*gram + eps)^-power of positive semidefinite matrices."""
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(_finite(gram))
    values = (scale * values.clamp(min=0) + eps).clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors * values.pow(-power).unsqueeze(-2)) @ vectors.mT


def refresh(gram: Tensor, basis: Tensor, *, fresh: bool, sort: bool) -> tuple[Tensor, Tensor]:
    """(a newer eigenbasis of ``gram``, the columns of ``basis`` that its columns follow).

    One power iteration from the old basis, made orthogonal by QR.

    Args:
        fresh: there is no old basis yet: take the exact one.
        sort: by falling eigenvalues, as estimated in the old basis.
    """
    gram = _finite(gram)
    same = torch.arange(gram.shape[-1], device=gram.device).expand(gram.shape[:-1])
    if fresh:
        return _exact_basis(gram), same
    product = gram @ basis
    order = (basis * product).sum(-2).argsort(dim=-1, descending=True) if sort else same
    reflections = torch.geqrf(product.gather(-1, order.unsqueeze(-2).expand_as(product)))  # qr without its R
    return torch.linalg.householder_product(*reflections), order


def _exact_basis(gram: Tensor) -> Tensor:
    """Eigenvectors, largest eigenvalue first.

    The basis of a null space is whatever rounding makes of it, on each machine, rank and layout another, and Adam in that basis
    is another. So it is fixed: the columns of one matrix, the same always, projected into the null space and made
    orthogonal in order. A matrix of full rank is left as it is, but for signs.
    """
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(gram)
    size = gram.shape[-1]
    floor = values[..., -1:] * (10 * size * torch.finfo(gram.dtype).eps)
    null = values <= floor
    places = torch.arange(1, size + 1, dtype=torch.float64, device=gram.device)
    fixed = torch.cos(places[:, None] * places.square()).to(gram.dtype)
    inside = vectors @ (torch.where(null, 1.0, 0.0).to(gram.dtype).unsqueeze(-1) * (vectors.mT @ fixed))
    chosen = torch.where(null.unsqueeze(-2), inside, vectors)  # null ones first: eigenvalues rise
    basis: Tensor = torch.linalg.householder_product(*torch.geqrf(chosen))
    return basis.flip(-1)


def _finite(gram: Tensor) -> Tensor:
    """LAPACK raises on what is not finite; the engine throws such a step away, but later."""
    return torch.where(gram.isfinite(), gram, 0.0)
