"""A small decoder-only transformer, as a reference for tasks on text.

Shapes: B batch, T time, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.core import ModelError, did_you_mean
from thalweg.device import seeded
from thalweg.recipes.models.ngrams import NGrams

ACTIVATIONS = ("gelu", "relu2")
NORMS = ("layer", "rms")
POSITIONS = ("learned", "rotary")


class Block(nn.Module):
    """Pre-norm attention and MLP, each with dropout on its residual branch.

    Attention weights have no dropout of their own: with it, torch leaves its fused attention on the CPU (LOG.md).

    Args:
        form: the choices of ``GPT`` that its blocks share.
    """

    def __init__(self, width: int, heads: int, dropout: float, form: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.form = heads, form
        self.norm_attention, self.norm_mlp = _norm(width, form["norm"]), _norm(width, form["norm"])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        inner = form["expand"] * width
        self.up, self.down = nn.Linear(width, inner, bias=form["bias"]), nn.Linear(inner, width, bias=form["bias"])
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm_attention(x_BTD)).view(B, T, 3, -1, D // self.heads)  # a part of the heads, where cut
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.form["qk_norm"]:
            q, k = (F.layer_norm(x, x.shape[-1:]) for x in (q, k))
        if self.form["positions"] == "rotary":
            q, k = turned(q), turned(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.drop(self.out(mixed.transpose(1, 2).reshape(B, T, -1)))
        h = self.up(self.norm_mlp(x_BTD))
        h = F.gelu(h) if self.form["activation"] == "gelu" else F.relu(h).square()
        x_BTD = x_BTD + self.drop(self.down(h))
        return x_BTD


def _norm(width: int, kind: str) -> nn.Module:
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width)


def turned(x: Tensor, base: float = 1000.0) -> Tensor:
    """Rotary positions: pairs of numbers of a head turn by an angle in proportion to their place (arXiv:2104.09864).

    Args:
        x: (B, H, T, width of a head), which is even.
        base: the slowest pair turns by 1/base a place.
    """
    half = x.shape[-1] // 2
    speeds = base ** -torch.linspace(0, 1, half, device=x.device)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GPT(nn.Module):
    """Next-token model; as it is by default, with learned positions, layer norms and GELU.

    Args:
        vocab: V, number of tokens.
        context: the longest T.
        width: D. heads: H; divides ``width``.
        layers: number of blocks.
        dropout: rate after the embedding and on residual branches.
        expand: width of the MLP's inside, in widths.
        positions: "learned", a table; "rotary", in the attention (arXiv:2104.09864): the model then has no longest T.
        norm: "layer" or "rms" (arXiv:1910.07467).
        qk_norm: whether queries and keys are normalized in each head (arXiv:2010.04245, arXiv:2302.05442).
        activation: "gelu", or "relu2", the square of ReLU (arXiv:2109.08668): as good for less work.
        bias: whether the MLP's layers have biases.
        zero_init: whether what writes into the residual stream, and the head, begin at 0: each block is the identity at
            first (arXiv:1901.09321), and the first loss is that of equal chances.
        ngrams: embeddings of the last 2, ..., ``ngrams`` tokens together are added to that of the token (``ngrams.py``); 1: none.
        ngram_rows: rows of each of their tables.

    Attributes:
        tp_plan: how its layers are cut where ranks compute them together.
    """

    tp_plan: ClassVar[dict[str, str]] = {
        "blocks.*.qkv": "colwise:3",
        "blocks.*.out": "rowwise",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "head": "colwise_gather_output",
    }

    def __init__(
        self,
        vocab: int = 256,
        context: int = 128,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
        dropout: float = 0.0,
        *,
        expand: int = 4,
        positions: str = "learned",
        norm: str = "layer",
        qk_norm: bool = False,
        activation: str = "gelu",
        bias: bool = True,
        zero_init: bool = False,
        ngrams: int = 1,
        ngram_rows: int = 8192,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("positions", positions, POSITIONS),
            ("norm", norm, NORMS),
            ("activation", activation, ACTIVATIONS),
        ):
            if value not in known:
                raise ModelError(
                    f"GPT({name}={value!r}) is not known.", f"{len(known)} are.", did_you_mean(str(value), known)
                )
        form = {
            "expand": expand,
            "positions": positions,
            "norm": norm,
            "qk_norm": qk_norm,
            "activation": activation,
            "bias": bias,
        }
        self.context = context
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width) if positions == "learned" else None
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, form) for _ in range(layers)))
        self.norm = _norm(width, norm)
        self.head = nn.Linear(width, vocab, bias=False)
        self.ngrams = NGrams(vocab, width, ngrams, ngram_rows) if ngrams > 1 else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith((".out", ".down")):
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5)
            if zero_init and isinstance(module, nn.Linear) and name.endswith(("out", "down", "head")):
                nn.init.zeros_(module.weight)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of shape (B, T, V) for int64 tokens of shape (B, T)."""
        x_BTD = self.tokens(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        if self.ngrams is not None:
            x_BTD = x_BTD + self.ngrams(tokens_BT)
        logits_BTV: Tensor = self.head(self.norm(self.blocks(self.drop(x_BTD))))
        return logits_BTV

    @torch.no_grad()
    def generate(self, start: list[int], num: int, *, temperature: float = 0.7, seed: int = 0) -> list[int]:
        """``num`` tokens after ``start``, drawn from a stream of its own."""
        device = self.head.weight.device
        draw = seeded(device, seed)
        tokens = torch.tensor([start], device=device)
        for _ in range(num):
            logits = self(tokens[:, -self.context :])[:, -1].float() / temperature
            drawn = torch.multinomial(logits.softmax(-1).to(draw.device), 1, generator=draw)
            tokens = torch.cat([tokens, drawn.to(device)], dim=1)
        return [int(token) for token in tokens[0].tolist()]
