"""Embeddings of the last few tokens together: what often follows them is read from a table, not computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PRIME = 1_000_003


class NGrams(nn.Module):
    """The sum of one embedding for each n from 2 to ``longest``: that of the last n tokens, this one among them.

    n-grams that fit into ``rows`` have a row each; of longer ones several share a row, by their remainder (feature hashing,
    arXiv:0902.2206; in language models arXiv:2501.16975). Places before a window's beginning hold a token of their own.

    Args:
        vocab: V, number of tokens. width: D.
        longest: the largest n, 2 or more.
        rows: of each table.

    Cost: rows*D parameters for each n; one gather forward and one sum backward for each.
    """

    def __init__(self, vocab: int, width: int, longest: int, rows: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab + 1, rows
        self.sizes = [min(rows, self.vocab**n) for n in range(2, longest + 1)]
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in self.sizes)

    def codes(self, tokens_BT: Tensor) -> list[Tensor]:
        """For each n, the row (B, T) of every place."""
        code, before, found = tokens_BT, tokens_BT, []
        for size in self.sizes:
            before = F.pad(before[:, :-1], (1, 0), value=self.vocab - 1)
            if size < self.rows:
                code = code * self.vocab + before
            else:
                code = (code * _PRIME + before) % size
            found.append(code)
        return found

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, D) for int64 tokens of shape (B, T)."""
        parts = [table(code) for table, code in zip(self.tables, self.codes(tokens_BT))]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
