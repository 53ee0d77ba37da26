"""Bytes a parameter of training state and gradients, and what is left of the loss when they are few.

(a) A GPT of 50 M parameters: what the arenas hold, and the most bytes of gradients that are alive at once in a step, followed
by their storages. (b) The same training from several seeds in each form, and its loss on held-out files. (c) What a step costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.keep import keep, summary
from thalweg.core import Recipe
from thalweg.engine import Step, build, resolve
from thalweg.engine.evaluate import evaluate
from thalweg.recipes import pycode

FORMS: dict[str, dict[str, Any]] = {
    "fp32 AdamW": {"precision": "fp32"},
    "bf16-pure": {"precision": "bf16-pure"},
    "bf16-pure, int8 slots": {"precision": "bf16-pure", "optimizer.slots": "int8"},
    "bf16-pure, int8 slots, release": {
        "precision": "bf16-pure",
        "optimizer.slots": "int8",
        "optimizer.release_gradients": "one-pass",
    },
}
#: Width, layers and heads: 50.5 and 3.2 million parameters.
MODELS = {"50M": {"width": 512, "layers": 16, "heads": 8}, "3M": {"width": 256, "layers": 4, "heads": 4}}


def made(form: str, model: str, seed: int, steps: int, batch: int, context: int) -> tuple[Step, Any, Any]:
    """(step, feed, what was resolved) of a run."""
    recipe = Recipe().override(
        {
            **{k: v for k, v in pycode.TASK.recipe.items() if k.startswith(("optimizer", "schedule"))},
            "optimizer.lr": 1e-3 if model == "50M" else 2e-3,
            "seed": seed,
            "train.steps": steps,
            "train.batch": batch,
            "train.micro_batch": batch,
            "train.clip": 0.0,
            "device": "cpu",
            "model": {**MODELS[model], "context": context, "dropout": 0.0},
            "data.options": {"context": context, "held_out_windows": 256},
            "evaluate.every": 0,
            **FORMS[form],
        }
    )
    resolved = resolve(pycode.TASK, recipe)
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    return step, resolved.feed, resolved


class LiveGradients:
    """The bytes of gradients alive at once, beside the arenas' buffers: of every storage that a parameter's gradient comes
    in or is put in, until it is freed.
    """

    def __init__(self, step: Step) -> None:
        self.model = step.state.model
        self.buffers = {arena.grads.untyped_storage().data_ptr() for arena in step.state.arenas}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, *gs: Tensor | None) -> None:
        for g in gs:
            if g is not None and g.untyped_storage().data_ptr() not in self.buffers:
                storage = g.untyped_storage()
                self.held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {k: held for k, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.held.values()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what goes into each parameter's accumulation, and at what it makes of it before that is used."""
        handles: list[Any] = []
        nodes = []  # alive as long as their hooks should be
        for p in self.model.parameters():
            node = p.view_as(p).grad_fn
            assert node is not None and node.next_functions[0][0] is not None
            nodes.append(node.next_functions[0][0])
            handles.append(nodes[-1].register_prehook(lambda gs: self.add(*gs)))
            handles.append(p.register_post_accumulate_grad_hook(lambda p: self.add(p.grad)))
        yield
        for handle in handles:
            handle.remove()


def bytes_of(form: str, model: str, context: int) -> dict[str, Any]:
    """(a) and (c) for one form."""
    step, feed, _ = made(form, model, 0, 40, 4, context)
    num = sum(p.numel() for p in step.state.model.parameters())
    windows = iter(feed.windows(0, 40))
    live = LiveGradients(step)
    with live.watching():
        for _ in range(2):
            step.run(next(windows))
    sizes = step.state.nbytes()
    state = sizes["parameters"] + sizes["slots"] + sizes["average"] + sizes["gradients"]
    beside = (
        live.peak if step.release is not None else 0
    )  # with a buffer it is a part of the pass, and joins it at once
    times = []
    for _ in range(5):
        window = next(windows)
        began = time.perf_counter()
        step.run(window)
        times.append(time.perf_counter() - began)
    return {
        "what": "bytes",
        "model": model,
        "form": form,
        "parameters": num,
        "kept, bytes a parameter": state / num,
        "with gradients, bytes a parameter": (state + beside) / num,
        **{f"{name}, bytes": size for name, size in sizes.items()},
        "gradients on their way at once, bytes": live.peak,
        "how": sorted({f"{s.treatment.rule}: {s.update.how}" for a in step.state.arenas for s in a.segments}),
        "a step, s": summary(times),
        "update alone, s": update_time(step) if step.release is None else None,
    }


def update_time(step: Step) -> dict[str, float]:
    """Seconds of the update alone, on the gradients as they are."""
    from thalweg.optim.arena import update

    one = torch.ones(())
    times = []
    for _ in range(9):
        for arena in step.state.arenas:
            arena.grads.fill_(1e-3)
        began = time.perf_counter()
        update(step.state.arenas, lr=one * 1e-5, t=one * 10, divisor=one, skipped=one * 0)
        times.append(time.perf_counter() - began)
    return summary(times)


def trained(form: str, model: str, seed: int, steps: int, batch: int, context: int) -> dict[str, Any]:
    """(b): the held-out loss after ``steps``, and what the training took."""
    step, feed, resolved = made(form, model, seed, steps, batch, context)
    began = time.perf_counter()
    losses = [step.run(window).clone() for window in feed.windows(0, steps)]
    seconds = time.perf_counter() - began
    found = evaluate(step.state, resolved.test, resolved.loss, None, resolved.policy, batch=16)
    row = losses[-1].tolist()
    return {
        "what": "training",
        "model": model,
        "form": form,
        "seed": seed,
        "steps": steps,
        "tokens a step": batch * context,
        "last training loss": row[0] / row[1],
        "held-out loss": found["loss"],
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes_a_parameter", description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of the 50 M model")
    parser.add_argument("--small-steps", type=int, default=400, help="of the small model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--dry", action="store_true", help="keep no results")
    asked = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        row = bytes_of(form, asked.models[0], asked.context)
        rows.append(row)
        print(f"{form:32} {row['kept, bytes a parameter']:6.2f} kept, "
              f"{row['with gradients, bytes a parameter']:6.2f} with the gradients alive at once; "
              f"{row['a step, s']['median']:.2f} s a step; {', '.join(row['how'])}", flush=True)  # fmt: skip
    compared = [form for form in FORMS if form != "bf16-pure"]
    for model in asked.models:
        steps, batch = (asked.steps, asked.batch) if model == "50M" else (asked.small_steps, 4 * asked.batch)
        for seed in range(asked.seeds):
            for form in compared:
                rows.append(trained(form, model, seed, steps, batch, asked.context))
                row = rows[-1]
                print(
                    f"{model:4} seed {seed} {form:32} held-out {row['held-out loss']:.4f} ({row['seconds']:.0f} s)",
                    flush=True,
                )
        means = {
            form: statistics.mean(
                r["held-out loss"] for r in rows if r.get("model") == model and r["form"] == form and "seed" in r
            )
            for form in compared
        }
        for form in compared:
            over = means[form] / means[compared[0]] - 1
            rows.append({"what": "mean", "model": model, "form": form, "held-out loss": means[form], "over fp32": over})
            print(f"{model:4} {form:32} mean {means[form]:.4f} ({over:+.2%} over fp32)", flush=True)
    if not asked.dry:
        command = "python -m benchmarks bytes_a_parameter"
        told = f"--steps {asked.steps} --small-steps {asked.small_steps} --seeds {asked.seeds} --batch {asked.batch}"
        print(keep("bytes_a_parameter", rows, f"{command} {told} --context {asked.context}"))


if __name__ == "__main__":
    main()
