"""Bytes a parameter of training state and gradients, and what is left of the loss when they are few.

(a) A GPT of 50 M parameters: what the arenas hold, and the most bytes of gradients that are alive at once in a step, followed
by their storages. (b) The same training from several seeds in each form, and its loss on held-out files. (c) What a step costs.
(d) The pycode recipe as it is, in float32 and with bfloat16 weights of both roundings: differences beside the spread of seeds.

What is known is kept after every training, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
#: The pycode recipe: float32 first.
ROUNDED: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16-pure, stochastic": {"precision": "bf16-pure", "optimizer.rounding": "stochastic"},
    "bf16-pure, kahan": {"precision": "bf16-pure", "optimizer.rounding": "kahan"},
}
#: Width, layers and heads: 50.5 and 3.2 million parameters.
MODELS = {"50M": {"width": 512, "layers": 16, "heads": 8}, "3M": {"width": 256, "layers": 4, "heads": 4}}


def recipe_of(form: str, model: str, seed: int, steps: int, batch: int, context: int) -> Recipe:
    """pycode's recipe without clipping and average, for a model of another size."""
    return Recipe().override(
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
            "data.options": {"context": context, "held_out_windows": 128},
            "evaluate.every": 0,
            **FORMS[form],
        }
    )


def made(recipe: Recipe) -> tuple[Step, Any, Any]:
    """(step, feed, what was resolved) of a run."""
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
    step, feed, _ = made(recipe_of(form, model, 0, 40, 4, context))
    releases = "optimizer.release_gradients" in FORMS[form]
    num = sum(p.numel() for p in step.state.model.parameters())
    windows = iter(feed.windows(0, 40))
    live = LiveGradients(step)
    with live.watching():
        for _ in range(2):
            step.run(next(windows))
    sizes = step.state.nbytes()
    state = sizes["parameters"] + sizes["slots"] + sizes["average"] + sizes["gradients"]
    beside = live.peak if releases else 0  # with a buffer it is a part of the pass, and joins it at once
    times = [clocked(lambda: step.run(next(windows))) for _ in range(5)]
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
        "a step, s": summary([wall for wall, _ in times]),
        "a step, CPU s": summary([cpu for _, cpu in times]),
        **(update_time(step) if not releases else {}),
    }


def clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor over all threads: the second does not grow with what else runs here."""
    began, spent = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - spent


def update_time(step: Step) -> dict[str, Any]:
    """What the update alone takes, on gradients of one size."""
    from thalweg.optim.arena import update

    one = torch.ones(())
    times = []
    for _ in range(9):
        for arena in step.state.arenas:
            arena.grads.fill_(1e-3)
        times.append(
            clocked(lambda: update(step.state.arenas, lr=one * 1e-5, t=one * 10, divisor=one, skipped=one * 0))
        )
    walls, cpus = zip(*times)
    return {"update alone, s": summary(walls), "update alone, CPU s": summary(cpus)}


def trained(recipe: Recipe, **told: Any) -> dict[str, Any]:
    """(b): the held-out loss after all steps, and what the training took; ``told`` joins the row."""
    step, feed, resolved = made(recipe)
    steps = recipe.train.steps
    began = time.perf_counter()
    for window in feed.windows(0, steps):
        row = step.run(window)
    seconds = time.perf_counter() - began
    found = evaluate(step.state, resolved.test, resolved.loss, None, resolved.policy, batch=16)
    last = row.tolist()
    return {
        "what": "training",
        **told,
        "seed": recipe.seed,
        "steps": steps,
        "lr": recipe.optimizer.lr,
        "last training loss": last[0] / last[1],
        "held-out loss": found["loss"],
        "seconds": seconds,
    }


def compared(rows: Sequence[dict[str, Any]], model: str, forms: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and spread of each form over the seeds that all have, and how far it stands from the first, seed by seed."""
    found = {
        form: {r["seed"]: r["held-out loss"] for r in rows if (r["what"], r["model"], r["form"]) == ("training", model, form)}
        for form in forms
    }  # fmt: skip
    seeds = sorted(set.intersection(*(set(losses) for losses in found.values())))
    if not seeds:
        return []
    base = [found[forms[0]][seed] for seed in seeds]
    out = []
    for form in forms:
        mine = [found[form][seed] for seed in seeds]
        out.append(
            {
                "what": "mean",
                "model": model,
                "form": form,
                "seeds": len(seeds),
                "held-out loss": statistics.mean(mine),
                "spread over seeds": max(mine) - min(mine),
                f"over {forms[0]}": statistics.mean(mine) / statistics.mean(base) - 1,
                f"farthest from {forms[0]} of the same seed": max((m - b for m, b in zip(mine, base)), key=abs),
            }
        )
    return out


class Rows:
    """The rows so far, kept on disk after each."""

    def __init__(self, command: str | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.command = command

    def add(self, row: dict[str, Any], told: str) -> None:
        self.rows.append(row)
        print(told, flush=True)
        if self.command is not None:
            keep("bytes_a_parameter", self.rows, self.command)

    def mean(self, model: str, forms: Sequence[str]) -> None:
        for row in compared(self.rows, model, forms):
            over, spread = row[f"over {forms[0]}"], row["spread over seeds"]
            self.add(
                row,
                f"{model:6} {row['form']:32} mean of {row['seeds']} {row['held-out loss']:.4f} ({over:+.2%}), spread {spread:.4f}",
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes_a_parameter", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of the 50 M model")
    parser.add_argument("--small-steps", type=int, default=400, help="of the 3 M model")
    parser.add_argument("--pycode-steps", type=int, default=150, help="of the pycode recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--models", nargs="*", default=["50M", "pycode", "3M"], choices=[*MODELS, "pycode"])
    parser.add_argument(
        "--forms", nargs="*", default=["fp32 AdamW", "bf16-pure, int8 slots, release"], choices=list(FORMS)
    )
    parser.add_argument("--dry", action="store_true", help="keep no results")
    asked = parser.parse_args(arguments)
    told = " ".join(arguments if arguments is not None else sys.argv[1:])
    rows = Rows(None if asked.dry else f"python -m benchmarks.bytes_a_parameter {told}".strip())
    for form in FORMS:
        row = bytes_of(form, "50M" if "50M" in asked.models else "3M", asked.context)
        rows.add(
            row,
            f"{form:32} {row['kept, bytes a parameter']:6.3f} kept, "
            f"{row['with gradients, bytes a parameter']:6.3f} with the gradients alive at once; "
            f"{row['a step, CPU s']['median']:.2f} CPU s a step, "
            f"{row.get('update alone, CPU s', {}).get('median', 0):.3f} the update alone; {', '.join(row['how'])}",
        )
    for model in asked.models:
        forms = list(ROUNDED) if model == "pycode" else asked.forms
        for seed in range(asked.seeds):
            for form in forms:
                if model == "pycode":
                    changes = {"seed": seed, "train.steps": asked.pycode_steps, "device": "cpu", **ROUNDED[form]}
                    recipe = Recipe().override({**pycode.TASK.recipe, **changes})
                else:
                    steps, batch = (
                        (asked.steps, asked.batch) if model == "50M" else (asked.small_steps, 4 * asked.batch)
                    )
                    recipe = recipe_of(form, model, seed, steps, batch, asked.context)
                row = trained(recipe, model=model, form=form)
                took = f"held-out {row['held-out loss']:.4f} ({row['seconds']:.0f} s)"
                rows.add(row, f"{model:6} seed {seed} {form:32} {took}")
        rows.mean(model, forms)


if __name__ == "__main__":
    main()
