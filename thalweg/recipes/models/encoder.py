"""An encoder of texts in the manner of BERT (Devlin et al. 2019, arXiv:1810.04805), which takes published weights, with a head.

Shapes: B batch, T time, D width, C classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.checkpoint.convert import read_weights
from thalweg.core import ModelError


class Layer(nn.Module):
    """Attention and MLP, each added to its input and normalised after it."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, seen_B11T: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B11T)
        x_BTD = self.norm_attention(x_BTD + self.drop(self.out(mixed.transpose(1, 2).reshape(B, T, D))))
        x_BTD = self.norm_mlp(x_BTD + self.drop(self.down(F.gelu(self.up(x_BTD)))))
        return x_BTD


class Encoder(nn.Module):
    """Texts to classes: the encoder, the mean or the first of its outputs, and a linear layer that begins at zero.

    Token 0 is padding: it is not looked at.

    Args:
        vocab: number of tokens. context: longest text. width: D. hidden: width of the MLPs.
        classes: C.
        dropout: rate behind the embedding, in each residual branch and before the head.
        pool: "mean" of the outputs of all tokens, or "first".
    """

    def __init__(
        self,
        *,
        vocab: int,
        context: int,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        classes: int = 2,
        dropout: float = 0.1,
        pool: str = "mean",
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "first"):
            raise ModelError(f"pool={pool!r} is not known.", "2 are.", "Use 'mean' or 'first'.")
        self.pool, self.context = pool, context
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.norm, self.drop = nn.LayerNorm(width, eps=eps), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, dropout, eps) for _ in range(layers))
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of shape (B, C) for int64 tokens of shape (B, T)."""
        seen_BT = tokens_BT != 0
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        x_BTD = self.drop(self.norm(x_BTD))
        mask = seen_BT[:, None, None, :]
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask)
        if self.pool == "first":
            pooled = x_BTD[:, 0]
        else:
            kept = seen_BT.unsqueeze(-1).to(x_BTD.dtype)
            pooled = (x_BTD * kept).sum(1) / kept.sum(1).clamp(min=1)
        logits: Tensor = self.head(self.drop(pooled))
        return logits


def read_encoder(folder: Path, **options: Any) -> Encoder:
    """An encoder with the weights of a Hugging Face folder of BERT's kind: ``config.json`` and ``model.safetensors``.

    The embedding of the first segment is added to the positions; a pooler is left out.

    Args:
        options: further arguments of ``Encoder``, such as ``classes``.

    Raises:
        ModelError: for a folder of another kind.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        sizes = {
            "vocab": config["vocab_size"],
            "context": config["max_position_embeddings"],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "hidden": config["intermediate_size"],
            "layers": config["num_hidden_layers"],
            "eps": config["layer_norm_eps"],
        }
    except (OSError, ValueError, KeyError) as err:
        raise ModelError(
            f"{folder} holds no encoder of BERT's kind.", f"config.json: {err}.", "Name the folder of such a model."
        ) from None
    model = Encoder(**sizes, **options)
    theirs = {
        name.removeprefix("bert."): t for name, t in read_weights(str(folder / "model.safetensors")).named().items()
    }
    with torch.no_grad():
        for name, mine in model.named_parameters():
            if not name.startswith("head."):
                mine.copy_(_theirs(name, theirs, folder))
    return model


#: Names here, and names there; what has no entry is called the same, but for what follows the last dot.
_NAMES = {
    "tokens": ("embeddings.word_embeddings",),
    "positions": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "norm_attention": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm_mlp": ("output.LayerNorm",),
}


def _theirs(name: str, theirs: dict[str, Tensor], folder: Path) -> Tensor:
    """The published tensor or tensors for a parameter of ours."""
    path, _, kind = name.rpartition(".")
    *inner, module = path.split(".")
    prefix = f"encoder.layer.{inner[1]}." if inner else ""
    names = [f"{prefix}{theirs_}.{kind}" for theirs_ in _NAMES[module]]
    missing = [one for one in names if one not in theirs]
    if missing:
        raise ModelError(
            f"{folder} holds no encoder of BERT's kind.", f"It has no {missing[0]}.", "Name the folder of such a model."
        )
    found = torch.cat([theirs[one] for one in names])
    if module == "positions":
        found = found + theirs["embeddings.token_type_embeddings.weight"][0]
    return found
