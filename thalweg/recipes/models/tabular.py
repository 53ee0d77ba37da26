"""A multi-layer perceptron for rows of numbers and categories, with what makes it as good as trees on them.

Shapes: B rows, N numbers, P pieces or waves of a number, E width of an embedding, K members, W width, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.core import ModelError
from thalweg.core.errors import did_you_mean

_EMBEDDINGS = ("scores", "pieces", "waves")


class Pieces(nn.Module):
    """Numbers as piecewise-linear codes: piece ``i`` of ``num`` goes from 0 to 1 while the number crosses it.

    The numbers are places in [0, 1] among the training values, so that pieces of one length hold as many rows each: the
    quantile bins of Gorishniy et al. 2022 (arXiv:2203.05556).

    >>> Pieces(4)(torch.tensor([[0.375]])).tolist()
    [[[1.0, 0.5, 0.0, 0.0]]]
    """

    starts: Tensor

    def __init__(self, num: int) -> None:
        super().__init__()
        self.num = num
        self.register_buffer("starts", torch.arange(num, dtype=torch.float32), persistent=False)

    def forward(self, places_BN: Tensor) -> Tensor:
        return (places_BN.unsqueeze(-1) * self.num - self.starts).clamp(0, 1)


class Waves(nn.Module):
    """Numbers as sines and cosines of trained frequencies (Gorishniy et al. 2022), of their normal scores.

    Args:
        numbers: N.
        num: P, half of them sines.
        spread: deviation of the frequencies at the start.
    """

    def __init__(self, numbers: int, num: int, spread: float) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(numbers, num // 2) * spread)

    def forward(self, places_BN: Tensor) -> Tensor:
        angles = 2 * math.pi * normal_scores(places_BN).unsqueeze(-1) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


def normal_scores(places: Tensor) -> Tensor:
    """Places in [0, 1] as the values of a normal distribution that stand there; the outermost 0.1 % at 3.1 deviations."""
    scores: Tensor = torch.special.ndtri(places.clamp(1e-3, 1 - 1e-3))
    return scores


class Each(nn.Module):
    """A linear layer of its own for each number, and the positive part: (B, N, P) to (B, N, E)."""

    def __init__(self, numbers: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(numbers, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(numbers, outputs).uniform_(-bound, bound))

    def forward(self, x_BNP: Tensor) -> Tensor:
        x_BNE: Tensor = F.relu(torch.einsum("bnp,npe->bne", x_BNP, self.weight) + self.bias)
        return x_BNE


class Tabular(nn.Module):
    """A perceptron over embedded columns; several members may share all but signs at the input and their outputs.

    Members are a BatchEnsemble (Wen et al. 2020, arXiv:2002.06715) in the small form of TabM (Gorishniy et al. 2024,
    arXiv:2410.24210): each has random signs on the embedded row and output weights of its own, and all are trained at once.

    Args:
        numbers: N, columns of numbers, each a place in [0, 1] among the training values.
        categories: number of values of each column of categories.
        outputs: O.
        width, layers: of the hidden layers.
        dropout: rate behind each of them.
        embed: of numbers: "scores" (the normal score alone), "pieces" or "waves".
        pieces: P. embed_width: E, for numbers and, at most, for categories.
        spread: of the frequencies of waves.
        members: K.
    """

    def __init__(
        self,
        numbers: int,
        categories: Sequence[int],
        outputs: int = 1,
        *,
        width: int = 128,
        layers: int = 2,
        dropout: float = 0.1,
        embed: str = "pieces",
        pieces: int = 32,
        embed_width: int = 16,
        spread: float = 0.3,
        members: int = 8,
    ) -> None:
        super().__init__()
        if embed not in _EMBEDDINGS:
            raise ModelError(
                f"model.embed={embed!r} is not known.", f"{len(_EMBEDDINGS)} are.", did_you_mean(embed, _EMBEDDINGS)
            )
        counts = {"width": width, "layers": layers, "pieces": pieces, "embed_width": embed_width, "members": members}
        for name, size in counts.items():
            if size < 1:
                raise ModelError(f"model.{name}={size} leaves nothing.", "It is a count.", "Give 1 or more.")
        self.embed, self.members = embed, members
        if embed == "scores":
            inputs = numbers
        else:
            self.code = Pieces(pieces) if embed == "pieces" else Waves(numbers, pieces, spread)
            self.each, inputs = Each(numbers, pieces, embed_width), numbers * embed_width
        self.tables = nn.ModuleList(nn.Embedding(n, min(embed_width, (n + 1) // 2)) for n in categories)
        inputs += sum(min(embed_width, (n + 1) // 2) for n in categories)
        self.signs = nn.Parameter(
            torch.randint(0, 2, (members, inputs)) * 2.0 - 1 if members > 1 else torch.ones(1, inputs)
        )
        blocks: list[nn.Module] = []
        for before in (inputs, *[width] * (layers - 1)):
            blocks += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*blocks)
        bound = width**-0.5
        self.out = nn.Parameter(torch.empty(members, width, outputs).uniform_(-bound, bound))
        self.out_bias = nn.Parameter(torch.zeros(members, outputs))

    def forward(self, numbers_BN: Tensor, categories: Tensor) -> Tensor:
        """Outputs of shape (B, K, O)."""
        columns = normal_scores(numbers_BN) if self.embed == "scores" else self.each(self.code(numbers_BN)).flatten(1)
        row = torch.cat([columns, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        hidden_BKW = self.hidden(row.unsqueeze(1) * self.signs)
        return torch.einsum("bkw,kwo->bko", hidden_BKW, self.out) + self.out_bias
