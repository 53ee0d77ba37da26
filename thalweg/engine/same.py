"""Whether tensors are the same on all ranks, told by a digest; and making them so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from thalweg.parallel import Ranks


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the bytes of tensors, in their order."""
    whole = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return whole.hexdigest()


def take_first_weights(model: nn.Module, ranks: Ranks) -> list[int]:
    """Parameters and buffers of the first rank, on every rank; each of them calls this.

    Returns:
        The ranks that had others.
    """
    whole = [p.detach() for p in model.parameters()] + list(model.buffers())
    told = ranks.told(digest_of(whole))
    ranks.copy(whole)
    return [rank for rank, one in enumerate(told) if one != told[0]]


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor that lies in parts; another one as it is."""
    found: Tensor = x._local_tensor if hasattr(x, "_local_tensor") else x
    return found.detach()
