"""The recipes california and adult against scikit-learn's gradient boosting and its perceptron: the same rows, in the same run.

Scikit-learn's models have their defaults, but for two things that its guide advises: the perceptron gets standardised numbers,
one-hot categories and early stopping; boosting is told which columns are categories. Nothing is chosen by the test set.

    python -m benchmarks.road_tables [--short]
    python -m benchmarks.road_tables --ablate [--seeds 5] [--only california adult]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.batchnorm import STUDENT, interval
from benchmarks.draw import curves
from benchmarks.keep import RESULTS, keep, rows_of, shown, where
from benchmarks.shared_data import folder
from thalweg import Recipe, train_task
from thalweg.core import Task
from thalweg.data import permute
from thalweg.data.folder import reading_from
from thalweg.recipes import adult, california, find_task, recipe_for
from thalweg.recipes.tables import held_out_rows

PICTURE = RESULTS.parent.parent / "docs" / "pictures" / "table.svg"
#: The figure of each task, and whether more of it is better.
FIGURE = {"california": ("RMSE in dollars", False), "adult": ("accuracy in percent", True)}
#: Arms of the ablation: the recipe, less or with one thing.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "california": {
        "the recipe": {},
        "AdamW for Muon": {"optimizer.rule": "adamw", "optimizer.lr": 3e-3},
        "normal scores for waves": {"model.embed": "scores"},
        "pieces for waves": {"model.embed": "pieces"},
        "waves of a third of the frequency": {"model.spread": 0.3},
        "1 member for 4": {"model.members": 1},
        "no weight average": {"regularize.average": 0.0},
        "no dropout": {"model.dropout": 0.0},
        "logarithm of the value": {"data.options.log_target": True},
    },
    "adult": {
        "the recipe": {},
        "Muon for AdamW": {"optimizer.rule": "muon", "optimizer.lr": 0.01, "optimizer.otherwise_lr": 3e-3},
        "normal scores for pieces": {"model.embed": "scores"},
        "waves for pieces": {"model.embed": "waves"},
        "32 pieces for 128": {"model.pieces": 32},
        "common values take all their room": {"data.options.most": 1.0},
        "1 member for 4": {"model.members": 1},
        "no weight average": {"regularize.average": 0.0},
        "no dropout": {"model.dropout": 0.0},
        "label smoothing of 0.05": {"loss.label_smoothing": 0.05},
    },
}
EPOCHS = {"california": 4.0, "adult": 2.0}  # of the ablation

Row = dict[str, Any]


def recipe(task: Task, changes: dict[str, Any]) -> Recipe:
    given = {"data.folder": str(folder()), "compile": "off", "precision": "fp32", **changes}
    return recipe_for(task).override(given)


def value_of(name: str, metrics: dict[str, float]) -> float:
    return 100 * metrics["accuracy"] if name == "adult" else 100_000 * math.sqrt(metrics["mse"])


def ours(name: str, seed: int, changes: dict[str, Any]) -> Row:
    task = find_task(name)
    begun = time.perf_counter()
    result = train_task(task, recipe(task, {"seed": seed, **changes}))
    seconds, told, curve, beside = time.perf_counter() - begun, result.records, [], 0.0
    for evaluation in result.evaluations:  # seconds of a record end before the evaluation that follows it
        at = told[evaluation.step - 1].seconds
        curve.append((at - beside, value_of(name, evaluation.metrics)))
        beside += evaluation.seconds - at
    return {"value": curve[-1][1], "seconds": seconds, "curve": curve}


def tables(name: str) -> tuple[Any, Any, Any, Any, list[int]]:
    """(training rows, targets, test rows, targets, columns of categories), as scikit-learn takes them."""
    with reading_from(str(folder())):
        if name == "california":
            numbers, place, value = california.read()
            words = sorted(set(place))
            x = np.column_stack([numbers, [words.index(one) for one in place]])
            train, test = held_out_rows(permute(len(value), 0, np.arange(len(value))), len(value) // 5, "test")
            return x[train], value[train], x[test], value[test], [x.shape[1] - 1]
        (numbers, words, rich), (numbers2, words2, rich2) = (adult.read(file) for file in adult.FILES)
    codes = [{word: k for k, word in enumerate(sorted(set(column)))} for column in words]

    def coded(numbers: Any, words: Any) -> Any:
        return np.column_stack(
            [numbers, *([code.get(w, np.nan) for w in column] for code, column in zip(codes, words))]
        )

    categories = list(range(numbers.shape[1], numbers.shape[1] + len(codes)))
    return coded(numbers, words), rich, coded(numbers2, words2), rich2, categories


def scikit(name: str) -> dict[str, Callable[[int], Any]]:
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.impute import SimpleImputer
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    categories = tables(name)[4]
    boosting = HistGradientBoostingRegressor if name == "california" else HistGradientBoostingClassifier
    perceptron = MLPRegressor if name == "california" else MLPClassifier

    def scaled(seed: int) -> Any:
        numbers = make_pipeline(SimpleImputer(), StandardScaler())
        words = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
        columns = ColumnTransformer([("words", words, categories)], remainder=numbers)
        return make_pipeline(columns, perceptron(random_state=seed, early_stopping=True))

    return {
        "HistGradientBoosting": lambda seed: boosting(random_state=seed, categorical_features=categories),
        perceptron.__name__: scaled,
    }


def theirs(name: str, make: Callable[[int], Any], seed: int) -> Row:
    x, y, test_x, test_y, _ = tables(name)
    model = make(seed)
    begun = time.perf_counter()
    model.fit(x, y)
    seconds = time.perf_counter() - begun
    found = model.predict(test_x)
    value = 100 * (found == test_y).mean() if name == "adult" else 100_000 * math.sqrt(((found - test_y) ** 2).mean())
    return {"value": float(value), "seconds": seconds}


def race(name: str, seeds: int) -> list[Row]:
    """Each model with each seed, in turns."""
    arms: dict[str, Callable[[int], Row]] = {"thalweg": lambda seed: ours(name, seed, {})}
    for arm, make in scikit(name).items():
        arms[arm] = lambda seed, make=make: theirs(name, make, seed)  # type: ignore[misc]
    found: dict[str, list[Row]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm, run in arms.items():
            found[arm].append(run(seed))
    rows = []
    for arm, runs in found.items():
        values = [run["value"] for run in runs]
        rows.append(
            {
                "task": name,
                "arm": arm,
                "values": [round(value, 4) for value in values],
                "value": statistics.mean(values),
                "seconds": statistics.median(run["seconds"] for run in runs),
                "curve": next((run["curve"] for run in runs if "curve" in run), []),
            }
        )
        print(
            f"{name:11} {arm:22} {rows[-1]['value']:10.2f} {FIGURE[name][0]}, {rows[-1]['seconds']:6.2f} s", flush=True
        )
    mine, trees = rows[0], rows[1]
    better = mine["value"] >= trees["value"] if FIGURE[name][1] else mine["value"] <= trees["value"]
    figure = (
        f"{mine['value']:,.2f}, {trees['value']:,.2f}"
        if name == "adult"
        else f"{mine['value']:,.0f}, {trees['value']:,.0f}"
    )
    rows.append(
        {
            "task": name,
            "what": f"{name}: {FIGURE[name][0]} of the perceptron ({mine['seconds']:.1f} s), of HistGradientBoosting "
            f"({trees['seconds']:.1f} s)",
            "figure": figure,
            "bar": "no worse",
            "met": better,
        }
    )
    return rows


def picture(name: str, tree: dict[str, Any]) -> str:
    """Our curve, and where each of scikit-learn's models ended."""
    rows = [row for row in tree["rows"] if row.get("task") == name and "arm" in row]
    drawn = [(row["arm"], row["curve"] or [(row["seconds"], row["value"])]) for row in rows]
    note = f"{where(tree)}; dashed: HistGradientBoosting"
    title = f"{name}: {FIGURE[name][0]}, held out"
    return curves(title, "over seconds of training", drawn, targets=[rows[1]["value"]], note=note)


def ablate(names: Sequence[str], seeds: int) -> None:
    rows = rows_of("road_tables_ablation")
    for name in names:
        rows = [row for row in rows if row["task"] != name]
        base: list[float] = []
        for arm, changes in CHANGES[name].items():
            runs = [
                ours(name, seed, {"train.epochs": EPOCHS[name], "evaluate.every": 0, **changes})
                for seed in range(seeds)
            ]
            values = [run["value"] for run in runs]
            base = base or values
            sign = 1 if FIGURE[name][1] else -1
            row = {"task": name, "arm": arm, "changes": changes, "epochs": EPOCHS[name], "values": values}
            row |= {"value": statistics.mean(values), "seconds": statistics.median(run["seconds"] for run in runs)}
            if arm != "the recipe":
                row["gain"] = interval([sign * (mine - other) for mine, other in zip(values, base)])
            rows.append(row)
            told = "" if "gain" not in row else "gain {mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row["gain"])
            print(f"{name:11} {arm:36} {row['value']:10.2f} {told} {row['seconds']:.1f} s", flush=True)
        keep("road_tables_ablation", rows, "python -m benchmarks.road_tables --ablate")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="1 seed for 5")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--seeds", type=int, default=5, choices=STUDENT)
    parser.add_argument("--only", nargs="+", default=list(FIGURE), choices=FIGURE)
    given = parser.parse_args(arguments)
    if given.ablate:
        ablate(given.only, given.seeds)
        return
    found = {name: race(name, 1 if given.short else given.seeds) for name in given.only}
    before = [row for row in rows_of("road_tables", short=given.short) if "task" in row]
    rows = [row for row in before if row["task"] not in found] + [row for rows in found.values() for row in rows]
    print(keep("road_tables", rows, "python -m benchmarks.road_tables" + " --short" * given.short, short=given.short))
    for name, rows in found.items():
        PICTURE.with_name(f"{name}.svg").write_text(picture(name, shown("road_tables")))
        print(next(f"{row['what']}: {row['figure']} (bar: {row['bar']})" for row in rows if "what" in row))


if __name__ == "__main__":
    main()
