"""Resume is exact: to the bit, from any moment, however the run ended."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import thalweg
from tests.conftest import run_cli, start_cli, three_parts
from tests.models import batchnorm_net, mean_loss, points
from thalweg.core import CheckpointError, DataError, Recipe, RunFolderError, Split, StopReason, read_lines
from thalweg.watch import Memory

BASE = {
    "precision": "fp32",
    "train.steps": 14,
    "train.batch": 16,
    "train.micro_batch": 8,
    "optimizer.lr": 0.01,
    "optimizer.weight_decay": 0.1,
    "schedule.lr": "warmup(3) >> cosine(to=0.1)",
    "regularize.average": 0.9,
    "checkpoint.every": 0,
    "evaluate.every": 4,
}


class Noisy:
    """Augments from every generator there is."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = torch.randn(6) * 0.1 + random.random() + float(np.random.rand())
        return {"x": torch.full((6,), index / 50) + noise, "y": torch.tensor(index % 3)}


class Reading:
    """An iterable that draws while it is read."""

    def __iter__(self) -> Any:
        for index in range(50):
            yield {"x": torch.randn(6) + random.random() + float(np.random.rand()), "y": torch.tensor(index % 3)}


def jitter(batch: Any, draw: Any) -> Any:
    return {**batch, "x": batch["x"] + draw(6)}


DATA = {
    "in memory, augmented": lambda: Split(train=points(50), test=points(20, seed=1), augment=jitter),
    "data set": lambda: Split(train=Noisy(), test=points(20, seed=1)),
    "stream": lambda: Split(train=Reading(), test=points(20, seed=1)),
}


class Stop:
    """A sink that asks for an end after a step, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self) -> bool:
        return self.loop is not None and self.loop.step.state.step >= self.after

    loop: Any = None


def weights_of(folder: Path, step: int) -> dict[str, bytes]:
    files = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert {f.name for f in files} >= {"weights.safetensors", "state.safetensors"}
    tensors = {f"{f.stem}/{k}": v for f in files for k, v in load_file(f).items()}
    return {
        k: v.contiguous().view(torch.uint8).numpy().tobytes() if v.ndim else v.numpy().tobytes()
        for k, v in tensors.items()
    }


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """All lines of the records but what two equal runs do not share: times."""
    lines = [line for line in read_lines(folder / "records.jsonl") if line["kind"] != "event"]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]


def go(
    folder: Path,
    data: Any,
    *,
    until: int | None = None,
    resume: bool | int = False,
    monkeypatch: Any = None,
    **changes: Any,
) -> Any:
    """A run in this process; with ``until``, stopped there as a signal would."""
    if until is not None:
        from thalweg.engine import Loop

        asked = Stop(until)
        whole = Loop.__init__

        def patched(self: Any, *args: Any, **kwargs: Any) -> None:
            whole(self, *args, **{**kwargs, "stop": asked})
            asked.loop = self

        monkeypatch.setattr(Loop, "__init__", patched)
    recipe = Recipe().override({**BASE, **changes})
    result = thalweg.train(
        lambda: batchnorm_net(dropout=0.3), mean_loss, data, recipe, folder=folder, resume=resume, sinks=[Memory()]
    )
    if until is not None:
        monkeypatch.undo()
    return result


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_anywhere_and_resumed_is_the_same_run(
    kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"precision": precision}
    go(tmp_path / "whole", DATA[kind](), **changes)
    wanted, lines = weights_of(tmp_path / "whole", 14), steps_of(tmp_path / "whole")
    for k in (1, 3, 5, 9, 13):  # in the middle of epochs of 4 steps, and at their ends
        folder = tmp_path / f"stopped-{k}"
        stopped = go(folder, DATA[kind](), until=k, monkeypatch=monkeypatch, **changes)
        assert stopped.reason is StopReason.INTERRUPTED
        torch.manual_seed(k)  # whatever state this process has
        go(folder, DATA[kind](), resume=True, **changes)
        assert weights_of(folder, 14) == wanted
        assert steps_of(folder) == lines


def test_workers_do_not_change_the_run_and_resume_with_other_workers_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path / "whole", DATA["data set"]())
    changes = {"data.workers": 2}
    folder = tmp_path / "workers"
    go(folder, DATA["data set"](), until=6, monkeypatch=monkeypatch, **changes)
    go(folder, DATA["data set"](), resume=True, **changes)
    assert weights_of(folder, 14) == weights_of(tmp_path / "whole", 14)
    assert steps_of(folder) == steps_of(tmp_path / "whole")


def test_saving_evaluating_and_recording_do_not_change_the_run(tmp_path: Path) -> None:
    go(tmp_path / "rarely", DATA["in memory, augmented"](), **{"evaluate.every": 0})
    go(tmp_path / "often", DATA["in memory, augmented"](), **{"evaluate.every": 1, "checkpoint.every": 1})
    assert weights_of(tmp_path / "rarely", 14) == weights_of(tmp_path / "often", 14)


def test_resume_cuts_off_later_records_and_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(folder, DATA["in memory, augmented"](), **{"checkpoint.every": 2, "checkpoint.keep_last": 20})
    wanted, lines = weights_of(folder, 14), steps_of(folder)
    with open(folder / "records.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "step": 1')  # torn by a kill
    recipe = Recipe().override({**BASE, "checkpoint.every": 2, "checkpoint.keep_last": 20})
    data = DATA["in memory, augmented"]()
    thalweg.train(lambda: batchnorm_net(dropout=0.3), mean_loss, data, recipe, folder=folder, resume=6)
    assert weights_of(folder, 14) == wanted and steps_of(folder) == lines
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == list(range(1, 15)), "no step is there twice, none is missing"


def test_resume_from_an_earlier_step_leaves_no_later_checkpoint_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next resume would go on from a state that this run never had."""
    folder, changes = tmp_path / "run", {"checkpoint.every": 2, "checkpoint.keep_last": 20}
    go(folder, DATA["in memory, augmented"](), **changes)
    go(folder, DATA["in memory, augmented"](), until=7, resume=6, monkeypatch=monkeypatch, **changes)
    assert [int(p.name[5:]) for p in sorted((folder / "checkpoints").iterdir())] == [2, 4, 6, 7]


def test_a_damaged_checkpoint_is_passed_over_named_and_the_run_is_the_same(tmp_path: Path) -> None:
    folder, changes = tmp_path / "run", {"checkpoint.every": 2, "checkpoint.keep_last": 20}
    go(folder, DATA["in memory, augmented"](), **changes)
    wanted = weights_of(folder, 14)
    for step in (14, 12):
        path = folder / "checkpoints" / f"step-{step:08d}" / "weights.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        recipe = Recipe().override({**BASE, **changes})
        split = DATA["in memory, augmented"]()
        thalweg.train(lambda: batchnorm_net(dropout=0.3), mean_loss, split, recipe, folder=folder, resume=12)
    _, numbers, remedy = three_parts(caught.value)
    assert "step-00000012/weights.safetensors" in numbers and "--resume 10" in remedy
    result = go(folder, DATA["in memory, augmented"](), resume=True, **changes)
    assert result.records[0].step == 11 and weights_of(folder, 14) == wanted
    events = [line for line in read_lines(folder / "records.jsonl") if line["kind"] == "event"]
    assert any("step-00000014/weights.safetensors" in event["text"] for event in events)


def test_another_recipe_in_the_folder_shows_the_difference(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(folder, DATA["in memory, augmented"]())
    for resume in (False, True):
        with pytest.raises(RunFolderError) as caught:
            go(folder, DATA["in memory, augmented"](), resume=resume, **{"optimizer.lr": 0.5})
        assert "optimizer.lr: 0.01 there, 0.5 here" in three_parts(caught.value)[1]
    with pytest.raises(RunFolderError, match="already holds this run"):
        go(folder, DATA["in memory, augmented"]())


def test_other_data_than_the_run_began_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    go(folder, Split(train=points(50), facts={"sha256": "aa"}), until=5, monkeypatch=monkeypatch)
    for other in (Split(train=points(49), facts={"sha256": "aa"}), Split(train=points(50), facts={"sha256": "bb"})):
        with pytest.raises(DataError) as caught:
            go(folder, other, resume=True)
        assert "then" in three_parts(caught.value)[1]
    assert go(folder, Split(train=points(50), facts={"sha256": "aa"}), resume=True).reason is StopReason.FINISHED


def test_a_step_that_raises_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.engine import Loop

    calls = 0
    begin = Loop.run

    def counted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls = 0  # passes before step 0 are another matter
        return begin(self, *args)

    monkeypatch.setattr(Loop, "run", counted)

    def loss(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyError("a bug of the user's")
        return mean_loss(model, batch)

    recipe = Recipe().override({**BASE, "evaluate.every": 0})
    with pytest.raises(KeyError):
        thalweg.train(batchnorm_net, loss, points(50), recipe, folder=tmp_path / "run")
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000006"]
    result = thalweg.train(batchnorm_net, mean_loss, points(50), recipe, folder=tmp_path / "run", resume=True)
    assert result.reason is StopReason.FINISHED and result.records[0].step == 7


def test_divergence_is_a_value_and_spoils_no_checkpoint(tmp_path: Path) -> None:
    calls = 0

    def loss(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return mean_loss(model, batch) * (float("nan") if calls > 10 else 1.0)

    recipe = Recipe().override({**BASE, "train.steps": 400, "checkpoint.every": 20})
    result = thalweg.train(batchnorm_net, loss, points(50), recipe, folder=tmp_path / "run")
    assert result.reason is StopReason.DIVERGED and "lr" in result.reason.advice
    assert result.records[-1].skipped and len(result.records) < 400
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(t.isfinite().all() for t in load_file(folder / "weights.safetensors").values())


QUICK = ["--set", "train.epochs=6", "--set", "checkpoint.every=5", "--set", "precision=fp32", "--quiet"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of digits, to hold the killed ones against."""
    runs = tmp_path_factory.mktemp("digits")
    done = run_cli("train", "digits", *QUICK, "--name", "whole", "--runs", str(runs), cwd=runs)
    assert done.returncode == 0, done.stderr
    return runs


def last_step(folder: Path) -> int:
    return int(re.sub(r"\D", "", sorted((folder / "checkpoints").glob("step-*"))[-1].name))


def wait_for_records(folder: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if (folder / "records.jsonl").exists() and (folder / "records.jsonl").stat().st_size > 2000:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("attempt", range(1))  # twenty: python -m benchmarks resume
def test_killed_at_a_random_instant_ends_with_the_same_bits(digits: Path, attempt: int) -> None:
    name = f"killed-{attempt}"
    process = start_cli("train", "digits", *QUICK, "--name", name, "--runs", str(digits), cwd=digits)
    wait_for_records(digits / name, process)
    time.sleep(random.Random(attempt).uniform(0, 0.4))
    process.kill()
    process.communicate()
    done = run_cli("train", "digits", *QUICK, "--name", name, "--runs", str(digits), "--resume", cwd=digits)
    assert done.returncode == 0, done.stderr
    step = last_step(digits / "whole")
    assert weights_of(digits / name, step) == weights_of(digits / "whole", step)
    assert steps_of(digits / name) == steps_of(digits / "whole")


OWN = """
import random, torch, thalweg
from torch import nn

class Noisy:
    def __len__(self): return 64
    def __getitem__(self, i): return {"x": torch.randn(4) + random.random(), "y": i % 2}

loss = lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"])
task = thalweg.Task(model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2)), loss=loss, data=Noisy())
"""


def test_sigterm_to_the_process_group_with_workers_saves(tmp_path: Path) -> None:
    """What SLURM and Kubernetes send; in the peers the workers die first and the checkpoint is lost."""
    (tmp_path / "own.py").write_text(OWN)
    common = [
        "train",
        "own:task",
        "--set",
        "train.batch=8",
        "--set",
        "train.micro_batch=4",
        "--set",
        "precision=fp32",
        "--quiet",
    ]
    common += ["--set", "checkpoint.every=0", "--set", "data.workers=2"]
    process = start_cli(*common, "--set", "train.steps=100000", cwd=tmp_path, start_new_session=True)
    wait_for_records(tmp_path / "runs" / "own", process)
    os.killpg(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "to go on: thalweg train own:task --resume" in told, told
    step = last_step(tmp_path / "runs" / "own")
    lines = steps_of(tmp_path / "runs" / "own")
    assert lines[-1]["step"] == step


def test_a_run_outlives_the_reader_of_its_output(digits: Path) -> None:
    """``thalweg train ... | head`` must not end the run."""
    process = start_cli("train", "digits", *QUICK, "--name", "unread", "--runs", str(digits), cwd=digits)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    step = last_step(digits / "whole")
    assert weights_of(digits / "unread", step) == weights_of(digits / "whole", step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(digits: Path, number: signal.Signals) -> None:
    name = f"signalled-{number}"
    process = start_cli("train", "digits", *QUICK, "--name", name, "--runs", str(digits), cwd=digits)
    wait_for_records(digits / name, process)
    os.kill(process.pid, number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert f"thalweg train digits --resume --name {name}" in told
    outcome = json.loads((digits / name / "outcome.json").read_text())
    assert outcome["reason"] == "interrupted"
    done = run_cli("train", "digits", *QUICK, "--name", name, "--runs", str(digits), "--resume", cwd=digits)
    assert done.returncode == 0, done.stderr
    step = last_step(digits / "whole")
    assert weights_of(digits / name, step) == weights_of(digits / "whole", step)
