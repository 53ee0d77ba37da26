"""``thalweg checkpoint`` on a run: verify, show, convert, prune."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import thalweg
from tests.conftest import run_cli
from tests.models import mean_loss, mlp, points
from thalweg.checkpoint import FolderLock, Snapshot, Store
from thalweg.cli.main import main
from thalweg.core import Split, human_bytes

KEPT = (2, 4, 6, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with a checkpoint at every second one."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    recipe = {
        "precision": "fp32",
        "train.steps": 8,
        "train.batch": 16,
        "regularize.average": 0.9,
        "checkpoint.every": 2,
        "checkpoint.keep_last": 9,
        "evaluate.every": 2,
    }
    torch.manual_seed(0)
    thalweg.train(mlp(), mean_loss, Split(train=points(), test=points(seed=1)), recipe, folder=folder)
    assert tuple(Store(folder / "checkpoints").steps()) == KEPT
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "run")
    return Path("run")


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage(run: Path, step: int) -> None:
    file = folder_of(run, step) / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def steps(run: Path) -> list[int]:
    return Store(run / "checkpoints").steps()


def ranking(run: Path) -> list[int]:
    """Steps of the evaluations, best first."""
    return [step for _, step in Store(run / "checkpoints").load(8).facts["ranking"]]


def test_verify_compares_every_checkpoint(run: Path) -> None:
    good = run_cli("checkpoint", "verify", "run", cwd=Path.cwd())
    assert good.returncode == 0, good.stderr
    lines = good.stdout.splitlines()
    wanted = [
        [f"step {s}", human_bytes(sum(f.stat().st_size for f in folder_of(run, s).iterdir())), "ok"] for s in KEPT
    ]
    assert [line.split("  ")[1:] for line in lines] == wanted
    damage(run, 4)
    bad = run_cli("checkpoint", "verify", "run", cwd=Path.cwd())
    assert bad.returncode == 1 and not bad.stderr
    told = {line.split("  ")[1]: line for line in bad.stdout.splitlines() if "  step" in line}
    assert [step for step, line in told.items() if not line.endswith("ok")] == ["step 4"]
    assert "weights.safetensors" in told["step 4"] and bad.stdout.endswith("damaged: 1\n")


def test_verify_of_one_checkpoint_and_of_several(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 4)
    assert main(["checkpoint", "verify", str(folder_of(run, 2)), str(folder_of(run, 6))]) == 0
    assert main(["checkpoint", "verify", str(folder_of(run, 2)), str(folder_of(run, 4))]) == 1
    shutil.rmtree(folder_of(run, 6) / "weights.safetensors", ignore_errors=True)
    (folder_of(run, 6) / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(folder_of(run, 6))]) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_verify_passes_over_what_its_run_removes_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.fault

    def fault(store: Store, step: int) -> str:
        if step == 4:
            shutil.rmtree(folder_of(run, step))
        return real(store, step)

    monkeypatch.setattr(Store, "fault", fault)
    assert main(["checkpoint", "verify", "run"]) == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["verify", "nowhere"], "There is no such folder."),
        (["verify", "."], "is neither a run folder nor a checkpoint"),
        (["verify", "empty"], "Its run has saved none"),
        (["show", "run/plan.json"], "is neither a run folder nor a checkpoint"),
        (["prune", "run"], "Nothing says which checkpoints to keep."),
        (["prune", "run", "--last", "0"], "--last 0 is too small."),
        (["prune", "nowhere", "--last", "1"], "is no run folder"),
        (["convert", "run", "w.pt", "--step", "3"], "There is no checkpoint of step 3."),
        (["convert", "run", "w.pt", "--weights", "best", "--step", "2"], "It holds: live, average."),
        (["convert", "run", "out", "--shard-size", "much", "--like", "x"], "--shard-size='much' is no size in bytes."),
    ],
)
def test_a_mistake_is_told_in_three_parts(
    arguments: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("empty") / "checkpoints").mkdir(parents=True)
    assert main(["checkpoint", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith("error: ") and len(told.splitlines()) == 3
    assert steps(run) == list(KEPT) and not Path("nowhere").exists()


def test_show_says_what_is_in_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-00000005.damaged").mkdir()
    assert main(["checkpoint", "show", "run"]) == 0
    told = capsys.readouterr().out
    assert "4 checkpoints in run/checkpoints" in told and "set aside as damaged: step-00000005.damaged" in told
    assert "step 8, read and compared with its manifest:" in told
    number = 6 * 16 + 16 + 16 * 3 + 3
    for group, what in (("weights", "the live weights"), ("average", "the weight average")):
        assert f"{group:8} {what}: 4 tensors, {number} float32" in told
    assert f"best evaluations so far: step {ranking(run)[0]} (" in told
    assert "0.weight" not in told
    assert main(["checkpoint", "show", "run", "--tensors"]) == 0
    assert "0.weight" in capsys.readouterr().out


def test_show_lists_the_tensors_of_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 8)
    assert main(["checkpoint", "show", str(folder_of(run, 4))]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["weights", "0.weight", "16x6", "float32", str(16 * 6 * 4), "B"] in rows
    assert ["state", "applied", "1", "int64", "8", "B"] in rows
    assert main(["checkpoint", "show", str(folder_of(run, 8))]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["checkpoint", "show", "run"]) == 0
    assert "step 6, read and compared" in capsys.readouterr().out


def test_show_gives_no_name_to_the_terminal_to_act_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"größe\x1b]0;mine\x07\r": torch.ones(2)}
    state = {"applied": torch.ones(1)}
    Store(tmp_path / "run" / "checkpoints").save(1, Snapshot({"weights": weights, "state": state}, {"step": 1}))
    assert main(["checkpoint", "show", str(tmp_path / "run"), "--tensors"]) == 0
    told = capsys.readouterr().out
    assert r"größe\x1b]0;mine\x07\r" in told and "\x1b" not in told and "\r" not in told


def test_convert_gives_a_model_its_weights(run: Path) -> None:
    done = run_cli("checkpoint", "convert", "run", "w.pt", "--weights", "live", "--step", "4", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    first, step, last = done.stdout.splitlines()
    assert (first, step) == ("read run: a run folder of thalweg", "Step 4: the live weights.")
    assert last.startswith("wrote w.pt: a torch state dict of 4 tensors, ")
    model = mlp()
    model.load_state_dict(torch.load("w.pt", weights_only=True))
    saved = Store(run / "checkpoints").load(4).groups["weights"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    again = run_cli("checkpoint", "convert", "run", "w.pt", cwd=Path.cwd())
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert again.stderr.splitlines()[0] == "error: w.pt is there already."


def test_prune_goes_by_step_and_metric_and_not_by_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age, step in enumerate(reversed(KEPT)):  # the oldest step has the newest files
        os.utime(folder_of(run, step), (10**9 + age, 10**9 + age))
    assert main(["checkpoint", "prune", "run", "--last", "1", "--every", "4", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert steps(run) == list(KEPT)
    assert "would remove step-00000002" in told and "would remove step-00000006" in told
    assert "keeps   step-00000004  a multiple of 4" in told and "step-00000008  one of the newest" in told
    assert main(["checkpoint", "prune", "run", "--last", "1", "--every", "4"]) == 0
    gone = capsys.readouterr().out
    assert gone == told.replace("would remove", "removed").replace("would free", "freed")
    assert steps(run) == [4, 8]
    assert not list((run / "checkpoints").glob(".*"))


def test_prune_keeps_the_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best are the ranking's first; it is changed here, so that they are neither the newest nor in order."""
    store = Store(run / "checkpoints")
    newest = store.load(8)
    store.save(8, type(newest)(newest.groups, {**newest.facts, "ranking": [[0.1, 3], [0.2, 4], [0.3, 2], [0.4, 8]]}))
    assert main(["checkpoint", "prune", "run", "--best", "1"]) == 0
    assert steps(run) == [4, 8], "step 3 has no checkpoint: the next best stays"
    assert "step-00000004  one of the 1 best: 0.2" in capsys.readouterr().out


def test_prune_never_removes_the_last_good_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (6, 8):
        damage(run, step)
    aside = run / "checkpoints" / "step-00000005.damaged-1"
    shutil.copytree(folder_of(run, 6), aside)
    assert main(["checkpoint", "prune", "run", "--last", "1"]) == 2
    told = capsys.readouterr().err
    assert "Its newest is damaged:" in told and "add --damaged" in told
    assert steps(run) == list(KEPT)
    assert main(["checkpoint", "prune", "run", "--damaged", "--last", "1"]) == 0
    assert steps(run) == [4] and not aside.exists()
    damage(run, 4)
    assert main(["checkpoint", "prune", "run", "--damaged", "--last", "1"]) == 2
    assert "None of its 1 checkpoints is whole." in capsys.readouterr().err
    assert steps(run) == [4]


def test_prune_of_damaged_ones_alone_leaves_the_whole_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 4)
    size = sum(file.stat().st_size for file in folder_of(run, 4).iterdir())
    assert main(["checkpoint", "prune", "run", "--last", "1", "--every", "4", "--dry-run"]) == 0
    assert "keeps   step-00000004  damaged: only --damaged removes it" in capsys.readouterr().out
    assert main(["checkpoint", "prune", "run", "--damaged"]) == 0
    assert steps(run) == [2, 6, 8]
    assert f"freed {human_bytes(size)}" in capsys.readouterr().out


def test_prune_waits_for_no_one_who_trains(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = FolderLock(run)
    lock.acquire()  # what a training process does; flock tells two handles of one process apart as well
    try:
        assert main(["checkpoint", "prune", "run", "--last", "1"]) == 2
        told = capsys.readouterr().err
        assert "run cannot be pruned now." in told and f"Its process id is {os.getpid()}." in told
        assert main(["checkpoint", "verify", "run"]) == 0, "looking is allowed"
    finally:
        lock.release()
    assert steps(run) == list(KEPT)
    assert main(["checkpoint", "prune", "run", "--last", "1"]) == 0
    assert steps(run) == [8]
