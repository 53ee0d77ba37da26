"""characters: a small GPT on tiny-shakespeare, one character a token: the job of nanoGPT's CPU page."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from thalweg.core import DataError, Loss, Split, Task
from thalweg.data import TokenWindows
from thalweg.recipes.files import data_file, digest, unpacked
from thalweg.recipes.models.gpt import GPT
from thalweg.regularize import cross_entropy

#: Windows that a character is predicted from, in training and in evaluation.
CONTEXT = 64
_TRAIN = 0.9
_LETTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

#: Tables of embeddings learn at five times the rate of the head: a row sees few gradients.
_TABLE = {"rule": "adamw", "lr": 0.05, "options": {"b1": 0.8, "b2": 0.95}}


def model(
    width: int = 128, heads: int = 4, layers: int = 4, dropout: float = 0.0, context: int = CONTEXT, **form: Any
) -> nn.Module:
    """``form``: what else GPT can be told, such as ``activation`` and ``ngrams``."""
    return GPT(len(_LETTERS), context, width, heads, layers, dropout, **form)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
    """Cross-entropy of the next character, in nats, summed over the characters of the batch."""
    return cross_entropy(model(batch["tokens"]), batch["targets"])


def data(context: int = CONTEXT) -> Split:
    """The first 90 % of the text to train on, the rest held out, both cut into windows that follow one another.

    A character is predicted from those of its own window before it, as nanoGPT does.
    """
    path = data_file(
        "tiny_shakespeare.txt.xz",
        what="Tiny-shakespeare",
        source="Karpathy's char-rnn (data/tinyshakespeare/input.txt, packed by xz)",
        sha256="d2476529549e2da7",
    )
    codes = np.full(256, 255, dtype=np.uint8)
    codes[np.frombuffer(_LETTERS.encode(), dtype=np.uint8)] = np.arange(len(_LETTERS), dtype=np.uint8)
    tokens = torch.from_numpy(codes[np.frombuffer(unpacked(path), dtype=np.uint8)])
    if unknown := int((tokens >= len(_LETTERS)).sum()):
        raise DataError(
            f"{path} is not Tiny-shakespeare.",
            f"{unknown} of its {len(tokens)} bytes are none of its {len(_LETTERS)} characters.",
            "Get it anew; for another text write a task of your own (docs/own-task.md).",
        )
    at = int(len(tokens) * _TRAIN)
    facts = {"file": path.name, "sha256": digest(path), "train characters": at, "held-out": len(tokens) - at}
    return Split(train=TokenWindows(tokens[:at], context), test=TokenWindows(tokens[at:], context), facts=facts)


def sample(model: nn.Module) -> str:
    """What the model writes after a blank line."""
    assert isinstance(model, GPT)
    return "".join(_LETTERS[token] for token in model.generate([0], 300)).strip()


TASK = Task(
    name="characters",
    about="a small GPT on tiny-shakespeare, by characters",
    unit="tokens",
    model=model,
    loss=loss,
    data=data,
    sample=sample,
    recipe={
        "train.steps": 100,
        "train.batch": 12,
        "optimizer.rule": "muon",
        "optimizer.lr": 0.02,
        "optimizer.options": {"momentum": 0.9},
        "optimizer.otherwise_lr": 0.01,
        "optimizer.groups": {"type:Embedding": _TABLE},
        "schedule.lr": "warmup(5%) >> cosine(to=0.1)",
        "evaluate.every": 50,
        "evaluate.batch": 64,
        "model.ngrams": 4,
        "model.positions": "rotary",
        "model.qk_norm": True,
        "model.activation": "relu2",
    },
)
