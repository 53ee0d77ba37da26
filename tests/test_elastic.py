"""Ranks that are started again, that hang, die, or are not alike; where a run's time went."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import run_cli, start_cli, three_parts
from tests.elastic_cases import RECIPE, SHORT, measured, own_loop, task, train
from tests.faults import ranked
from tests.faults.runs import Ended, lines
from tests.test_ranks import EXACT, four, ranks_of, wait_until
from thalweg.checkpoint import FolderLock
from thalweg.cli import main as cli
from thalweg.core import RanksError, RunFolderError
from thalweg.core.goodput import goodput, times_of
from thalweg.parallel import ALONE, Agent, Left, launch, left_to
from thalweg.parallel import joined as joining
from thalweg.parallel.beats import Beat, Beats, end_sibling
from thalweg.parallel.meeting import meet
from thalweg.report import write_report
from thalweg.run.again import check_in_sight
from thalweg.run.folder import RunFolder

__all__ = ["four"]

# --- started again ----------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_started_again_and_nothing_of_the_run_is_other(
    four: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torchrun's own agent; the bits of the run that nobody killed on as many ranks, and each sample once a step."""
    monkeypatch.setenv(ranked.LEDGER, str(tmp_path))
    sets = [word for path, value in SHORT.items() for word in ("--set", f"{path}={value}")]
    process = start_cli(
        "train", "tests.faults.ranked:task", "--ranks", "2", "--restarts", "2", "--runs", ".", "--name", "run", "--quiet",
        *sets, cwd=tmp_path,
    )  # fmt: skip
    records = tmp_path / "run" / "records.jsonl"
    wait_until(lambda: records.exists() and records.stat().st_size > 300, 120)
    killed = ranks_of(process.pid)[1]
    os.kill(killed, signal.SIGKILL)
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "rank 0 of 2: Rank 0 lost another of the 2 ranks" in told
    assert "Rank 1 is gone" in told and f"process {killed} on" in told
    assert "Started again by the launcher, on 2 ranks." in told
    assert "went into steps that count" in told and "restarting (1 times)" in told
    assert four[0][0]["ranked"] == "finished"
    Ended.of(tmp_path / "run").same_as(Ended.of(four[1] / "ranked"))
    ranked.each_once(tmp_path, SHORT["train.steps"])
    times = list(map(json.loads, (tmp_path / "run" / "times.jsonl").read_text().splitlines()))
    assert [line["again"] for line in times if line["kind"] == "start"] == [False, True]
    assert "restarting" in write_report(tmp_path / "run").read_text()


def agent_of(folder: Path, attempt: int = 0, local_rank: int = 0) -> Agent:
    file = folder / f"attempt_{attempt}" / str(local_rank) / "error.json"
    environment = {
        "TORCHELASTIC_ERROR_FILE": str(file),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "LOCAL_RANK": str(local_rank),
    }
    return Agent(environment)


def test_what_a_group_leaves_is_its_launchers(tmp_path: Path) -> None:
    agent_of(tmp_path, local_rank=1).leave(folder="runs/other")
    assert agent_of(tmp_path).left() == Left(), "one rank of a node speaks"
    agent_of(tmp_path).leave(folder="runs/digits", host="here")
    agent_of(tmp_path).leave(begun=True)
    assert agent_of(tmp_path, attempt=1).left() == Left("runs/digits", True, "here")
    assert left_to(ALONE, agent_of(tmp_path, attempt=1)).folder == "runs/digits"
    assert agent_of(tmp_path / "another launcher").left() == Left()
    assert Agent({}).left() == Left() and not Agent({}).is_elastic


def under(monkeypatch: pytest.MonkeyPatch, folder: Path, attempt: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / f"attempt_{attempt}" / "0" / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_the_next_group_goes_on_by_itself_and_another_launch_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, agents = tmp_path / "run", tmp_path / "agent"
    agents.mkdir()
    under(monkeypatch, agents, 0)
    train(task(), folder)
    under(monkeypatch, agents, 1)
    result, told = train(task(), folder)
    assert result.records == [] and told[0] == "Started again by the launcher, on 1 ranks."
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "other" / "attempt_0" / "0" / "error.json"))
    with pytest.raises(RunFolderError, match="already holds this run"):
        train(task(), folder)


def test_a_first_rank_that_does_not_see_the_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as err:
        check_in_sight(RunFolder(tmp_path / "run"), Left(str(tmp_path / "run"), True, "node-a"))
    asked, numbers, remedy = three_parts(err.value)
    assert "started again" in asked and "on node-a" in numbers and "checkpoint.store" in remedy
    check_in_sight(RunFolder(tmp_path / "run"), Left(str(tmp_path / "run"), False, "node-a"))  # it had not begun


def test_what_ends_for_good_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [word for pair in ("train.batch=16", "train.micro_batch=5.5") for word in ("--set", pair)]
    file = str(tmp_path / "attempt_0" / "0" / "error.json")
    elastic = {"TORCHELASTIC_ERROR_FILE": file, "TORCHELASTIC_RESTART_COUNT": "0"}
    first = run_cli("train", "digits", *wrong, cwd=tmp_path, **elastic)
    assert first.returncode == 2 and "micro_batch" in first.stderr
    second = run_cli("train", "digits", *wrong, cwd=tmp_path, **{**elastic, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert second.returncode == 2, second.stderr
    assert second.stderr == "This run ended with exit code 2, and is not started again.\n"
    agent_of(tmp_path).leave(code=0)
    under(monkeypatch, tmp_path, 0)
    nan = task(
        loss=lambda model, batch: model(batch["x"]).sum() * (float("nan") if ranked._now and ranked._now[0] else 1.0)
    )
    ranked.counted(monkeypatch)
    result, _ = train(nan, tmp_path / "run", **{"guard.patience": 2})
    assert result.exit_code == 3 and agent_of(tmp_path, attempt=1).left().code == 3


def test_restarts_go_with_ranks(tmp_path: Path) -> None:
    refused = run_cli("train", "digits", "--restarts", "2", cwd=tmp_path)
    assert refused.returncode == 2 and "--restarts goes with --ranks" in refused.stderr


def test_the_launcher_starts_no_group_again_that_has_ended_well(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert launch(["--version"], 1, restarts=1) == 0
    assert capfd.readouterr().out.count("thalweg") == 1
    assert signal.getsignal(signal.SIGTERM) == before


# --- meeting, and being lost ------------------------------------------------------------------------------------------


class Rendezvous:
    """torch.distributed, as one of several ranks over one store that outlives them."""

    PrefixStore = dist.PrefixStore

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.found = store, rank, world

    def rendezvous(self, url: str, timeout: timedelta) -> Any:
        yield self.found


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_groups_meet_in_one_store_one_after_the_other(store: Any) -> None:
    """torch's own keys are there from the group before: torch 2.13 reads them, and connects to processes that are gone."""
    for group in range(3):
        found: dict[int, Any] = {}
        if group == 1:  # somebody of a group that never met has asked, and is gone
            store.set("thalweg/asks/2", "nobody")

        def come(rank: int, found: dict[int, Any] = found) -> None:
            found[rank] = meet(Rendezvous(store.clone(), rank, 3), 20.0)[0]

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not found[0].check(["address"]), "nothing of the last group is here"
        found[0].set("address", f"{group}")
        assert [found[rank].get("address") for rank in range(3)] == [f"{group}".encode()] * 3


def test_who_does_not_come_is_named(store: Any) -> None:
    with pytest.raises(RuntimeError, match="ranks 1, 2 of 3 have not come"):
        meet(Rendezvous(store, 0, 3), 0.1)
    with pytest.raises(RuntimeError, match="rank 0 has not come"):
        meet(Rendezvous(store, 2, 3), 0.1)


def test_ranks_that_are_waited_for_are_named(store: Any) -> None:
    """One has died, one hangs as a whole, one is slow in its own work; each is told by what the others see."""
    calls = [5, 5, 5]
    beats = [Beats(store.clone(), rank, 3, lambda rank=rank: (calls[rank], 7, "at work"), 0.1) for rank in range(3)]
    time.sleep(0.3)
    assert beats[0].behind() == {}
    calls[:2] = [6, 6]
    ((rank, (beat, why)),) = beats[0].behind().items()
    assert (rank, why, beat.step) == (2, "is behind the others", 7)
    beats[2].end()
    ((rank, (beat, why)),) = beats[0].behind().items()
    assert (rank, why) == (2, "stands still") and f"step 7 made, at work; process {os.getpid()}" in str(beat)
    beats[1].end("DataError: a broken file")
    ((rank, (beat, why)),) = beats[0].behind().items()
    assert (rank, why, beat.last) == (1, "ended with an error", "DataError: a broken file")
    store.set("beats/2", json.dumps([1, 5, 7, "at work", beat.host, 2**22 + 1, ""]))
    assert beats[0].behind()[2][1] == "is gone"
    beats[0].end()


def test_only_a_rank_of_the_same_launcher_is_ended(tmp_path: Path) -> None:
    assert not end_sibling(Beat(1, 1, 1, "at work", "another host", 1))
    mine = start_cli("doctor", cwd=tmp_path)  # a child of this process, and no sibling
    try:
        host = os.uname().nodename
        assert not end_sibling(Beat(1, 1, 1, "at work", host, mine.pid))
        assert not end_sibling(Beat(1, 1, 1, "at work", host, os.getpid()))
        assert mine.poll() is None
    finally:
        mine.kill()
        mine.communicate()


def test_what_is_said_of_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Beat(3, 9, 12, "waiting in the sum of gradients", "node-b", 77)

    class Named:
        def behind(self) -> Any:
            return {2: (beat, "stands still")}

    ranks = object.__new__(joining.Joined)
    ranks.rank, ranks.world, ranks.timeout, ranks.at, ranks._calls = 0, 4, 5.0, 13, 0
    ranks._beats = Named()  # type: ignore[assignment]
    with pytest.raises(RanksError) as err, ranks._in_touch("the sum of gradients"):
        raise RuntimeError("[/gloo/pair.cc:534] Timed out waiting 5000ms for recv. This is typically caused by a crash")
    asked, numbers, remedy = three_parts(err.value)
    assert "longer than 5 s" in asked and "--resume" in remedy and err.value.lost
    assert numbers == (
        "After step 13, in the sum of gradients: Timed out waiting 5000ms for recv. Rank 2 stands still "
        "(step 12 made, waiting in the sum of gradients; process 77 on node-b)."
    )


# --- one group to a folder --------------------------------------------------------------------------------------------


def test_a_folder_is_waited_for_while_the_last_group_ends(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(RunFolderError, match="Another process is training"):
        second.acquire(0.2)
    threading.Timer(0.3, first.release).start()
    second.acquire(20.0)
    second.check()
    second.release()


def test_a_group_that_has_lost_its_folder_to_another_writes_nothing_more(tmp_path: Path) -> None:
    """Where locks hold on one machine alone, the newer group has the folder."""
    folder = tmp_path / "run"

    def taken(model: Any, batch: Any) -> Any:
        if ranked._now and ranked._now[0] == 2:
            (folder / "lock").write_text("4711\nnode-b 00\n")
        return task().loss(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        ranked.counted(patch)
        with pytest.raises(RunFolderError) as err:
            train(task(loss=taken), folder, **{"train.steps": 2000, "checkpoint.every": 100})
    asked, numbers, _ = three_parts(err.value)
    assert "has taken the run folder" in asked and "4711 on node-b" in numbers
    assert list((folder / "checkpoints").iterdir()) == []


# --- ranks that are not alike -----------------------------------------------------------------------------------------


def test_ranks_that_are_not_alike_are_refused_on_all_of_them(four: Any) -> None:
    for rank, found in enumerate(four[0][:2]):
        told = found["elastic refused"]
        assert "another recipe or program" in told["torch"] and "rank 1 has torch 2.11.0" in told["torch"]
        assert "rank 0 has my_loss.py" in told["sources"] and "rank 1 has my_loss.py" in told["sources"]
        assert told["device"].startswith("DeviceError" if rank else "RanksError: Rank 1 failed"), told["device"]
        assert "of cuda, counted from 0" in told["device"]
        assert "rank 1 goes another way" in told["way"]
        assert "TanhBackward0: 0 times on rank 0, 1 on rank 1" in told["way"]
        assert "rank 1 gives another loss" in told["loss"] and "rank 0's" in told["loss"]
        assert "Ranks hold other states after step 4" in told["states"]
        assert "TrainStep was not told of the 4 ranks" in told["step"]
        assert "micro_batch='auto' is out of TrainStep's reach on 2 ranks" in told["step auto"]
        assert "'both' cannot be joined over ranks" in told["metric"] and "{**collection}" in told["metric"]
        assert "'recall' is no number" in told["metric of three"] and "shape (3,)" in told["metric of three"]


def test_a_rank_that_waits_inside_its_forward_pass_says_what_for(four: Any) -> None:
    """The others give it up; its own error is what it ends with, and not that they are gone."""
    first, second = (found["waits inside"] for found in four[0][:2])
    assert first == "RuntimeError: Timed out waiting for a collective of the model"
    assert second.startswith("RanksError: Rank 1 lost another of the 2 ranks"), second


def test_a_traceback_says_whose_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(asked: Any) -> int:
        raise KeyError("images")

    monkeypatch.setattr(cli, "_tasks", broken)
    for world, told in (("1", ""), ("3", "rank 2 of 3: KeyError\n")):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(KeyError):
            cli.main(["tasks"])
        assert capsys.readouterr().err == told


def test_a_loss_that_draws_by_itself_is_told_of_and_not_refused(four: Any) -> None:
    assert [text for text in four[0][0]["drawing"] if "another loss each time, on ranks 0, 1" in text]


# --- evaluation, samples, and loops of one's own ----------------------------------------------------------------------


def test_metrics_that_add_up_for_themselves_see_each_sample_once_whoever_has_it(four: Any) -> None:
    alone = measured()
    assert alone["metrics"][0]["seen"] == 20 and alone["ids"] == [[float(i) for i in range(20)]] * 2
    for world in (2, 3):
        told = [found["measured", world] for found in four[0][:world]]
        assert told[0]["ids"] == alone["ids"]
        for one in told:
            assert len(one["metrics"]) == 2
            for mine, wanted in zip(one["metrics"], alone["metrics"]):
                assert mine == pytest.approx(wanted, abs=1e-9)


def test_a_sample_is_drawn_by_the_first_rank(four: Any) -> None:
    assert [found["measured", 2]["sample"] for found in four[0][:2]] == ["163 weights", ""]


def test_a_loop_of_ones_own_on_ranks_is_that_of_one_process(four: Any) -> None:
    alone = own_loop()
    for world in (2, 3):
        told = [found["own loop", world] for found in four[0][:world]]
        for one in told:
            assert one["losses"] == pytest.approx(alone["losses"], abs=EXACT)
            for name, weight in alone["weights"].items():
                assert float((one["weights"][name] - weight).abs().max()) <= EXACT, name
            assert all(torch.equal(one["weights"][name], told[0]["weights"][name]) for name in alone["weights"])


# --- goodput ----------------------------------------------------------------------------------------------------------

START = {"kind": "start", "again": False, "made": [0, 0.0], "kept": [0, 0.0]}


def test_goodput_of_a_made_up_history() -> None:
    """Killed at step 10 after a checkpoint of step 8, started again, stopped by hand, resumed a day later from step 12 of 14."""
    history = [
        {**START, "called": 100.0, "begun": 103.0, "step": 0},
        {"kind": "saved", "time": 107.2, "step": 4, "spent": {"evaluating": 1.0, "saving": 0.2}},
        {"kind": "saved", "time": 111.4, "step": 8, "spent": {"evaluating": 1.0, "saving": 0.4}},
        {**START, "called": 120.0, "begun": 122.0, "step": 8, "again": True, "made": [10, 10.4], "kept": [8, 8.4]},
        {"kind": "saved", "time": 128.0, "step": 12, "spent": {"saving": 0.5, "waiting for data": 1.0}},
        {"kind": "end", "time": 131.0, "step": 14, "spent": {"saving": 0.5, "waiting for data": 1.0}},
        {**START, "called": 9000.0, "begun": 9001.0, "step": 12, "made": [14, 9.0], "kept": [12, 6.0]},
        {"kind": "end", "time": 9005.0, "step": 16, "spent": {}},
    ]
    told = goodput(history)
    assert told.seconds == pytest.approx(
        {
            "steps": (8.4 - 1.4) + (6.0 - 1.5) + 4.0,
            "evaluating": 1.0,
            "saving": 0.4 + 0.5,
            "waiting for data": 1.0,
            "compiling": 0.0,
            "starting": 3.0 + 2.0 + 1.0,
            "repeated": 2.0 + 3.0,
            "restarting": 120.0 - 113.4,
        }
    )
    assert (told.restarts, told.repeated) == (1, 4)
    assert told.share == pytest.approx(15.5 / 36.0)
    assert str(told).startswith("43.1% of 36.0 s went into steps that count; evaluating 1.0 s")
    assert goodput([]).share == 0.0


def test_half_a_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "times.jsonl"
    assert times_of(file) == []
    file.write_text('{"kind": "end"}\n{"kind": "sta\n{"kind": "saved"}')
    assert [line["kind"] for line in times_of(file)] == ["end", "saved"]


def test_goodput_of_a_run_that_began_anew() -> None:
    """All that came before an earlier checkpoint's steps is lost, over several starts."""
    history = [
        {**START, "called": 0.0, "begun": 0.0, "step": 0},
        {**START, "called": 10.0, "begun": 10.0, "step": 5, "again": True, "made": [6, 9.0], "kept": [5, 8.0]},
        {**START, "called": 20.0, "begun": 20.0, "step": 2, "again": True, "made": [9, 7.0], "kept": [2, 3.0]},
        {"kind": "end", "time": 28.0, "step": 9, "spent": {}},
    ]
    told = goodput(history)
    assert told.seconds["steps"] == pytest.approx(3.0 + 8.0)
    assert told.seconds["repeated"] == pytest.approx((9.0 - 3.0) + 7.0)
    assert told.seconds["restarting"] == pytest.approx(1.0 + 3.0) and told.repeated == 4 + 4


def test_goodput_of_a_real_run(tmp_path: Path) -> None:
    result, _ = train(task(), tmp_path / "run", **{"evaluate.every": 2})
    told = result.goodput
    assert told is not None and told.seconds["evaluating"] > 0 < told.seconds["steps"]
    assert "went into steps that count" in str(told) and told.repeated == told.restarts == 0
    page = write_report(tmp_path / "run").read_text()
    assert "<h2" in page and ">Time<" in page
    assert [line["kind"] for line in lines(tmp_path / "run") if line["kind"] == "step"] == ["step"] * RECIPE[
        "train.steps"
    ]
    assert train(task())[0].goodput is None, "without a folder nothing is written down"
