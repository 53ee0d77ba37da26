"""The optimizer engine against the limit of this machine's memory, and against other libraries' optimizers.

About 50 M fp32 parameters in 148 tensors: a 12-layer transformer of width 512 with its embedding. All candidates of a table take
their steps in turn in one process; figures are medians with 95 % intervals, ratios are taken turn by turn.

    python -m benchmarks.optim [--only phase limit peers bits matrix first tiny memory] [--rounds 15]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import thalweg.optim
from benchmarks.keep import keep, summary
from benchmarks.peers import Make, of
from thalweg.optim.face import class_name
from thalweg.rules import RULES, make_rule

TABLES = ("phase", "limit", "peers", "bits", "matrix", "first", "tiny", "memory")
Step = Callable[[], None]


def shapes() -> list[tuple[int, ...]]:
    """148 tensors, 49.6 M numbers."""
    layer = [(1536, 512), (1536,), (512, 512), (512,), (2048, 512), (2048,), (512, 2048), (512,)] + [(512,)] * 4
    return [(22000, 512), (512, 512), *(shape for _ in range(12) for shape in layer), (512,), (512,)]


def parameters(which: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, generator=draw) * 0.02).to(dtype)) for shape in which]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=draw) * 1e-3).to(dtype)
    return params


def ours(rule: str, **options: Any) -> Make:
    return lambda params: getattr(thalweg.optim, class_name(rule))(params, **options)


def in_turn(candidates: Mapping[str, Step], rounds: int, base: str, warm: int = 2) -> dict[str, dict[str, Any]]:
    """Milliseconds of each candidate, and its time over that of ``base`` in the same round."""
    for step in candidates.values():
        for _ in range(warm):
            step()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, step in candidates.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"ms": summary(found), "over base": summary([a / b for a, b in zip(found, times[base])])}
        for name, found in times.items()
    }


def table(
    title: str, candidates: Mapping[str, Step], rounds: int, base: str, warm: int = 2, **more: Any
) -> list[dict[str, Any]]:
    rows = []
    for name, found in in_turn(candidates, rounds, base, warm).items():
        rows.append({"table": title, "candidate": name, "base": base, **found, **more})
        ms, over = found["ms"], found["over base"]
        print(
            f"{title:34} {name:34} {ms['median']:9.2f} ms   {over['median']:6.3f} of {base}"
            f" ({over['low']:.3f} to {over['high']:.3f})",
            flush=True,
        )
    return rows


def steps_of(makers: Mapping[str, Make], which: Sequence[tuple[int, ...]]) -> tuple[dict[str, Step], dict[str, float]]:
    """A step function of each optimizer that can be built here, and the seconds of its first call."""
    steps, first = {}, {}
    for name, make in makers.items():
        params = parameters(which)
        try:
            start = time.perf_counter()
            optimizer = make(params)
            if hasattr(optimizer, "train"):
                optimizer.train()
            optimizer.step()
            first[name] = time.perf_counter() - start
        except (ImportError, AttributeError, ModuleNotFoundError) as err:
            print(f"  {name}: left out ({type(err).__name__}: {err})")
            continue
        steps[name] = optimizer.step
    return steps, first


# ---------------------------------------------------------------------- the tables


def phase(rounds: int) -> list[dict[str, Any]]:
    """Norm, clip, update, average and zeroing of one step."""
    theirs, mine = parameters(shapes()), parameters(shapes())
    fused = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.1, fused=True)
    averages = [p.detach().clone() for p in theirs]

    def by_hand() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        fused.step()
        torch._foreach_lerp_(averages, [p.detach() for p in theirs], 0.001)
        torch._foreach_zero_([p.grad for p in theirs])

    engine = thalweg.optim.AdamW(mine, lr=1e-3, weight_decay=0.1, clip=1.0, average=0.999)

    def by_engine() -> None:
        engine.step()
        torch._foreach_zero_([p.grad for p in mine])

    def by_engine_zeroing() -> None:
        engine.step(zero=True)

    cases = {
        "torch fused + clip_grad_norm_ + foreach EMA": by_hand,
        "thalweg": by_engine,
        "thalweg, zeroed in the update": by_engine_zeroing,
    }
    rows = table("optimizer phase, AdamW", cases, rounds, "thalweg, zeroed in the update")
    gc.collect()
    makers = {
        "thalweg": ours("adamw", lr=1e-3, weight_decay=0.1),
        "thalweg, own kernel": ours("adamw", lr=1e-3, weight_decay=0.1, way="compiled"),
        "torch fused": of("torch.optim", "AdamW", lr=1e-3, weight_decay=0.1, fused=True),
    }
    return rows + table("AdamW update alone", steps_of(makers, shapes())[0], rounds, "torch fused")


def traffic(num: int) -> Any:
    """A rule that reads and writes ``num`` slots and does next to nothing: the limit for rules with as many."""

    def copy(p: Any, g: Any, *slots: Any, lr: Any, t: Any) -> Any:
        return (g * -1e-9, *(s + g for s in slots))

    return make_rule(copy, slots=tuple(f"s{i}" for i in range(num)), name=f"traffic_{num}")


def limit(rounds: int) -> list[dict[str, Any]]:
    """Every element rule's update against one that only moves as many bytes, in place."""
    rows = []
    by_slots: dict[int, list[str]] = {}
    for name in RULES:
        rule = RULES[name]
        parts = thalweg.optim.Program(rule, rule.options({})).parts
        if rule.reads == "element" and not rule.shared and "curvature" not in rule.needs:
            by_slots.setdefault(sum(part.shape == "like" for part in parts), []).append(name)
    for num, names in sorted(by_slots.items()):
        base, bare = f"{num} slots moved", thalweg.optim.face_of(traffic(num))
        for start in range(0, len(names), 8):  # a few at a time: each has its own parameters
            makers: dict[str, Make] = {base: lambda params, bare=bare: bare(params, way="compiled")}
            makers |= {name: ours(name, way="compiled") for name in names[start : start + 8]}
            rows += table("update over moving the bytes", steps_of(makers, shapes())[0], rounds, base, slots=num)
            gc.collect()
    return rows


PEERS: dict[str, dict[str, Make]] = {
    "lion": {
        "timm": of("timm.lion", "Lion", lr=1e-4, foreach=False),
        "pytorch-optimizer": of("pytorch_optimizer", "Lion", lr=1e-4),
        "optimi": of("optimi", "Lion", lr=1e-4, foreach=False),
        "heavyball (compiled)": of("heavyball", "SignLaProp", lr=1e-4, consume_grad=False),
    },
    "adan": {
        "timm": of("timm.adan", "Adan", lr=1e-3),
        "pytorch-optimizer": of("pytorch_optimizer", "Adan", lr=1e-3),
        "optimi": of("optimi", "Adan", lr=1e-3, foreach=False),
    },
    "ademamix": {
        "pytorch-optimizer": of("pytorch_optimizer", "AdEMAMix", lr=1e-3),
        "heavyball (compiled)": of("heavyball", "AdEMAMix", lr=1e-3, consume_grad=False),
    },
    "radam": {
        "torch": of("torch.optim", "RAdam", lr=1e-3),
        "optimi": of("optimi", "RAdam", lr=1e-3, foreach=False),
        "pytorch-optimizer": of("pytorch_optimizer", "RAdam", lr=1e-3),
    },
    "nadam": {
        "torch": of("torch.optim", "NAdam", lr=1e-3),
        "timm": of("timm.nadamw", "NAdamW", lr=1e-3),
    },
    "prodigy": {
        "prodigyopt": of("prodigyopt", "Prodigy", lr=1.0),
        "pytorch-optimizer": of("pytorch_optimizer", "Prodigy", lr=1.0),
    },
    "schedule_free_adamw": {
        "schedulefree": of("schedulefree", "AdamWScheduleFree", lr=2.5e-3, foreach=False),
        "pytorch-optimizer": of("pytorch_optimizer", "ScheduleFreeAdamW", lr=2.5e-3),
        "heavyball (compiled)": of("heavyball", "SFAdamW", lr=2.5e-3, consume_grad=False),
    },
    "adafactor": {
        "torch": of("torch.optim", "Adafactor", lr=1e-2),
        "timm": of("timm.adafactor", "Adafactor", lr=1e-2),
        "timm BigVision": of("timm.adafactor_bv", "AdafactorBigVision", lr=1e-2),
        "pytorch-optimizer": of("pytorch_optimizer", "AdaFactor", lr=1e-2),
    },
}


def peers(rounds: int) -> list[dict[str, Any]]:
    """Rules that no peer has a fused form of."""
    rows = []
    for rule, others in PEERS.items():
        makers = {"thalweg": ours(rule), **others}
        steps, first = steps_of(makers, shapes())
        for row in table(f"{rule} update", steps, rounds, "thalweg"):
            rows.append({**row, "first call, s": first[row["candidate"]]})
        del steps
        gc.collect()
    return rows


def bits(rounds: int) -> list[dict[str, Any]]:
    """Slots in few bits, and parameters in bfloat16."""
    makers: dict[str, Make] = {"torch fused fp32": of("torch.optim", "AdamW", lr=1e-3, fused=True)}
    makers |= {f"thalweg, slots {form}": ours("adamw", slots=form) for form in ("bf16", "bf16+error", "int8")}
    makers |= {"thalweg lion, slots int8": ours("lion", slots="int8")}
    makers |= {"bitsandbytes 8-bit": of("bitsandbytes.optim", "AdamW8bit", lr=1e-3)}
    rows = table("AdamW with slots in few bits", steps_of(makers, shapes())[0], rounds, "torch fused fp32")
    gc.collect()
    steps: dict[str, Step] = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        optimizer = thalweg.optim.AdamW(parameters(shapes(), torch.bfloat16), lr=1e-3, rounding=rounding, slots="bf16")
        steps[f"thalweg, {rounding}"] = optimizer.step
    steps["torch fused (nearest)"] = torch.optim.AdamW(parameters(shapes(), torch.bfloat16), lr=1e-3, fused=True).step
    return rows + table("AdamW, bf16 parameters and slots", steps, rounds, "torch fused (nearest)")


def matrix(rounds: int) -> list[dict[str, Any]]:
    """Rules of whole matrices, on the 48 hidden ones."""
    hidden = [shape for shape in shapes() if len(shape) == 2][2:]
    few = max(rounds // 3, 3)
    muon: dict[str, Make] = {
        "thalweg": ours("muon"),
        "torch": of("torch.optim", "Muon", lr=0.02),
        "timm": of("timm.muon", "Muon", lr=0.02),
        "heavyball (compiled)": of("heavyball", "Muon", lr=0.02, consume_grad=False),
    }
    steps, first = steps_of(muon, hidden)
    rows = [
        {**row, "first call, s": first[row["candidate"]]} for row in table("Muon, 48 matrices", steps, few, "thalweg")
    ]
    del steps
    gc.collect()
    soap: dict[str, Make] = {
        "thalweg": ours("soap", lr=3e-3),
        "pytorch-optimizer (the reference's code)": of("pytorch_optimizer", "SOAP", lr=3e-3),
    }
    steps, first = steps_of(soap, hidden)

    def ten(step: Step) -> Step:  # a whole period: nine steps and one refresh of the bases
        return lambda: [step() for _ in range(10)] and None

    periods = {name: ten(step) for name, step in steps.items()}
    found = table("SOAP, ten steps", periods, 3, "thalweg", warm=0)
    return rows + [{**row, "first call, s": first[row["candidate"]]} for row in found]


_FIRST = """
import time, torch
from benchmarks.optim import parameters, shapes
import thalweg.optim
num = {num}
which = shapes() if num == 148 else [(s[0] // 10 + 1, *s[1:]) for s in shapes() * 10]
params = parameters(which)
start = time.perf_counter()
optimizer = thalweg.optim.{name}(params)
optimizer.step()
print(time.perf_counter() - start, len(params), sum(p.numel() for p in params))
"""


def first(rounds: int) -> list[dict[str, Any]]:
    """Seconds of the first step in a new process with a cold cache of kernels, at 148 and at 1,480 tensors."""
    rows = []
    for name in ("Lion", "AdEMAMix", "LAMB"):
        for num in (148, 1480):
            found = []
            for _ in range(3):
                with tempfile.TemporaryDirectory() as cache:
                    told = subprocess.run(
                        [sys.executable, "-c", _FIRST.format(num=num, name=name)],
                        env={**os.environ, "THALWEG_CACHE": cache},
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                found.append(float(told.stdout.split()[0]))
            rows.append({"table": "first step, cold cache", "candidate": f"{name}, {num} tensors", "s": summary(found)})
            print(f"first step, cold cache: {name}, {num} tensors: {summary(found)['median']:.2f} s", flush=True)
    return rows


def tiny(rounds: int) -> list[dict[str, Any]]:
    """Ten tensors of ten thousand numbers in all: a thousand steps a turn."""
    small = [(50, 20)] * 9 + [(1000,)]
    makers = {
        "torch fused": of("torch.optim", "AdamW", lr=1e-3, fused=True),
        "thalweg AdamW": ours("adamw", lr=1e-3),
        "thalweg Lion": ours("lion"),
        "thalweg Lion, own kernel": ours("lion", way="compiled"),
    }

    def many(step: Step) -> Step:
        return lambda: [step() for _ in range(1000)] and None

    steps = {name: many(step) for name, step in steps_of(makers, small)[0].items()}
    return table("tiny model, 1,000 steps", steps, rounds, "torch fused")


_MEMORY = """
import json, torch
from benchmarks.optim import parameters, shapes
import thalweg.optim

def line(name):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) for l in lines if l.startswith(name)) * 1024

def build(which, **more):
    optimizer = thalweg.optim.{name}(parameters(which), clip=1.0, average=0.999, **more)
    return optimizer

for way in ("compiled", "eager"):  # what is imported and built once is not counted
    build([(64, 32), (32,)], way=way).step()
optimizer = build(shapes(){more})
ps = [p for group in optimizer.param_groups for p in group["params"]]
import ctypes
ctypes.CDLL(None).malloc_trim(0)  # what building left free would hide what steps take
before = line("VmRSS")
for _ in range(3):
    optimizer.step()
kept = {{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values()}}
print(json.dumps([line("VmHWM") - before - sum(kept.values()), sum(p.nbytes for p in ps)]))
"""


def memory(rounds: int) -> list[dict[str, Any]]:
    """Peak of resident memory during steps over what was resident between them."""
    rows = []
    for name, more in (
        ("AdamW", ""),
        ("Lion", ""),
        ("LAMB", ""),
        ("Adafactor", ""),
        ("AdEMAMix", ""),
        ("Lion", ", way='eager'"),
    ):
        told = subprocess.run(
            [sys.executable, "-c", _MEMORY.format(name=name, more=more)], capture_output=True, text=True, check=True
        )
        extra, size = json.loads(told.stdout)
        rows.append({"table": "extra memory in a step", "candidate": name + more, "share": extra / size})
        print(f"extra memory in a step: {name}{more}: {extra / size:.2%} of the parameters", flush=True)
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rules", nargs="+", default=list(PEERS), choices=PEERS, help="of the table of peers")
    parser.add_argument("--keep", default="optim")
    asked = parser.parse_args(arguments)
    for rule in set(PEERS) - set(asked.rules):
        del PEERS[rule]
    warnings.simplefilter("ignore")
    rows = []
    for name in asked.only:
        rows += globals()[name](asked.rounds)
        gc.collect()
    told = keep(asked.keep, rows, " ".join(["python -m benchmarks.optim", *arguments]))
    print(f"kept in {told}")


if __name__ == "__main__":
    main(sys.argv[1:])
