"""pycode: a small GPT on the source code of Python's own standard library, which is on every machine."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thalweg.core import DataError, Loss, Split, Task
from thalweg.data import TokenWindows
from thalweg.recipes.models.gpt import GPT
from thalweg.regularize import accuracy, cross_entropy

_HELD_OUT = 32  # one file in so many, by the hash of its name
_CONTEXT = 128


def model(
    width: int = 128, heads: int = 4, layers: int = 4, dropout: float = 0.05, context: int = _CONTEXT
) -> nn.Module:
    return GPT(vocab=256, context=context, width=width, heads=heads, layers=layers, dropout=dropout)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
    """Cross-entropy of the next byte, in nats, summed over the bytes of the batch."""
    return cross_entropy(model(batch["tokens"]), batch["targets"])


def data(context: int = _CONTEXT, held_out_windows: int = 512, limit_bytes: int = 0) -> Split:
    """Bytes of all standard-library sources but ``site-packages``, files apart by a NUL.

    Args:
        context: bytes in a window.
        held_out_windows: windows of held-out files that an evaluation reads; 0: all.
        limit_bytes: stop reading files here; 0: no limit.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, test, files = bytearray(), bytearray(), 0
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in ("site-packages", "dist-packages", "__pycache__"))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and not (limit_bytes and len(train) > limit_bytes):
                files += 1
                key = hashlib.sha256(str(path.relative_to(root)).encode()).digest()
                (test if key[0] % _HELD_OUT == 0 else train).extend(path.read_bytes() + b"\0")
    if not train or not test:
        raise DataError(
            "This Python has no source code of its standard library.",
            f"{files} files under {root}.",
            "Use a Python that was installed with its sources.",
        )
    tokens = torch.frombuffer(test, dtype=torch.uint8)
    if held_out_windows:
        tokens = _spread(tokens, context, held_out_windows)
    facts: dict[str, Any] = {
        "source": str(root),
        "files": files,
        "train bytes": len(train),
        "held-out bytes": len(test),
        "sha256": hashlib.sha256(train).hexdigest()[:16],
    }
    return Split(
        train=TokenWindows(torch.frombuffer(train, dtype=torch.uint8), context),
        test=TokenWindows(tokens, context),
        facts=facts,
    )


def _spread(tokens: torch.Tensor, context: int, num: int) -> torch.Tensor:
    """About ``num`` windows, spread evenly over all held-out files."""
    whole = (tokens.numel() - 1) // context
    if whole <= num:
        return tokens
    starts = torch.arange(num) * (whole // num) * context
    return torch.cat([*(tokens[start : start + context] for start in starts.tolist()), tokens[:1]])


def metrics(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Loss]:
    return {"accuracy": accuracy(model(batch["tokens"]), batch["targets"])}


def sample(model: nn.Module) -> str:
    """What the model writes after ``def``."""
    assert isinstance(model, GPT)
    written = model.generate(list(b"\ndef "), 400)
    return bytes(written).decode("utf-8", errors="replace").strip("\n\0")


TASK = Task(
    name="pycode",
    about="a small GPT on the source code of Python's standard library",
    unit="tokens",
    model=model,
    loss=loss,
    data=data,
    metrics=metrics,
    sample=sample,
    recipe={
        "train.steps": 1500,
        "train.batch": 16,
        "train.micro_batch": 8,
        "train.clip": 1.0,
        "optimizer.rule": "adamw",
        "optimizer.lr": 4e-3,
        "optimizer.weight_decay": 0.1,
        "optimizer.options": {"b2": 0.99},
        "optimizer.no_decay": ["bias", "norm", "1d", "embedding"],
        "schedule.lr": "warmup(5%) >> cosine(to=0.05)",
        "regularize.average": 0.99,
    },
)
