"""What our dropout costs against torch's: forward and backward pass of one layer, in turn, eager and compiled."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.keep import keep, summary
from thalweg.regularize import Dropout, Streams, connect

SHAPES = ((16, 128, 128), (32, 64, 16, 16), (64, 256))
P, CALLS = 0.1, 20


def pass_of(layer: nn.Module, x: torch.Tensor, begin: Callable[[int], Any]) -> Callable[[], None]:
    """Some forward and backward passes, each as a step would do it."""
    seed = torch.ones_like(x)
    count = iter(range(10**9))

    def run() -> None:
        for _ in range(CALLS):
            begin(next(count))
            torch.autograd.grad(layer(x), x, seed)

    return run


def measure(shape: tuple[int, ...], dtype: torch.dtype, *, compiled: bool, rounds: int) -> dict[str, Any]:
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    ours = Dropout(P)
    streams = Streams(0, "cpu", by_sample=True)
    connect(nn.Sequential(ours), streams)
    layers: list[nn.Module] = [nn.Dropout(P), ours]
    if compiled:
        layers = [torch.compile(layer, fullgraph=True) for layer in layers]  # type: ignore[misc]
    begins: list[Callable[[int], Any]] = [lambda step: None, lambda step: streams.begin(step, 0, 0, shape[0])]
    runs = [pass_of(layer, x, begin) for layer, begin in zip(layers, begins)]
    for run in runs:
        run()
    ratios, times = [], []
    for k in range(rounds):
        taken = [0.0, 0.0]
        for which in (0, 1) if k % 2 else (1, 0):
            began = time.perf_counter()
            runs[which]()
            taken[which] = (time.perf_counter() - began) / CALLS
        ratios.append(taken[1] / taken[0])
        times.append(taken[1] * 1e6)
    told = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
    return {**told, "ours over torch": summary(ratios), "ours, us": summary(times)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropout", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    asked = parser.parse_args(arguments)
    rows = []
    for compiled in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                rows.append(measure(shape, dtype, compiled=compiled, rounds=asked.rounds))
                ratio = rows[-1]["ours over torch"]
                print(f"{rows[-1]['shape']:14} {rows[-1]['dtype']:9} {'compiled' if compiled else 'eager':9}"
                      f" {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")  # fmt: skip
    print(keep("dropout", rows, f"python -m benchmarks.dropout --rounds {asked.rounds}"))


if __name__ == "__main__":
    main()
