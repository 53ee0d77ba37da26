"""Sequences of different lengths in memory: a batch is padded to its own longest one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thalweg.core import DataError


class Ragged:
    """Token sequences of any length, and one row a sample of whatever belongs to them.

    A micro-batch is padded to the longest of its own sequences, so that with ``data.bucket`` hardly anything is padded.

    Args:
        sequences: the tokens of each sample, at least one; they lie in one flat tensor afterwards.
        rows: further tensors by name, such as labels, one row a sample.
        pad: what stands behind the end of a short sequence.
        multiple: lengths of batches are rounded up to multiples of it, where every length costs something of its own.

    Attributes:
        lengths: int64, of each sample.

    >>> texts = Ragged([[5, 6, 7], [8]], {"labels": torch.tensor([1, 0])})
    >>> texts.gather(torch.tensor([1, 0]))["tokens"].tolist()
    [[8, 0, 0], [5, 6, 7]]
    """

    def __init__(
        self, sequences: Any, rows: Mapping[str, Tensor] | None = None, *, pad: int = 0, multiple: int = 1
    ) -> None:
        self.rows, self.pad, self.multiple = dict(rows or {}), pad, multiple
        found = _tokens(sequences)
        self.lengths: NDArray[np.int64] = np.array([len(one) for one in found], dtype=np.int64)
        if not len(self.lengths) or not self.lengths.min():
            raise DataError(
                "A sequence of the data holds no token." if len(self.lengths) else "The data holds no sample.",
                f"Lengths: {self.lengths[:8].tolist()}.",
                "Give at least one sample, and each at least one token.",
            )
        if multiple < 1 or "tokens" in self.rows:
            raise DataError(
                f"multiple={multiple} is no length." if multiple < 1 else "A tensor of the data is called 'tokens'.",
                "Lengths are rounded up to multiples of it." if multiple < 1 else "So are the sequences in a batch.",
                "Give 1 or more." if multiple < 1 else "Give it another name.",
            )
        if other := {name: len(t) for name, t in self.rows.items() if len(t) != len(self.lengths)}:
            raise DataError(
                "The tensors of the data differ in length.",
                f"tokens: {len(self.lengths)}, {', '.join(f'{name}: {n}' for name, n in other.items())}.",
                "Give each tensor one row a sample.",
            )
        self.flat = torch.cat(found)
        self._starts = torch.from_numpy(np.cumsum(self.lengths) - self.lengths)
        self._lengths = torch.from_numpy(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows, and "tokens": int64 (batch, longest), padded behind."""
        lengths = self._lengths[indices]
        longest = -(-int(lengths.max()) // self.multiple) * self.multiple
        places = torch.arange(longest)
        inside = places < lengths.unsqueeze(1)
        where = (self._starts[indices].unsqueeze(1) + places).clamp(max=len(self.flat) - 1)
        tokens = torch.where(inside, self.flat[where].long(), self.pad)
        return {"tokens": tokens, **{name: t[indices] for name, t in self.rows.items()}}


def _tokens(sequences: Any) -> list[Tensor]:
    """Each sequence as int32."""
    why = "Each is a row of whole numbers."
    try:
        found = [torch.as_tensor(one) for one in sequences]
        if all(t.ndim == 1 and not (len(t) and (t.is_floating_point() or t.is_complex())) for t in found):
            wide = torch.cat([t.long() for t in found]) if found else torch.zeros(0, dtype=torch.int64)
            if not len(wide) or -(2**31) <= int(wide.min()) <= int(wide.max()) < 2**31:
                return list(wide.int().split([len(t) for t in found])) if found else []
            why = f"They are from {int(wide.min())} to {int(wide.max())}, and 32 bits hold them."
    except (TypeError, ValueError, RuntimeError) as err:
        why = f"{why} {type(err).__name__}: {err}"[:300]
    raise DataError(
        "The sequences of the data are no tokens.", why, "Give a list of tensors, arrays or lists of whole numbers."
    )


def lengths_of(source: Any) -> NDArray[np.int64] | None:
    """The lengths of a source's samples, where it says them."""
    found = getattr(source, "lengths", None)
    return found if isinstance(found, np.ndarray) else None
