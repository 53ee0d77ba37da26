"""A small decoder-only transformer, as a reference for tasks on text.

Shapes: B batch, T time, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.device import causal_attention, seeded


class Block(nn.Module):
    """Pre-norm attention and MLP, each with dropout on its residual branch.

    Attention weights have no dropout of their own: with it, torch leaves its fused attention on the CPU (LOG.md).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm_attention(x_BTD)).view(B, T, 3, -1, D // self.heads)  # a part of the heads, where cut
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = causal_attention(q, k, v)
        x_BTD = x_BTD + self.drop(self.out(mixed.transpose(1, 2).reshape(B, T, -1)))
        x_BTD = x_BTD + self.drop(self.down(F.gelu(self.up(self.norm_mlp(x_BTD)))))
        return x_BTD


class GPT(nn.Module):
    """Next-token model with learned positions.

    Args:
        vocab: V, number of tokens.
        context: the longest T.
        width: D. heads: H; divides ``width``.
        layers: number of blocks.
        dropout: rate after the embedding and on residual branches.

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
    ) -> None:
        super().__init__()
        self.context = context
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith((".out", ".down")):
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of shape (B, T, V) for int64 tokens of shape (B, T)."""
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.drop(self.tokens(tokens_BT) + self.positions(places))
        logits_BTV: Tensor = self.head(self.norm(self.blocks(x_BTD)))
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
