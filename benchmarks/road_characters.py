"""The road of the recipe characters: how soon it is at nanoGPT's own final loss, in the same run on the same machine.

The anchor is ``road_nanogpt.py``, in the form, eager or bf16, whose steps are faster here (``--full``: all four of its forms).
Both sides are judged alike, in float32: the mean over all windows of 64 of the held-out text, each character predicted from those
before it in its own window. These evaluations, from which the curves are drawn, are in nobody's clock. Ours holds all else of a run
(start, measuring of the precision, steps, the end), nanoGPT's its steps alone.

    python -m benchmarks.road_characters [--short | --full]
    python -m benchmarks.road_characters --ablate [--seeds 5] [--only ARM ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import road_nanogpt
from benchmarks.draw import curves
from benchmarks.keep import RESULTS, keep, rows_of, shown, summary, where
from benchmarks.shared_data import folder
from thalweg import Recipe, train_task
from thalweg.data.folder import reading_from
from thalweg.recipes import find_task, recipe_for

PICTURE = RESULTS.parent.parent / "docs" / "pictures" / "characters.svg"
BAR = 3.0  # nanoGPT's seconds over ours
#: Arms of the race: what differs from the recipe.
ARMS: dict[str, dict[str, Any]] = {
    "characters": {},
    "characters without n-grams": {"model.ngrams": 1, "train.steps": 280},
    "characters, longer": {"train.steps": 300},
}
ADAMW = {"optimizer.rule": "adamw", "optimizer.lr": 4e-3, "optimizer.options": {"b2": 0.99}}
#: Arms of the ablation: the recipe, less one trick.
LESS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "AdamW at 4e-3 for Muon": {**ADAMW},
    "no n-gram embeddings": {"model.ngrams": 1},
    "bigrams alone": {"model.ngrams": 2},
    "learned positions": {"model.positions": "learned"},
    "no norm of queries and keys": {"model.qk_norm": False},
    "GELU": {"model.activation": "gelu"},
    "embeddings at the head's rate": {"optimizer.groups": {}},
    "float32": {"precision": "fp32"},
}


def recipe(changes: dict[str, Any]) -> Recipe:
    """The task's recipe with changes; a table in them takes the place of the recipe's own."""
    own = recipe_for(find_task("characters"))
    tables = {path.removeprefix("optimizer."): {} for path, value in changes.items() if isinstance(value, dict)}
    own = replace(own, optimizer=replace(own.optimizer, **tables))
    return own.override({"data.folder": str(folder()), "compile": "off", **changes})


def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """(text to train on, text held out), as tokens."""
    with reading_from(str(folder())):
        split = find_task("characters").data()
    return split.train.tokens, split.test.tokens


def exact(model: nn.Module, tokens: torch.Tensor) -> float:
    """Nats a character over all whole windows, in float32."""
    model.eval()
    whole = (len(tokens) - 1) // road_nanogpt.CONTEXT * road_nanogpt.CONTEXT
    x, y = (tokens[at : at + whole].long().view(-1, road_nanogpt.CONTEXT) for at in (0, 1))
    total = 0.0
    with torch.no_grad():
        for xs, ys in zip(x.split(64), y.split(64)):
            total += float(F.cross_entropy(model(xs).float().flatten(0, 1), ys.flatten(), reduction="sum"))
    model.train()
    return total / whole


def ours(name: str, changes: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """An arm: training seconds are those of its steps; wall seconds those of all of ``train_task`` but its evaluations."""
    given = recipe({"evaluate.every": max(1, recipe(changes).train.steps or 1) // 4, **changes})
    begun = time.perf_counter()
    result = train_task(find_task("characters"), given)
    wall = time.perf_counter() - begun
    told, curve, beside = [*result.records], [], 0.0
    for evaluation in result.evaluations:  # seconds of a record end before the evaluation that follows it
        at = told[evaluation.step - 1].seconds
        curve.append((evaluation.step, at - beside, evaluation.metrics["loss"]))
        beside += evaluation.seconds - at
    return {
        "arm": name,
        "steps": told[-1].step,
        "training seconds": curve[-1][1],
        "wall seconds": wall - beside,
        "evaluating seconds": beside,
        "loss": exact(result.model, tokens),
        "curve": curve,
        "precision": result.plan.recipe.precision,
        "parameters": sum(p.numel() for p in result.model.parameters()),
    }


def anchor(forms: Sequence[str], text: torch.Tensor, tokens: torch.Tensor) -> list[dict[str, Any]]:
    rows = []
    for form in forms:
        run = road_nanogpt.train(text, tokens, lambda model: exact(model, tokens), form)
        rows.append(
            {
                "arm": f"nanoGPT, {form}",
                "steps": road_nanogpt.STEPS,
                "training seconds": run.training,
                "wall seconds": run.wall,
                "loss": run.curve[-1][2],
                "curve": run.curve,
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def fastest(text: torch.Tensor, tokens: torch.Tensor, steps: int = 40) -> str:
    """The form of nanoGPT whose steps take less time here; compiling does not repay itself in 2,000 steps (``--full``)."""
    times = {
        form: road_nanogpt.train(text, tokens, lambda _: 0.0, form, until=steps).training for form in ("eager", "bf16")
    }
    print("nanoGPT, ms a step: " + ", ".join(f"{form} {1e3 * t / steps:.1f}" for form, t in times.items()), flush=True)
    return min(times, key=lambda form: times[form])


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['arm']:34} {row['steps']:5} steps  training {row['training seconds']:6.1f} s  wall {row['wall seconds']:6.1f} s  "
        f"loss {row['loss']:.4f}"
    )


def race(full: bool) -> None:
    text, tokens = held_out()
    rows = anchor(road_nanogpt.FORMS if full else [fastest(text, tokens)], text, tokens)
    best = min(rows, key=lambda row: row["wall seconds"])
    for name, changes in ARMS.items():
        rows.append(ours(name, changes, tokens))
        print(line(rows[-1]), flush=True)
    if full:
        as_long = int(rows[-1]["steps"] * best["wall seconds"] / rows[-1]["wall seconds"])
        rows.append(ours("characters, as long as nanoGPT", {"train.steps": as_long}, tokens))
        print(line(rows[-1]), flush=True)
    by_name = {row["arm"]: row for row in rows}
    for name in list(ARMS)[:2]:
        row = by_name[name]
        there = row["loss"] <= best["loss"]
        ratio = best["training seconds"] / row["wall seconds"]
        rows.append(
            {
                "what": f"{name}: nanoGPT's seconds in steps to its own final loss ({best['loss']:.3f}) over our wall time",
                "figure": f"{ratio:.1f}" if there else f"not reached ({row['loss']:.3f})",
                "bar": f"at least {BAR:g}",
                "met": there and ratio >= BAR,
                "steps alone": best["training seconds"] / row["training seconds"],
            }
        )
    last = next(row for row in reversed(rows) if row.get("arm", "").startswith("characters,"))
    rows.append(
        {
            "what": f"characters: loss after {last['wall seconds']:.0f} s, nanoGPT's after {best['wall seconds']:.0f} s",
            "figure": f"{last['loss']:.3f}, {best['loss']:.3f}",
            "bar": "lower in no more time",
            "met": last["loss"] < best["loss"] and last["wall seconds"] <= 1.05 * best["wall seconds"],
        }
    )
    for row in rows:
        if "what" in row:
            print(f"{row['what']}: {row['figure']} (bar: {row['bar']})")
    command = "python -m benchmarks.road_characters" + (" --full" if full else " --short")
    print(keep("road_characters", rows, command, short=not full))
    PICTURE.write_text(picture(shown("road_characters")))


def picture(tree: dict[str, Any]) -> str:
    """The curves of the arms against training seconds."""
    arms = [row for row in tree["rows"] if "curve" in row]
    drawn = [(row["arm"], [(t, loss) for _, t, loss in row["curve"] if loss < 2.6]) for row in arms]
    target = min((row for row in arms if row["arm"].startswith("nanoGPT")), key=lambda row: row["wall seconds"])["loss"]
    note = f"{where(tree)}; dashed: nanoGPT's end"
    title = "tiny-shakespeare: nats a character, held out"
    return curves(title, "over seconds of training", drawn, targets=[target], note=note)


def ablate(seeds: int, only: Sequence[str]) -> None:
    """Each arm with each seed; what is there already is kept, so that it can be done in parts."""
    rows = rows_of("road_characters_ablation")
    done = {(row["arm"], seed) for row in rows for seed in row["seeds"]}
    _, tokens = held_out()
    by_arm: dict[str, dict[str, Any]] = {row["arm"]: row for row in rows}
    for seed in range(seeds):
        for arm in only or LESS:
            if (arm, seed) in done:
                continue
            told = ours(arm, {"precision": "bf16", **LESS[arm], "seed": seed, "evaluate.every": 0}, tokens)
            row = by_arm.setdefault(arm, {"arm": arm, "seeds": [], "losses": [], "ms a step": []})
            row["seeds"].append(seed)
            row["losses"].append(told["loss"])
            row["ms a step"].append(1e3 * told["training seconds"] / told["steps"])
            print(f"{arm:34} seed {seed}: {told['loss']:.4f}, {row['ms a step'][-1]:.1f} ms a step", flush=True)
            keep("road_characters_ablation", list(by_arm.values()), "python -m benchmarks.road_characters --ablate")


def table(tree: dict[str, Any]) -> str:
    """The ablation as Markdown: loss, what leaving it out costs, with 95 % intervals over seeds."""
    rows = {row["arm"]: row for row in tree["rows"]}
    whole = dict(zip(rows["the recipe"]["seeds"], rows["the recipe"]["losses"]))
    lines = ["| the recipe, but with | loss | worse by | ms a step |", "|---|--:|--:|--:|"]
    for arm in LESS:
        row = rows[arm]
        gaps = [loss - whole[seed] for seed, loss in zip(row["seeds"], row["losses"]) if seed in whole]
        mean, half = interval(gaps)
        worse = "" if arm == "the recipe" else f"{mean:+.3f} ± {half:.3f}"
        loss, spread = interval(row["losses"])
        name = "nothing changed" if arm == "the recipe" else arm
        lines.append(f"| {name} | {loss:.3f} ± {spread:.3f} | {worse} | {summary(row['ms a step'])['median']:.0f} |")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}[len(values)]
    t = torch.tensor(values, dtype=torch.float64)
    return float(t.mean()), quantile * float(t.std()) / len(values) ** 0.5


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one form of nanoGPT; the default")
    parser.add_argument(
        "--full", action="store_true", help="all forms of nanoGPT, and an arm that trains as long as it"
    )
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], choices=list(LESS))
    parser.add_argument("--page", action="store_true", help="print the table of the ablation that is kept")
    asked = parser.parse_args(arguments)
    if asked.page:
        print(table({"rows": rows_of("road_characters_ablation")}))
    elif asked.ablate:
        ablate(asked.seeds, asked.only)
    else:
        race(asked.full)


if __name__ == "__main__":
    main()
