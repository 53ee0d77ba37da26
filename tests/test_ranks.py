"""Ranks: 1, 2, 3 and 4 processes train the same run; they stop, resume, fail and refuse together."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks_cases
from tests.conftest import ROOT, free_port, run_cli, spawn, start_cli, three_parts
from tests.ranks_cases import BITS, CASES, LONG, STOP_IN, bits, case, counted_task, recorded, resumed, train
from thalweg.core import VERSION, DeviceError, RanksError, RecipeError
from thalweg.data import Items, Stream, Tensors, held_out, make_feed
from thalweg.device import Device
from thalweg.engine.portions import Limit
from thalweg.engine.together import Place
from thalweg.parallel import ALONE, join, launch

EXACT = 1e-10


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[Any, Any]], Path]:
    """What each of four processes found, and the folder of their runs."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # workers share one set of processes
    folder = base / "ranks"
    with open(base / "ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            spawn(ranks_cases.go_through, 4, str(folder))
    return [torch.load(folder / f"rank {rank}") for rank in range(4)], folder


def close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same run up to the order of summation."""
    assert found["steps"] == wanted["steps"] and found["weight"] == wanted["weight"]
    for what in ("losses", "norms"):
        assert found[what] == pytest.approx(wanted[what], abs=EXACT, rel=EXACT if what == "norms" else 0)
    assert found["weights"].keys() == wanted["weights"].keys()
    gaps = {n: float((t - wanted["weights"][n]).abs().max()) for n, t in found["weights"].items()}
    assert {n: gap for n, gap in gaps.items() if not gap <= EXACT} == {}
    assert len(found["metrics"]) == len(wanted["metrics"])
    for mine, theirs in zip(found["metrics"], wanted["metrics"]):
        assert mine == pytest.approx(theirs, abs=EXACT)


@pytest.mark.parametrize("name", list(CASES))
def test_any_number_of_ranks_is_the_same_run(name: str, four: Any) -> None:
    wanted = case(name)
    assert len(wanted["losses"]) == ranks_cases.STEPS and len(set(wanted["losses"])) > 1
    for world in CASES[name][2]:
        told = [found[name, world] for found in four[0][:world]]
        close(told[0], wanted)
        assert len({one["digest"] for one in told}) == 1, "all ranks hold the same bits"


@pytest.mark.parametrize("name", list(BITS))
def test_exact_reduce_is_the_same_bits_on_any_number_of_ranks(name: str, four: Any) -> None:
    wanted = bits(name)
    for world in BITS[name][2]:
        for found in four[0][:world]:
            one = found["bits", name, world]
            assert [one[what] for what in ("losses", "norms", "metrics")] == [
                wanted[what] for what in ("losses", "norms", "metrics")
            ]
            assert one["digest"] == wanted["digest"]
    plain = bits(name, exact_reduce=False)
    assert plain["losses"] == pytest.approx(wanted["losses"], rel=1e-4)


def test_without_exact_reduce_the_bits_are_others(four: Any) -> None:
    assert four[0][0]["other bits"]["digest"] != bits("gpt", exact_reduce=False)["digest"]


def test_a_step_has_as_many_collectives_whatever_the_accumulation(four: Any) -> None:
    for found in four[0][:2]:
        assert found["collectives", 8] == found["collectives", 2]
        assert found["collectives", 8]["all_reduce"] == 3, "gradients, what was counted, and a word between steps"
        assert sum(found["collectives", 8].values()) == 3


def test_every_rank_stops_after_the_same_step_where_one_gets_a_signal(four: Any) -> None:
    told = [found["interrupted"] for found in four[0][:2]]
    assert [one["reason"] for one in told] == ["interrupted"] * 2
    assert [one["steps"][-1] for one in told] == [STOP_IN + 2] * 2, "the step of the signal, and the one under way"
    assert told[0]["digest"] == told[1]["digest"]


def test_another_number_of_ranks_goes_on_with_the_same_run(four: Any) -> None:
    ranks, folder = four
    whole, before = ranks[0]["whole"], ranks[0]["interrupted"]
    again = [found["resumed on 2"] for found in ranks[:2]]
    assert {one["digest"] for one in again} == {whole["digest"]}, "the same ranks: the same bits"
    for metrics, wanted in zip(reversed(again[0]["metrics"]), reversed(whole["metrics"])):
        assert metrics == wanted
    with recorded() as seen:
        alone = {**resumed(folder / "on 1"), "seen": list(seen)}
    assert ranks[0]["resumed on 3"]["told"] == ["The run began on 2 ranks, and goes on with 3."]
    assert again[0]["told"] == []
    for one in (ranks[0]["resumed on 3"], alone):
        assert before["steps"] + one["steps"] == whole["steps"]
        close({**one, "metrics": []}, {**_from(whole, len(before["steps"])), "metrics": []})
    wanted_ids = Counter(dict.fromkeys(range(50), 2))  # two epochs
    for world in (1, 2, 3):
        later = [alone] if world == 1 else [found[f"resumed on {world}"] for found in ranks[:world]]
        seen = [pair for one in [*(found["interrupted"] for found in ranks[:2]), *later] for pair in one["seen"]]
        assert Counter(sample for _, sample in seen) == wanted_ids, "no sample is missed or repeated"
        assert len(seen) == len(set(seen))
        assert Counter(step for step, _ in seen) == {0: 16, 1: 16, 2: 16, 3: 2, 4: 16, 5: 16, 6: 16, 7: 2}


def _from(run: dict[str, Any], step: int) -> dict[str, Any]:
    return {**run, **{what: run[what][step:] for what in ("losses", "norms", "steps", "weight")}}


def test_every_sample_is_evaluated_once(four: Any) -> None:
    seen = [sample for found in four[0][:2] for sample in found["whole"]["evaluated"]]
    assert Counter(seen) == dict.fromkeys(range(20), 3), "three evaluations of 20 samples"
    assert all(0 < len(found["whole"]["evaluated"]) < 60 for found in four[0][:2]), "each rank evaluates its share"


def test_weights_that_differ_at_the_start_become_the_first_ranks(four: Any) -> None:
    told = [found["other weights"] for found in four[0][:2]]
    assert told[0]["digest"] == told[1]["digest"]
    assert told[0]["told"] == ["Ranks 1 began with other weights; those of rank 0 are taken."]
    assert (told[0]["heard"], told[1]["heard"]) == (ranks_cases.STEPS, 0), "the first rank alone calls sinks"


def test_what_is_measured_is_decided_once_for_all(four: Any) -> None:
    told = [found["auto"] for found in four[0][:2]]
    assert told[0]["digest"] == told[1]["digest"]
    for path in ("train.micro_batch", "precision"):
        assert told[0]["decisions"][path] == told[1]["decisions"][path]
    assert told[0]["decisions"]["train.micro_batch"] == 8, "the largest with one for each rank"


def test_a_run_of_one_process_is_the_run_of_two(four: Any) -> None:
    close(four[0][0]["whole"], train(counted_task(), LONG))


def test_memory_that_runs_out_on_one_rank_is_its_own_trouble_and_the_others_lesson(four: Any) -> None:
    told = [found["memory"] for found in four[0][:2]]
    close(told[0], ranks_cases.out_of_memory_on(1, 0))  # a run without trouble
    assert told[0]["digest"] == told[1]["digest"]
    assert [one["most"] for one in told] == [2, 2], "learnt by rank 1, kept by both"


def test_a_bad_sample_is_named_where_the_rank_that_tells_has_it_and_else_whose_share_was_seen(four: Any) -> None:
    found = four[0][0]["bad samples"]
    mine, others = (text for text in found["told"] if text.startswith("Step "))
    assert f"Step 2: the loss is not finite. Sample {found['bad'][0]}. What is not finite is in the data." in mine
    assert "Only the share of rank 0 of 2 was looked into." in others and "everything is finite" in others


def test_ranks_go_back_together_where_memory_teaches_one_of_them_just_then(four: Any) -> None:
    told = [found["rewound"] for found in four[0][:2]]
    assert [sum("Back to the weights of step 0" in text for text in one["told"]) for one in told[:1]] == [1]
    assert [one["reason"] for one in told] == ["finished"] * 2
    assert told[0]["steps"] == list(range(1, 7)) and told[0]["digest"] == told[1]["digest"]


def test_what_cannot_be_is_refused_on_all_ranks(four: Any) -> None:
    told = [found["refused"] for found in four[0][:3]]
    for rank, one in enumerate(told):
        assert "RanksError: Rank 1 has another recipe" in one["recipe"] and "lr = 0.02" in one["recipe"]
        if rank == 0:  # what all of them find is the first rank's to say
            assert "RecipeError" in one["too many"]
        assert "more ranks than micro-batches: 3 ranks" in one["too many"] and "one of 1, 2, 4;" in one["too many"]
        assert "release_gradients='two-pass' is not possible on 3 ranks" in one["release"]
        assert "Synchronised batch normalization" in one["synced"] and "'1'" in one["synced"]
        assert "moves a buffer" in one["moving"] and "'calls'" in one["moving"]
        assert "moves a buffer or a weight" in one["renormed"] and "'words.weight'" in one["renormed"]
        assert "gives another loss than that of rank 0" in one["asking"], one["asking"]
        assert "parallel='fsdp' is out of TrainStep's reach" in one["loop"], one["loop"]
        assert ("DataError" if rank == 1 else "Rank 1 failed") in one["data of one"]
        assert "Rank 1 has another model than rank 0" in one["model of one"], one["model of one"]


def test_a_micro_batch_that_is_not_given_leaves_one_for_each_rank(four: Any) -> None:
    assert four[0][0]["chosen"]["decisions"]["train.micro_batch"] == 8
    assert four[0][0]["chosen"]["decisions"]["ranks"] == 3


def test_a_hung_rank_is_given_up_and_the_last_state_is_kept(four: Any) -> None:
    ranks, folder = four
    told = [found["hung"] for found in ranks[:2]]
    assert all(one["words"].startswith("RanksError: Rank") for one in told), told
    assert "longer than 4 s" in told[0]["words"] and "--resume" in told[0]["words"]
    assert told[0]["after"] < 15
    steps = sorted(path.name for path in (folder / "hung" / "checkpoints").iterdir())
    assert steps[-2:] == ["step-00000004", "step-00000005"], "the state before the step that broke off is saved besides"
    with recorded():
        again = train(counted_task(), {**LONG, "checkpoint.every": 2}, folder / "hung", resume=True)
    assert again["reason"] == "finished"


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tensors, Items, Stream])
def test_shares_of_a_feed_are_its_micro_batches_each_once(kind: Any) -> None:
    rows = [{"x": torch.tensor(float(i))} for i in range(11)]
    source = Tensors({"x": torch.arange(11.0)}) if kind is Tensors else kind(rows)

    def windows(share: tuple[int, int]) -> list[list[list[float]]]:
        feed = make_feed(
            source, batch=6, micro_batch=2, seed=0, keep_last=True, device=torch.device("cpu"), share=share
        )
        return [[batch["x"].tolist() for batch in window] for window in feed.windows(0, 4)]

    whole, parts = windows((0, 1)), [windows((rank, 4)) for rank in range(4)]
    for step, window in enumerate(whole):
        assert [parts[i % 4][step][i // 4] for i in range(len(window))] == window
        assert sum(len(part[step]) for part in parts) == len(window)
    assert parts[3] == [[], [], [], []], "a rank may have none"
    held = [[b["x"].tolist() for b in held_out(source, 4, torch.device("cpu"), (rank, 2))] for rank in (0, 1)]
    assert held == [[[0, 1, 2, 3], [8, 9, 10]], [[4, 5, 6, 7]]]


def test_a_rank_names_its_micro_batches_as_one_process_would() -> None:
    for portions in (1, 2):
        for world in (1, 2, 3):
            named = []
            for rank in range(world):
                place, index = Place(rank, world, 8), 0
                for micro in range(rank, 7, world):
                    for part in range(portions):
                        local = (micro // world) * 8 + part * 8 // portions
                        named.append((*place.of(index, local, micro // world, portions), micro * portions + part))
                        index += 1
            assert sorted(n for n, _, _ in named) == list(range(7 * portions))
            assert all(n == wanted and first == n * 8 // portions for n, first, wanted in named)


def test_another_ranks_limit_is_taken_where_it_is_smaller() -> None:
    limit = Limit("micro-batch", Device(torch.device("cpu")))
    limit.lower(4)
    limit.lower(8)
    assert limit.most == 4 and ["another rank" in news.text for news in limit.news] == [True]


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join() is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RanksError) as err:
        join(timeout=1)
    assert "2 ranks were to train together" in three_parts(err.value)[0]


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Device(torch.device("cpu")).of_rank(3) == Device(torch.device("cpu"))
    monkeypatch.setattr("thalweg.device.accelerator.count", lambda kind: 2)
    with pytest.raises(DeviceError) as few:
        Device(torch.device("cuda", 0)).of_rank(2)
    assert "There are 2 of cuda" in three_parts(few.value)[1]
    with pytest.raises(DeviceError) as none:
        _ = Device(torch.device("mps")).ranks_backend
    assert "on mps" in three_parts(none.value)[0]


# --- the command line -------------------------------------------------------------------------------------------------

QUICK = ("--set", "precision=fp32", "--set", "model.width=8", "--quiet")


def test_ranks_on_the_command_line(tmp_path: Path) -> None:
    done = run_cli("train", "digits", "--ranks", "2", "--set", "train.steps=4", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits"]
    assert done.stdout.count("finished: All steps are done.") == 1 == done.stdout.count("report: runs/digits/report")
    under_torchrun = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         "-m", "thalweg", "train", "digits", "--resume", "--quiet"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert under_torchrun.returncode == 0, under_torchrun.stderr
    assert under_torchrun.stdout.count("finished: All steps are done.") == 1
    refused = run_cli("train", "digits", "--ranks", "2", *QUICK, "--name", "digits", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("error:") == 1, refused.stderr
    assert "digits already holds this run" in refused.stderr or "another recipe" in refused.stderr


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the children."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["SIGTERM to the launcher", "a rank is killed", "the launcher is killed"])
def test_an_end_from_outside(how: str, tmp_path: Path) -> None:
    process = start_cli(
        "train", "digits", "--ranks", "2", "--set", "train.steps=100000", "--set", "checkpoint.every=20",
        "--set", "evaluate.every=0", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    kept = tmp_path / "runs" / "digits" / "checkpoints"
    wait_until(lambda: kept.is_dir() and any(p.name.startswith("step-") for p in kept.iterdir()), 60)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    if how == "a rank is killed":
        os.kill(ranks[1], signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGTERM if how.startswith("SIGTERM") else signal.SIGKILL)
    told, _ = process.communicate(timeout=45)
    wait_until(lambda: not any(map(is_there, ranks)), 45)
    newest = max(int(path.name.split("-")[1]) for path in kept.iterdir() if path.name.startswith("step-"))
    if how.startswith("SIGTERM"):
        assert process.returncode == 143, told
        assert newest % 20 or "to go on" in told
        assert told.count("to go on: thalweg train digits --resume --ranks 2") == 1, told
    elif how == "a rank is killed":
        assert process.returncode not in (0, None), told
        assert "lost another of the 2 ranks" in told, told


def test_the_launcher_gives_signals_back(capfd: pytest.CaptureFixture[str]) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    assert launch(["--version"], 2) == 0
    assert capfd.readouterr().out.split() == ["thalweg", VERSION] * 2
    assert [signal.getsignal(number) for number in numbers] == before


def test_numbers_of_ranks_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as err:
        launch([], 0)
    assert "--ranks 0" in three_parts(err.value)[0]
    refused = run_cli("train", "digits", "--ranks", "two", cwd=tmp_path)
    assert refused.returncode == 2 and "--ranks two names no number of processes" in refused.stderr
    no_time = run_cli("train", "digits", "--ranks", "2", "--ranks-timeout", "0", cwd=tmp_path)
    assert no_time.returncode == 2 and "--ranks-timeout 0 leaves no time" in no_time.stderr
    other = run_cli("train", "digits", "--ranks", "2", cwd=tmp_path, RANK="0", WORLD_SIZE="1")
    assert other.returncode == 2 and "one of 1 ranks" in other.stderr
