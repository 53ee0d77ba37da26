"""Random bits without a generator: pure functions of integers, the same in every order, on every device, after a resume.

All arithmetic is that of 32-bit integers, which wraps alike everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_FIRST, _SECOND = 0x7FEB352D, -2073254261  # the second is 0x846ca68b as a signed number
_elements: dict[torch.device, Tensor] = {}


def hashed(index: Tensor, key: Tensor | int, salt: int) -> Tensor:
    """32 well-mixed bits for each element: an integer hash of (key, salt, index), int32.

    The multipliers are those of the "lowbias32" hash (Chris Wellons, nullprogram.com/blog/2018/07/31).
    """
    x = index ^ (key + (salt * 0x9E3779B1 & 0x7FFFFFFF))
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def element_bits(keys: Tensor, num: int) -> Tensor:
    """Random bits for ``num`` elements under each of several keys.

    The elements' own hash is kept from call to call, so that a call costs six passes of integer arithmetic; a whole hash
    of each element would take twelve.

    Args:
        keys: (rows, 1), int32, well mixed.
        num: elements of each row.

    Returns:
        (rows, num), int32, new memory: uniform over all 32-bit numbers. The high bits are the better ones.
    """
    x = (_hashes(num, keys.device) ^ keys).mul_(_FIRST)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    return x.mul_(_SECOND)


def _hashes(num: int, device: torch.device) -> Tensor:
    """(1, num): a hash of each element's number. Those of a shorter row are the first of a longer one."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:  # no tensor of a trace is kept
        return _new_hashes(num, device)
    known = _elements.get(device)
    if known is None or known.shape[1] < num:
        with torch.inference_mode(False):
            known = _elements[device] = _new_hashes(num, device)
    return known[:, :num]


def _new_hashes(num: int, device: torch.device) -> Tensor:
    return hashed(torch.arange(num, dtype=torch.int32, device=device), 0x3C6EF372, 1).view(1, num)
