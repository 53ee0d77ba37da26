"""What recomputation saves and costs: a GPT of 24 blocks, activations and time of a forward and backward pass, in turn."""

from __future__ import annotations

import argparse
import time
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.keep import keep, summary
from thalweg.engine.recompute import recomputed
from thalweg.recipes.models.gpt import GPT

WAYS = ("none", "blocks", "ops")


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still there.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for x in _tensors(result):
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self._known[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [x for part in value for x in _tensors(part)]
    return [x for part in value.values() for x in _tensors(part)] if isinstance(value, dict) else []


def passes(model: nn.Module, tokens: Tensor, alive: Alive | None = None) -> int:
    """A forward and a backward pass; the bytes that were kept between them."""
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    kept = alive.now if alive is not None else 0
    loss.backward()
    return kept


def bytes_of(model: nn.Module, tokens: Tensor) -> dict[str, float]:
    """MiB kept for the backward pass, and at the peak; gradients lie there before."""
    with Alive() as alive:
        kept = passes(model, tokens, alive)
    return {"kept, MiB": kept / 2**20, "peak, MiB": alive.peak / 2**20}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    asked = parser.parse_args(arguments)
    rows = []
    for dropout in (0.0, 0.1):
        torch.manual_seed(0)
        model = GPT(width=asked.width, heads=4, context=asked.context, layers=asked.layers, dropout=dropout)
        tokens = torch.randint(0, 256, (asked.batch, asked.context))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        found = {}
        for how in WAYS:
            with recomputed(model, how):
                passes(model, tokens)
                found[how] = bytes_of(model, tokens)
        times: dict[str, list[float]] = {how: [] for how in WAYS}
        for k in range(asked.rounds):
            for how in WAYS[k % 3 :] + WAYS[: k % 3]:
                with recomputed(model, how):
                    began = time.perf_counter()
                    passes(model, tokens)
                    times[how].append(time.perf_counter() - began)
        for how in WAYS:
            share = {name: found[how][name] / found["none"][name] for name in found[how]}
            ratio = summary([mine / plain for mine, plain in zip(times[how], times["none"])])
            rows.append(
                {
                    "recompute": how,
                    "dropout": dropout,
                    "layers": asked.layers,
                    "width": asked.width,
                    "context": asked.context,
                    "batch": asked.batch,
                    **found[how],
                    "kept over none": share["kept, MiB"],
                    "peak over none": share["peak, MiB"],
                    "time over none": ratio,
                    "time, s": summary(times[how]),
                }
            )
            print(
                f"{how:7} dropout {dropout:g}: kept {found[how]['kept, MiB']:.1f} MiB ({share['kept, MiB']:.3f}), "
                f"peak {found[how]['peak, MiB']:.1f} MiB ({share['peak, MiB']:.3f}), "
                f"time {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            )
    print(keep("recompute", rows, f"python -m benchmarks.recompute --rounds {asked.rounds}"))


if __name__ == "__main__":
    main()
