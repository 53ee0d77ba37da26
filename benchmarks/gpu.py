"""What a GPU gives: GPT-2 124 M in bf16 at 1024 tokens by every way of ``compile``, beside a plain loop with torch.compile; and
nets of the digits' size beside the loop that everybody writes. All arms in turn, in one process, medians.

The use of the chip is 6 * parameters + 12 * layers * width * tokens operations a token (Chowdhery et al. 2022, appendix B), over
what the chip's data sheet states; without a data sheet it is left out. It is made to take about eight minutes on an H100.

    python -m benchmarks.gpu [--rounds 7] [--device cpu --small]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.keep import keep, summary
from thalweg.core import Loss, Recipe, Split, Task
from thalweg.device import Device, choose
from thalweg.device.chips import chip_here
from thalweg.engine import build, resolve
from thalweg.recipes.models.convnet import ConvNet
from thalweg.recipes.models.gpt import GPT

Run = Callable[[], None]  # one step
LR, DECAY = 3e-4, 0.1


class TiedGPT(GPT):
    """GPT-2's form: the output layer is the embedding."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)
        self.head.weight = self.tokens.weight


def next_token(model: nn.Module, batch: Any) -> Loss:
    tokens = batch["tokens"]
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    return Loss(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel())


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def engine(model: nn.Module, loss: Any, data: Any, device: Device, **changes: Any) -> tuple[Run, float]:
    """(one step of thalweg, seconds until the first was done)."""
    fixed = {
        "device": str(device.torch_device),
        "train.steps": 1_000_000,
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "optimizer.options.b2": 0.95,
        "checkpoint.every": 0,
        "evaluate.every": 0,
    }
    resolved = resolve(Task(model=model, loss=loss, data=Split(train=data)), Recipe().override({**fixed, **changes}))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    windows = resolved.feed.windows(0, 1_000_000)
    begun = time.perf_counter()
    step.run(next(windows))
    device.synchronize()
    return lambda: (step.run(next(windows)), None)[1], time.perf_counter() - begun


def plain(
    model: nn.Module, loss: Any, data: Any, device: Device, batch: int, compiled: bool, half: bool
) -> tuple[Run, float]:
    """(one step of a loop by hand, seconds until the first was done): autocast, fused AdamW, clipping, pinned batches."""
    model = model.to(device.torch_device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    called: Any = torch.compile(model) if compiled else model

    def batches() -> Iterator[Any]:
        size = len(next(iter(data.values())))
        while True:
            which = torch.randint(size, (batch,))
            taken = {name: values[which] for name, values in data.items()}
            if device.pins:
                taken = {name: values.pin_memory() for name, values in taken.items()}
            yield {name: values.to(device.torch_device, non_blocking=True) for name, values in taken.items()}

    source = batches()

    def run() -> None:
        given = next(source)
        with torch.autocast(device.kind, dtype=torch.bfloat16, enabled=half):
            value = loss(called, given)
        mean = value[0] / value[1] if isinstance(value, tuple) else value
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    begun = time.perf_counter()
    run()
    device.synchronize()
    return run, time.perf_counter() - begun


def in_turn(runs: dict[str, Run], device: Device, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a step of each, in windows of about ``seconds``, one after the other."""
    lengths = {}
    for name, run in runs.items():
        for _ in range(4):  # what is recorded is recorded now
            run()
        device.synchronize()
        begun = time.perf_counter()
        run()
        device.synchronize()
        lengths[name] = max(1, min(500, round(seconds / max(time.perf_counter() - begun, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            begun = time.perf_counter()
            for _ in range(lengths[name]):
                runs[name]()
            device.synchronize()
            times[name].append((time.perf_counter() - begun) / lengths[name])
    return times


def ways(device: Device) -> list[str]:
    return ["off", "model", "step", *(["captured"] if device.captures_graphs else [])]


def gpt(device: Device, rounds: int, small: bool) -> dict[str, Any]:
    size: dict[str, Any] = {"vocab": 50304, "context": 1024, "width": 768, "heads": 12, "layers": 12}
    batch, num, seconds = 32, 512, 4.0
    if small:
        size, batch, num, seconds = {"vocab": 96, "context": 32, "width": 32, "heads": 2, "layers": 2}, 4, 32, 0.2
    data = {"tokens": torch.randint(size["vocab"], (num, size["context"] + 1))}
    made: dict[str, tuple[Run, float]] = {}

    def model() -> nn.Module:
        torch.manual_seed(0)
        return TiedGPT(**size)

    made["by hand, torch.compile"] = plain(model(), next_token, data, device, batch, True, True)
    for way in ways(device):
        changes = {"precision": "bf16", "train.batch": batch, "compile": way}
        made[f"thalweg {way}"] = engine(model(), next_token, data, device, **changes)
    times = in_turn({name: run for name, (run, _) in made.items()}, device, rounds, seconds)
    parameters = sum(p.numel() for p in model().parameters())
    tokens = batch * size["context"]
    flops = tokens * (6 * parameters + 12 * size["layers"] * size["width"] * size["context"])
    chip = chip_here(device.name(), device.memory_bytes())
    arms = {}
    for name, values in times.items():
        found = statistics.median(values)
        arms[name] = {
            "ms a step": summary([1e3 * v for v in values]),
            "tokens/s": tokens / found,
            "to the first, s": made[name][1],
        }
        if chip is not None:
            arms[name]["model FLOPs use"] = flops / found / chip.rate("bf16")
    title = "GPT-2 124 M, bf16, 1024 tokens" if not small else "GPT, very small"
    return {
        "workload": title,
        "parameters": parameters,
        "batch": batch,
        "chip": chip.name if chip else None,
        "arms": arms,
    }


#: name: (model, shape of a sample)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits net": (lambda: ConvNet(dropout=0.2), (1, 8, 8)),
    "MLP 64-128-10": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), (64,)),
}


def net(name: str, device: Device, rounds: int, small: bool) -> dict[str, Any]:
    make, shape = NETS[name]
    data = {"x": torch.randn(4096, *shape), "y": torch.randint(0, 10, (4096,))}
    torch.manual_seed(0)
    made = {"by hand, plain": plain(make(), classify, data, device, 64, False, False)}
    for way in ways(device):
        torch.manual_seed(0)
        changes = {"precision": "fp32", "train.batch": 64, "compile": way}
        made[f"thalweg {way}"] = engine(make(), classify, data, device, **changes)
    times = in_turn({name: run for name, (run, _) in made.items()}, device, rounds, 0.1 if small else 0.5)
    arms = {
        arm: {
            "us a step": summary([1e6 * v for v in values]),
            "times by hand": summary([a / b for a, b in zip(times["by hand, plain"], values)]),
            "to the first, s": made[arm][1],
        }
        for arm, values in times.items()
    }
    return {"workload": name, "arms": arms}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs; nothing is kept")
    given = parser.parse_args(arguments)
    device, _ = choose(given.device)
    torch.set_float32_matmul_precision("high")  # for the loops by hand; thalweg sets what its recipe says
    rows = [gpt(device, given.rounds, given.small)]
    rows += [net(name, device, given.rounds, given.small) for name in NETS]
    for row in rows:
        print(row["workload"])
        for arm, found in row["arms"].items():
            print(f"  {arm:24} " + ", ".join(f"{key} {_median(value):.4g}" for key, value in found.items()))
    if not given.small:
        print(keep("gpu", rows, "python -m benchmarks.gpu"))


def _median(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


if __name__ == "__main__":
    main()
