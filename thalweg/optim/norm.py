"""The global norm of gradients: one read of them, nothing written, nothing read back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import flat, is_sharded
from thalweg.optim.lower import WORTH_COMPILING


@cache
def _squares(dtype: torch.dtype) -> Any:
    """The kernel that adds up squares, or None where none can be built."""
    from thalweg.optim.native import NoCompiler, native_sums

    wide = torch.promote_types(dtype, torch.float32)
    try:
        return native_sums(lambda g: [g.to(wide).square().sum()], {"g": ("full", dtype)}, 1)
    except NoCompiler:
        return None


def norm_dtype(gs: Sequence[Tensor]) -> torch.dtype:
    """What the norm of all of these is given in: the widest of theirs, and at least float32."""
    return reduce(torch.promote_types, (g.dtype for g in gs), torch.float32)


def global_norm(gs: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all elements of all tensors, 0-dim, in at least float32; infinite or NaN if any element is."""
    if is_sharded(gs):
        return _sharded_norm(gs)
    if len(gs) == 1:
        return _norm([gs[0]])
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for g in gs:
        groups.setdefault((g.dtype, g.device), []).append(g)
    norms = [_norm(group) for group in groups.values()]
    if len(norms) == 1:
        return norms[0]
    wide = reduce(torch.promote_types, (n.dtype for n in norms))
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, wide) for n in norms]))
    return total


def _sharded_norm(gs: Sequence[Tensor]) -> Tensor:
    """Each rank's own part, added up once for each way of sharding."""
    from thalweg.optim.sharded import added_up, layout, local

    groups: dict[Any, list[Tensor]] = {}
    for g in gs:
        groups.setdefault(layout(g), []).append(g)
    squares = [added_up(global_norm([local(g) for g in group]).square(), group[0]) for group in groups.values()]
    return torch.stack(squares).sum().sqrt()


def _norm(gs: list[Tensor]) -> Tensor:
    first = gs[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    if first.device.type == "cpu" and len(gs) > 1 and sum(g.numel() for g in gs) >= WORTH_COMPILING:
        squares = _squares(first.dtype)
        lain = [flat(g) for g in gs]
        if squares is not None and all(g is not None or not gs[i].numel() for i, g in enumerate(lain)):
            total: Tensor = squares([gs], {})[0].sqrt()
            return total
    norms = torch._foreach_norm(gs, 2, dtype=wide) if len(gs) > 1 else [torch.linalg.vector_norm(first, dtype=wide)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(list(norms)))
