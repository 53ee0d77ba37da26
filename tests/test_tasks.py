"""The embedded tasks, the starter, the three ways in, and what the command line says."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thalweg
from tests.conftest import run_cli
from tests.models import make_step, run_steps
from thalweg.core import Split, StopReason, read_lines
from thalweg.data import TokenWindows
from thalweg.recipes import find_task, recipe_for


def test_digits_reaches_98_percent(tmp_path: Path) -> None:
    done = run_cli("train", "digits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluations = [e for e in read_lines(tmp_path / "runs" / "digits" / "records.jsonl") if e["kind"] == "evaluation"]
    assert evaluations[-1]["metrics"]["accuracy"] >= 0.98
    for words in (
        "decided before step 1",
        "a gain or bias of a normalization layer",
        "best so far",
        "report:",
    ):
        assert words in done.stdout
    assert (tmp_path / "runs" / "digits" / "report.html").stat().st_size > 5000
    again = run_cli("train", "digits", "--set", "train.steps=3", "--quiet", cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "runs" / "digits-2" / "recipe.toml").exists(), (
        "a taken name is numbered"
    )


def test_pycode_runs_the_whole_of_it(tmp_path: Path) -> None:
    shorter = ["--set", "train.steps=30", "--set", "data.options.limit_bytes=300000", "--set", "train.batch=8"]
    shorter += [
        "--set",
        "train.micro_batch=4",
        "--set",
        "evaluate.every=10",
        "--set",
        "data.options.held_out_windows=16",
    ]
    done = run_cli("train", "pycode", *shorter, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "pycode"
    plan = json.loads((folder / "plan.json").read_text())
    reasons = {d["path"]: d["reason"] for d in plan["decisions"]}
    assert "measured here" in reasons["precision"] and all(reasons.values())
    assert plan["recipe"]["regularize"]["average"] > 0 and plan["recipe"]["model"].get("dropout") is None
    decays = {p["name"]: p["decays"] for p in plan["parameters"]}
    assert decays["blocks.0.qkv.weight"] and not decays["norm.weight"] and not decays["tokens.weight"]
    steps = [r for r in read_lines(folder / "records.jsonl") if r["kind"] == "step"]
    assert len(steps) == 30 and steps[-1]["loss"] < steps[0]["loss"] - 1
    assert steps[0]["weight"] == 8 * 128
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["reason"] == "finished" and outcome["sample"].startswith("def ")
    assert outcome["sample"] in done.stdout


def test_pycode_holds_whole_files_out() -> None:
    task = find_task("pycode")
    split = task.data(limit_bytes=200_000)
    assert split.facts["files"] > 5 and split.facts["held-out bytes"] > 0
    train, test = bytes(split.train.tokens.tolist()), bytes(split.test.tokens[: split.test.length].tolist())
    assert test not in train


def test_shift_is_a_function_of_the_sample_alone() -> None:
    split = find_task("digits").data()
    images = split.train["images"]
    moved = split.augment(
        {"images": images[:9], "labels": split.train["labels"][:9]}, lambda n: torch.full((9, n), 0.99)
    )
    assert (
        torch.equal(moved["images"][:, :, :-1, :-1], images[:9, :, 1:, 1:])
        and moved["images"].shape == images[:9].shape
    )
    still = split.augment({"images": images[:9]}, lambda n: torch.full((9, n), 0.5))
    assert torch.equal(still["images"], images[:9])


HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text())


def golden_text(letters: bool) -> Split:
    """Bytes that are the same on every machine, and have something to learn."""
    stream = b"".join(hashlib.sha256(b"%d" % (i % 40)).hexdigest().encode() for i in range(400))
    tokens = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    return Split(train=TokenWindows(tokens % 65, 32) if letters else TokenWindows(tokens, 32))


def golden_losses(name: str) -> list[float]:
    """The losses of 50 deterministic steps of a recipe, on a small model."""
    task = find_task(name)
    smaller = {
        "train.steps": 50,
        "train.batch": 16,
        "train.micro_batch": 8,
        "precision": "fp32",
        "evaluate.best": "loss",
    }
    if name == "characters":
        smaller["optimizer.options.precision"] = "fp32"  # in bf16 its sums are another processor's
    torch.manual_seed(0)
    form, own = recipe_for(task).model, {k: v for k, v in task.recipe.items() if not k.startswith("model.")}
    model = task.model(**({"width": 8} if name == "digits" else {**form, "width": 32, "layers": 2, "context": 32}))
    data = task.data() if name == "digits" else golden_text(letters=name == "characters")
    step, feed = make_step(model, task.loss, data, **{**own, **smaller})
    return [round(row[0] / row[1], 5) for row in run_steps(step, feed, 50)]


@pytest.mark.parametrize("name", ["digits", "pycode", "characters"])
def test_golden_curve(name: str) -> None:
    """A change called neutral reproduces them; another replaces them (python -m tests.test_tasks) and says why."""
    assert golden_losses(name) == pytest.approx(GOLDEN[name], rel=2e-3)


def test_starter_runs_as_written(tmp_path: Path) -> None:
    assert run_cli("init", cwd=tmp_path).returncode == 0
    done = run_cli(
        "train",
        "my_task:task",
        "--recipe",
        "my_recipe.toml",
        "--set",
        "train.epochs=8",
        "--set",
        "optimizer.lr=2e-2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    evaluations = [e for e in read_lines(tmp_path / "runs" / "my_task" / "records.jsonl") if e["kind"] == "evaluation"]
    assert evaluations[-1]["metrics"]["accuracy"] > 0.6
    recipe = thalweg.Recipe.from_file(tmp_path / "runs" / "my_task" / "recipe.toml")
    assert recipe.optimizer.lr == 2e-2 and recipe.model == {"hidden": 64, "dropout": 0.1}
    assert recipe.loss == {"label_smoothing": 0.05}
    refused = run_cli("init", cwd=tmp_path)
    assert refused.returncode == 2 and "my_task.py" in refused.stderr
    resumed = run_cli("train", "my_task:task", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0 and "All steps are done" in resumed.stdout


def test_python_way_in_returns_what_it_did() -> None:
    task = find_task("digits")
    recipe = recipe_for(task).override({"train.steps": 30, "train.epochs": 1, "precision": "fp32"})
    result = thalweg.train(task.model, task.loss, task.data, recipe, metrics=task.metrics)
    assert result.reason is StopReason.FINISHED and result.folder is None
    assert [r.step for r in result.records] == list(range(1, 31))
    assert result.metrics["accuracy"] == result.evaluations[-1].metrics["accuracy"]
    model, split = result.model.eval(), task.data()
    right = (model(split.test["images"]).argmax(-1) == split.test["labels"]).double().mean()
    assert float(right) == pytest.approx(result.metrics["accuracy"]), "the returned model is the one that was evaluated"


def test_doctor_and_tasks(tmp_path: Path) -> None:
    told = run_cli("doctor", cwd=tmp_path).stdout
    for word in ("device", "memory", "threads", "bf16", "fp16", "compiler", "GFLOP/s"):
        assert word in told
    listed = run_cli("tasks", cwd=tmp_path).stdout
    assert "pycode" in listed and "digits" in listed
    assert "characters    a small GPT on tiny-shakespeare, by characters (its data: --data FOLDER)" in listed


@pytest.mark.parametrize("code", ["import thalweg", "from thalweg.cli.main import main; main(['tasks'])", "HELP"])
def test_torch_is_not_imported_for_help(code: str) -> None:
    if code == "HELP":
        code = "from thalweg.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    check = f"{code}\nimport sys; assert not {{'torch', 'numpy', 'rich'}} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_training_does_not_import_dynamo() -> None:
    """It costs a second at start-up; torch's own optimizers bring it, ours do not need it."""
    code = (
        "import sys, torch, thalweg\nfrom torch import nn\n"
        "data = {'x': torch.randn(32, 2), 'y': torch.zeros(32, dtype=torch.int64)}\n"
        "loss = lambda m, b: nn.functional.cross_entropy(m(b['x']), b['y'])\n"
        "thalweg.train(nn.Linear(2, 2), loss, data, {'train.steps': 3, 'train.batch': 8})\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def signatures() -> dict[str, str]:
    """Every public name and what it takes."""
    found = {}
    for room in (thalweg, thalweg.optim, thalweg.schedules, thalweg.regularize):
        for name in room.__all__:
            thing = getattr(room, name)
            try:
                found[f"{room.__name__}.{name}"] = str(inspect.signature(thing))
            except (TypeError, ValueError):
                found[f"{room.__name__}.{name}"] = type(thing).__name__
    return found


def test_public_face_is_the_kept_one() -> None:
    """Names and signatures that users rest on; a change is deliberate: python -m tests.test_tasks writes the new face."""
    assert signatures() == json.loads((HERE / "public_face.json").read_text())


if __name__ == "__main__":
    (HERE / "public_face.json").write_text(json.dumps(signatures(), indent=1) + "\n")
    (HERE / "golden.json").write_text(json.dumps({name: golden_losses(name) for name in GOLDEN}) + "\n")
