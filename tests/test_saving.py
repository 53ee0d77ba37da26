"""Saving beside the run: what the step waits for, what a failing store does to a run, and how a run goes on with changes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import thalweg
from tests.conftest import three_parts
from tests.models import batchnorm_net, mean_loss, points
from thalweg.checkpoint import Job, LocalPlace, Saver, Snapshot, Store
from thalweg.core import CheckpointError, Plan, Recipe, RunFolderError, Split, StopReason, read_lines
from thalweg.core.changes import differences, refuse_changes
from thalweg.engine.signals import Asked, exit_code
from thalweg.watch import JsonLines, jsonl

BASE = {
    "precision": "fp32",
    "train.steps": 12,
    "train.batch": 16,
    "optimizer.lr": 0.01,
    "regularize.average": 0.9,
    "checkpoint.every": 2,
    "checkpoint.keep_last": 3,
    "evaluate.every": 4,
}


def go(folder: Path | None, *, loss: Any = mean_loss, resume: Any = False, accept: Any = (), **changes: Any) -> Any:
    data = Split(train=points(50), test=points(20, seed=1))
    recipe = Recipe().override({**BASE, **changes})
    return thalweg.train(
        lambda: batchnorm_net(dropout=0.3), loss, data, recipe, folder=folder, resume=resume, accept=accept
    )


def bits(result: Any) -> dict[str, bytes]:
    return {
        k: v.contiguous().flatten().view(torch.uint8).numpy().tobytes() for k, v in result.model.state_dict().items()
    }


def told(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "records.jsonl") if line["kind"] == "event"]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_lines(folder / "records.jsonl") if line["kind"] != "event"]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The bits and the records of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    return bits(go(folder)), steps_of(folder)


def small(step: int) -> Snapshot:
    return Snapshot({"weights": {"w": torch.full((3,), float(step))}, "state": {}}, {"step": step})


class Gated(LocalPlace):
    """A disk that does nothing until it is told to, and then fails as often as it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate, self.entered, self.failing = threading.Semaphore(0), threading.Semaphore(0), 0

    @contextmanager
    def new(self, folder: str) -> Iterator[Any]:
        self.entered.release()
        self.gate.acquire()
        if self.failing:
            self.failing -= 1
            raise OSError(errno.EIO, "the disk is away")
        with super().new(folder) as writing:
            yield writing


# --- the thread ------------------------------------------------------------------------------------------------------


def saver(place: Any, kept: list[int] | None = None, **options: Any) -> Saver:
    return Saver(Store(place), retain=lambda job: None if kept is None else kept.append(job.step), **options)


def test_whoever_saves_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    place = Gated(tmp_path)
    one = saver(place)
    one.put(lambda: Job(1, small(1)))
    assert place.entered.acquire(timeout=10) and Store(tmp_path).steps() == []  # under way, and we are here
    place.gate.release()
    assert one.finish(0) and Store(tmp_path).steps() == [1]


def test_a_later_checkpoint_takes_the_place_of_one_that_waits_unless_that_must_be_kept(
    tmp_path: Path,
) -> None:
    place = Gated(tmp_path)
    one = saver(place, patience=0.05)
    one.put(lambda: Job(1, small(1)))
    assert place.entered.acquire(timeout=10)
    one.put(lambda: Job(2, small(2)))
    one.put(lambda: Job(3, small(3), must=True))
    fourth = threading.Thread(target=lambda: one.put(lambda: Job(4, small(4))))
    fourth.start()
    fourth.join(0.2)
    assert fourth.is_alive()  # it waits, because the third must be kept
    place.gate.release(3)
    fourth.join(10)
    assert one.finish(0) and Store(tmp_path).steps() == [1, 3, 4]
    left_out = [news.step for news in one.news if news.text]
    assert left_out == [2]


def test_a_fast_disk_leaves_out_none(tmp_path: Path) -> None:
    one = saver(tmp_path)
    for step in range(1, 20):
        one.put(lambda step=step: Job(step, small(step)))  # type: ignore[misc]
    assert one.finish(0) and Store(tmp_path).steps() == list(range(1, 20))


def test_a_disk_that_hangs_does_not_keep_a_run_that_is_to_end(tmp_path: Path) -> None:
    """And what is copied is let go; the thread is a daemon."""
    place = Gated(tmp_path)
    asked: list[int] = []
    one = saver(place, hurry=lambda: bool(asked), patience=0.05)
    one.put(lambda: Job(1, small(1)))
    assert place.entered.acquire(timeout=10)
    one.put(lambda: Job(2, small(2), must=True))
    asked.append(15)
    one.put(lambda: Job(3, small(3), must=True))  # does not wait for the second, that must be kept, for ever
    assert not one.finish(0.2)
    place.gate.release(2)


def test_the_thread_ends_with_the_run_and_holds_nothing(tmp_path: Path) -> None:
    import gc
    import weakref

    before = set(threading.enumerate())
    result = go(tmp_path / "run")
    model = weakref.ref(result.model)
    del result
    gc.collect()
    assert model() is None
    assert set(threading.enumerate()) <= before


def test_a_store_that_raises_anything_ends_neither_the_thread_nor_the_run(tmp_path: Path) -> None:
    import asyncio

    class Odd(LocalPlace):
        @contextmanager
        def new(self, folder: str) -> Iterator[Any]:
            raise asyncio.CancelledError("no more")
            yield

    one = saver(Odd(tmp_path))
    one.put(lambda: Job(1, small(1)))
    assert not one.finish(0.3) and "CancelledError" in one.news[0].failed


def test_the_best_that_was_not_saved_does_not_cost_the_second_best(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2, 3, 4):
        store.save(step, small(step))
    assert store.retain(last=1, every=0, best=[9, 2, 1], num_best=1) == [1, 3]


def test_what_cannot_be_read_now_is_neither_passed_over_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that is away, no more descriptors, no memory: the checkpoint may be whole."""
    from thalweg.checkpoint import store as store_module
    from thalweg.checkpoint.convert.prune import prune

    go(tmp_path / "run")
    store = Store(tmp_path / "run" / "checkpoints")
    newest, real = store.steps()[-1], os.open
    away = [10**6]

    def opened(path: Any, *rest: Any) -> int:
        if f"step-{newest:08d}/weights" in str(path) and away[0]:
            away[0] -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(store_module, "_MOMENT", 0.0)
    with pytest.raises(CheckpointError) as err:
        go(tmp_path / "run", resume=True)
    asked, numbers, remedy = three_parts(err.value)
    assert f"step {newest}" in asked and "Too many open files" in numbers and "--resume 10" in remedy
    assert prune(tmp_path / "run", damaged=True).removed == [] and store.steps()[-1] == newest
    away[0] = 1  # it passes: asked once more, all is well
    assert go(tmp_path / "run", resume=True).reason is StopReason.FINISHED
    assert store.steps()[-1] == newest


def test_two_runs_do_not_share_a_store(tmp_path: Path) -> None:
    where = str(tmp_path / "shared")
    go(tmp_path / "a", **{"checkpoint.store": where})
    with pytest.raises(RunFolderError) as err:
        go(tmp_path / "b", **{"checkpoint.store": where, "optimizer.lr": 0.5})
    assert "another recipe" in three_parts(err.value)[0]
    held = Store(where, sweep=False).steps()
    (tmp_path / "shared" / "run" / "recipe.toml").unlink()
    (tmp_path / "shared" / "run" / "plan.json").unlink()
    (tmp_path / "shared" / "run").rmdir()
    with pytest.raises(RunFolderError) as err:
        go(tmp_path / "c", **{"checkpoint.store": where})
    assert "already holds checkpoints" in three_parts(err.value)[0] and Store(where, sweep=False).steps() == held


def test_the_newest_run_owns_a_store_that_has_no_locks(memory: str) -> None:
    first, second = Store(memory, sweep=False), Store(memory, sweep=False)
    first.place.claim()
    first.save(1, small(1))
    second.place.claim()
    with pytest.raises(CheckpointError) as err:
        first.save(2, small(2))
    assert "another run has begun" in three_parts(err.value)[1]
    second.save(3, small(3))
    assert second.steps() == [1, 3]


@pytest.mark.parametrize("where", ["simplecache::s3://bucket/x", "://x", "a b://x"])
def test_addresses_that_are_none(tmp_path: Path, where: str) -> None:
    with pytest.raises(CheckpointError) as err:
        go(tmp_path / "run", **{"checkpoint.store": where})
    assert "no address of a store" in three_parts(err.value)[0]


def test_a_step_saved_again_without_exchange_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames: the old one gets its name back."""
    from thalweg.checkpoint import files

    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    store = Store(tmp_path)
    store.save(1, small(1))
    real, count = os.rename, itertools.count()

    def rename(a: Any, b: Any) -> None:
        if next(count) == 1:
            raise KeyboardInterrupt  # as a kill, but for the process
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        store.save(1, Snapshot({"weights": {"w": torch.zeros(1)}}, {"step": 1}))
    monkeypatch.setattr(os, "rename", real)
    assert Store(tmp_path).load(1).facts == {"step": 1} and Store(tmp_path).fault(1) == ""
    assert torch.equal(Store(tmp_path).load(1).groups["weights"]["w"], small(1).groups["weights"]["w"])
    store.save(1, small(5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_links_in_the_place_of_lock_and_records_are_not_followed(tmp_path: Path) -> None:
    go(tmp_path / "run")
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    for name in ("lock", "records.jsonl"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).symlink_to(precious)
        with pytest.raises(RunFolderError):
            go(tmp_path / "run", resume=True)
        assert precious.read_text() == "keep me"
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).touch()


def test_what_failed_is_tried_again_at_the_end(tmp_path: Path) -> None:
    place = Gated(tmp_path)
    place.failing = 2
    place.gate.release(3)
    kept: list[int] = []
    one = saver(place, kept)
    one.put(lambda: Job(5, small(5)))
    assert one.finish(20) and Store(tmp_path).steps() == [5] and kept == [5]
    assert [bool(news.failed) for news in one.news] == [True, True, False] and one.failures == 0
    place.failing = 10**6
    place.gate.release(10**6)
    one.put(lambda: Job(6, small(6)))
    assert not one.finish(0.3) and one.failures >= 1 and Store(tmp_path).steps() == [5]


def test_what_is_handed_over_is_a_copy() -> None:
    live = torch.ones(3)
    copy = Snapshot({"weights": {"w": live}}, {}).on_host()
    live.zero_()
    assert copy.groups["weights"]["w"].tolist() == [1, 1, 1]


def test_records_are_durable_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    go(tmp_path / "run", **{"checkpoint.every": 0, "evaluate.every": 0})
    names = [Path(name).name for name in synced]
    assert names.index("records.jsonl") < names.index("weights.safetensors")


# --- a run on a store that fails --------------------------------------------------------------------------------------


class Failing(LocalPlace):
    """Fails at the saves whose numbers are given."""

    def __init__(self, root: Path, fails: Callable[[int], bool]) -> None:
        super().__init__(root)
        self.fails, self.count = fails, itertools.count()

    @contextmanager
    def new(self, folder: str) -> Iterator[Any]:
        if self.fails(next(self.count)):
            raise OSError(errno.ENOSPC, "No space left on device")
        with super().new(folder) as writing:
            yield writing


def on_place(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    from thalweg.run import folder

    monkeypatch.setattr(folder, "open_place", lambda where, make=True: Failing(Path(where), fails))


def test_a_run_goes_on_in_memory_and_saves_again_when_it_can(
    tmp_path: Path, clean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_place(monkeypatch, lambda number: number in (1, 2))
    result = go(tmp_path / "run", **{"checkpoint.failures": 3})
    assert result.reason is StopReason.FINISHED and (bits(result), steps_of(tmp_path / "run")) == clean
    texts = [event["text"] for event in told(tmp_path / "run")]
    assert any("No space left" in text and "of 3 saves in a row may fail" in text for text in texts)
    assert any("saved again" in text for text in texts)
    assert Store(tmp_path / "run" / "checkpoints").newest_good() == (12, [])


def test_the_last_good_checkpoint_stays_and_the_end_says_that_it_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_place(monkeypatch, lambda number: number >= 2)
    result = go(tmp_path / "run", **{"checkpoint.grace": 0.1, "checkpoint.failures": 100})
    assert result.reason is StopReason.UNSAVED and result.exit_code == 4
    assert len(result.records) == 12  # all steps were done, in memory
    newest, faults = Store(tmp_path / "run" / "checkpoints").newest_good()
    assert newest is not None and newest < 12 and not faults
    monkeypatch.undo()
    again = go(tmp_path / "run", resume=True, **{"checkpoint.grace": 0.1, "checkpoint.failures": 100})
    assert again.reason is StopReason.FINISHED and bits(again) == bits(result)


def test_too_many_saves_that_fail_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop looks between steps: how many steps it takes to see the last failure is the thread's matter."""
    on_place(monkeypatch, lambda number: True)
    slow = threading.Event()

    def waiting(model: Any, batch: Any) -> Any:
        slow.wait(0.02)
        return mean_loss(model, batch)

    changes = {"checkpoint.failures": 1, "checkpoint.every": 1, "train.steps": 400, "checkpoint.grace": 0.0}
    result = go(tmp_path / "run", loss=waiting, **changes)
    assert result.reason is StopReason.UNSAVED and len(result.records) < 400


# --- records ----------------------------------------------------------------------------------------------------------


def event(number: int) -> Any:
    return thalweg.core.Event(number, "name", "text " * 10)


def test_records_wait_in_memory_while_the_disk_is_full_and_none_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.jsonl"
    lines = JsonLines(path)
    lines.start(None, 0)  # type: ignore[arg-type]
    lines.event(event(0))
    real, room = os.write, [30]

    def write(handle: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, room[0] = min(room[0], len(data)), 0
        return real(handle, data[:taken])

    monkeypatch.setattr(os, "write", write)
    for number in range(1, 6):
        lines.event(event(number))
    assert "No space left" in lines.trouble
    with pytest.raises(OSError, match="cannot be written"):
        lines.make_durable(lines.length)
    assert [line["step"] for line in read_lines(path)] == [0]  # the torn one is no line yet
    monkeypatch.undo()
    lines.event(event(6))
    assert lines.trouble == "" and lines.length == path.stat().st_size
    lines.make_durable(lines.length)
    assert [line["step"] for line in read_lines(path)] == list(range(7))


def test_too_many_waiting_records_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path / "records.jsonl")
    lines.start(None, 0)  # type: ignore[arg-type]

    def full(handle: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(jsonl, "MOST_WAITING", 400)
    with pytest.raises(RunFolderError) as err:
        for number in range(10):
            lines.event(event(number))
    asked, numbers, remedy = three_parts(err.value)
    assert "records.jsonl" in asked and "No space left" in numbers and "--resume" in remedy


def test_records_that_are_gone_are_not_made_up(tmp_path: Path) -> None:
    """A run whose folder was lost goes on from a store elsewhere: what it had recorded is not here."""
    lines = JsonLines(tmp_path / "records.jsonl", keep_bytes=1000)
    lines.start(None, 0)  # type: ignore[arg-type]
    lines.event(event(3))
    assert [line["step"] for line in read_lines(tmp_path / "records.jsonl")] == [3]


# --- going on with changes --------------------------------------------------------------------------------------------


def test_auto_begins_where_there_is_none_and_goes_on_where_there_is(tmp_path: Path, clean: Any) -> None:
    calls = itertools.count()

    def stops(model: Any, batch: Any) -> Any:
        if next(calls) == 9:
            raise RuntimeError("the user's own")
        return mean_loss(model, batch)

    with pytest.raises(RuntimeError, match="own"):
        go(tmp_path / "run", loss=stops, resume="auto")
    result = go(tmp_path / "run", resume="auto")
    assert 0 < len(result.records) < 12 and (bits(result), steps_of(tmp_path / "run")) == clean
    assert go(tmp_path / "run", resume="auto").reason is StopReason.FINISHED


def test_how_a_run_is_saved_may_change_without_a_word(tmp_path: Path, clean: Any) -> None:
    go(tmp_path / "run")
    other = {"checkpoint.every": 1, "checkpoint.keep_last": 1, "checkpoint.grace": 3.0}
    result = go(tmp_path / "run", resume=8, **other)
    assert bits(result) == clean[0] and len(result.records) == 4
    assert Store(tmp_path / "run" / "checkpoints").steps() == [12]
    assert not [e for e in told(tmp_path / "run") if e["name"] == "recipe changed"]


def test_a_change_that_is_accepted_holds_from_there_on_and_is_recorded(tmp_path: Path, clean: Any) -> None:
    folder = tmp_path / "run"
    go(folder)
    with pytest.raises(RunFolderError) as err:
        go(folder, resume=8, **{"optimizer.lr": 0.5, "train.steps": 14})
    _, numbers, remedy = three_parts(err.value)
    assert "optimizer.lr: 0.01 there, 0.5 here" in numbers and "train.steps: 12 there, 14 here" in numbers
    assert "--accept train.steps,optimizer.lr" in remedy
    assert steps_of(folder) == clean[1]  # nothing was touched
    changes = {"optimizer.lr": 0.5, "train.steps": 14}
    result = go(folder, resume=8, accept=["lr", "steps"], **changes)
    assert [record.step for record in result.records] == list(range(9, 15))
    assert result.records[0].lr > 10 * clean[1][8]["lr"]
    texts = [e["text"] for e in told(folder) if e["name"] == "recipe changed"]
    assert texts == [
        "train.steps: 12 before, 14 from here on (accepted)",
        "optimizer.lr: 0.01 before, 0.5 from here on (accepted)",
    ]
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert plan.steps == 14 and plan.recipe.optimizer.lr == 0.5
    assert any(d.path == "optimizer.lr" and "was 0.01" in d.reason for d in plan.decisions)
    assert go(folder, resume=True, **changes).reason is StopReason.FINISHED  # it is the folder's recipe now


def test_a_run_cannot_end_before_its_checkpoint(tmp_path: Path) -> None:
    go(tmp_path / "run")
    with pytest.raises(RunFolderError) as err:
        go(tmp_path / "run", resume=True, accept=["steps"], **{"train.steps": 7})
    asked, numbers, remedy = three_parts(err.value)
    assert "train.steps=7" in asked and "step 12" in numbers and "12 or more" in remedy


@pytest.mark.parametrize("path, value", [("seed", 3), ("train.batch", 8), ("train.last", "drop")])
def test_what_decides_which_samples_were_seen_cannot_change(tmp_path: Path, path: str, value: Any) -> None:
    go(tmp_path / "run", **{"train.steps": 2})
    with pytest.raises(RunFolderError) as err:
        go(tmp_path / "run", resume=True, accept=[path], **{"train.steps": 2, path: value})
    assert "cannot change in a run" in three_parts(err.value)[2]


@pytest.mark.parametrize("words", [["optimizer.lr"], ["optimizer"], ["lr"], ["x", "lr"]])
def test_words_that_accept(words: list[str]) -> None:
    found = differences(Recipe().override({"optimizer.lr": 0.1}), Recipe())
    refuse_changes(Path("f"), found, words)
    with pytest.raises(RunFolderError):
        refuse_changes(Path("f"), found, ["r", "optimizer.l", "schedule.lr"])


def test_another_micro_batch_is_the_same_run_up_to_the_order_of_summation(tmp_path: Path) -> None:
    """Without layers that look at the whole micro-batch, and with masks by sample."""
    changes = {"device": "cpu", "regularize.by_sample": True, "train.micro_batch": 16}

    def run(folder: Path, resume: Any = False, accept: Any = (), **more: Any) -> Any:
        net = lambda: torch.nn.Sequential(torch.nn.Linear(6, 8), thalweg.regularize.Dropout(0.3), torch.nn.Linear(8, 3))
        recipe = Recipe().override({**BASE, **changes, **more})
        data = Split(train={k: v.double() if v.is_floating_point() else v for k, v in points(50).items()})
        return thalweg.train(
            lambda: net().double(), mean_loss, data, recipe, folder=folder, resume=resume, accept=accept
        )

    wanted = run(tmp_path / "whole")
    run(tmp_path / "run")
    other = run(tmp_path / "run", resume=8, accept=["micro_batch"], **{"train.micro_batch": 4})
    assert other.records[0].step == 9
    for a, b in zip(wanted.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- signals ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_that_a_signal_breaks_off_is_owed_and_made_up_for(tmp_path: Path, clean: Any) -> None:
    """The record of the resumed run is that of the run that nothing happened to."""
    import signal

    seen = itertools.count()

    def asks(model: Any, batch: Any) -> Any:
        if not model.training and next(seen) == 1:  # in the second evaluation, at step 8
            os.kill(os.getpid(), signal.SIGTERM)
        return mean_loss(model, batch)

    folder = tmp_path / "run"
    stopped = go(folder, loss=asks, **{"evaluate.batch": 20})
    assert stopped.reason is StopReason.INTERRUPTED and stopped.exit_code == 143
    assert go(folder, resume=True, **{"evaluate.batch": 20}).reason is StopReason.FINISHED
    assert steps_of(folder) == clean[1] or [s["step"] for s in steps_of(folder)] == [s["step"] for s in clean[1]]


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138), ("SIGHUP", 129)])
def test_each_signal_saves_and_has_its_own_code(tmp_path: Path, clean: Any, name: str, code: int) -> None:
    import signal

    number = getattr(signal, name)
    before = signal.getsignal(number)
    calls = itertools.count()

    def asks(model: Any, batch: Any) -> Any:
        if next(calls) == 9:
            os.kill(os.getpid(), number)
        return mean_loss(model, batch)

    stopped = go(tmp_path / "run", loss=asks)
    assert (stopped.reason, stopped.exit_code) == (StopReason.INTERRUPTED, code) == (stopped.reason, exit_code(number))
    assert signal.getsignal(number) == before
    newest, _ = Store(tmp_path / "run" / "checkpoints").newest_good()
    assert newest == len(stopped.records)
    resumed = go(tmp_path / "run", resume=True)
    assert (bits(resumed), steps_of(tmp_path / "run")) == clean


def test_a_second_ctrl_c_ends_at_once() -> None:
    asked = Asked(grace=100)
    asked.note(2, None)
    asked.note(15, None)  # anything else is heard already
    with pytest.raises(KeyboardInterrupt):
        asked.note(2, None)


# --- a store that knows no rename --------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[str]:
    import fsspec

    address = "memory://runs/one"
    yield address
    fsspec.filesystem("memory").store.clear()


def test_a_store_elsewhere_holds_what_a_folder_holds(memory: str) -> None:
    store = Store(memory)
    for step in (1, 2, 3):
        store.save(step, small(step))
    assert store.steps() == [1, 2, 3] and store.newest_good() == (3, [])
    assert torch.equal(store.load(2).groups["weights"]["w"], small(2).groups["weights"]["w"])
    assert store.retain(last=1, every=2, best=[]) == [1] and Store(memory).steps() == [2, 3]


def test_damage_in_a_store_elsewhere_is_found_set_aside_and_kept(memory: str) -> None:
    store = Store(memory)
    store.save(1, small(1))
    store.save(2, small(2))
    path = next(p for p in store.place.fs.find("/runs/one") if "step-00000002/weights" in p)  # type: ignore[attr-defined]
    data = bytearray(store.place.fs.cat_file(path))  # type: ignore[attr-defined]
    data[-1] ^= 1
    store.place.fs.pipe_file(path, bytes(data))  # type: ignore[attr-defined]
    snapshot, faults = store.load_newest()
    assert snapshot is not None and snapshot.facts == {"step": 1} and "'w'" in faults[2]
    store.set_aside(2)
    assert Store(memory).steps() == [1] and store.place.fs.exists(path)  # type: ignore[attr-defined]


def test_a_half_written_checkpoint_in_a_store_elsewhere_is_none_and_is_swept(memory: str) -> None:
    store = Store(memory)
    store.save(1, small(1))
    files = store.place.fs  # type: ignore[attr-defined]
    files.pipe_file("/runs/one/step-00000002/weights.safetensors", b"half")
    assert store.steps() == [1]
    Store(memory)
    assert not files.exists("/runs/one/step-00000002")


def test_a_step_saved_again_elsewhere_is_there_all_the_time(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(memory)
    store.save(1, small(1))
    place = store.place
    real = place._remove  # type: ignore[attr-defined]
    both: list[int] = []

    def remove(path: str) -> None:
        both.append(len(place._variants()["step-00000001"]))  # type: ignore[attr-defined]
        real(path)

    monkeypatch.setattr(place, "_remove", remove)
    store.save(1, Snapshot({"weights": {"w": torch.zeros(1)}}, {"step": 1, "again": True}))
    assert both == [2] and store.load(1).facts["again"] and store.steps() == [1]


def test_a_run_whose_folder_is_lost_goes_on_from_a_store_elsewhere(tmp_path: Path, memory: str, clean: Any) -> None:
    import shutil

    calls = itertools.count()

    def stops(model: Any, batch: Any) -> Any:
        if next(calls) == 10:
            raise RuntimeError("the machine is gone")
        return mean_loss(model, batch)

    with pytest.raises(RuntimeError, match="gone"):
        go(tmp_path / "run", loss=stops, resume="auto", **{"checkpoint.store": memory})
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    shutil.rmtree(tmp_path / "run")
    result = go(tmp_path / "run", resume="auto", **{"checkpoint.store": memory})
    assert 0 < len(result.records) < 12 and bits(result) == clean[0]


def test_a_store_of_no_known_kind_is_refused_before_step_one(tmp_path: Path) -> None:
    with pytest.raises(thalweg.ThalwegError) as err:
        go(tmp_path / "run", **{"checkpoint.store": "nosuch://bucket/x"})
    assert "nosuch" in three_parts(err.value)[0]
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_state_json_tells_what_is_owed(tmp_path: Path) -> None:
    go(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert facts["owed"] is False and facts["step"] == 12


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    go(tmp_path / "run")
    with pytest.raises(CheckpointError):
        go(tmp_path / "run", resume=5)


def test_weights_that_are_not_finite_are_never_saved_and_end_the_run(tmp_path: Path) -> None:
    """The gradients are finite all along; it is the update that overflows. The checkpoint before stays."""
    changes = {"optimizer.rule": "sgd", "optimizer.lr": 1e22, "checkpoint.every": 1, "regularize.average": 0.0}
    changes |= {"train.clip": 0, "schedule.lr": "constant()", "train.steps": 400, "evaluate.every": 0}
    calls = itertools.count()

    def bursts(model: Any, batch: Any) -> Any:
        return mean_loss(model, batch) * (1e17 if next(calls) == 9 else 1e-24)

    result = go(tmp_path / "run", loss=bursts, **changes)
    assert result.reason is StopReason.DIVERGED and result.exit_code == 3
    assert any("are not finite" in e["text"] for e in told(tmp_path / "run") if e["name"] == "not saved")
    store = Store(tmp_path / "run" / "checkpoints")
    newest, faults = store.newest_good()
    assert newest is not None and not faults
    for step in store.steps():
        assert all(t.isfinite().all() for t in store.load(step).groups["weights"].values() if t.is_floating_point())


def test_the_commands_look_after_a_run_whose_checkpoints_lie_elsewhere(tmp_path: Path, memory: str) -> None:
    """By its folder, which names the store, or by the store's address."""
    from thalweg.checkpoint.convert import read_weights
    from thalweg.checkpoint.convert.overview import show, verify
    from thalweg.checkpoint.convert.prune import prune

    go(tmp_path / "run", **{"checkpoint.store": memory})
    for place in (tmp_path / "run", memory):
        found = list(verify(place))
        assert [one.step for one in found] == [8, 10, 12] and not any(one.fault for one in found)
        assert all(memory in one.path and one.size > 1000 for one in found)
    assert any("12, read and compared" in line for line in show(memory))
    assert read_weights(tmp_path / "run").step == 12
    done = prune(tmp_path / "run", last=1)
    assert {name for name, _ in done.removed} == {"step-00000008", "step-00000010"} and done.freed > 1000
    assert Store(memory, sweep=False).steps() == [12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_what_is_not_finite_is_found_without_torchs_threads(dtype: torch.dtype, bad: float | None) -> None:
    from thalweg.engine.guard import unfit

    weight = torch.randn(3, 70_001).to(dtype)
    weight[0, 0], weight[1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    if bad is not None:
        weight[2, -1] = bad
    told = unfit(Snapshot({"weights": {"w": weight, "mask": torch.full((2,), -torch.inf)}}, {}), {"w"})
    assert told == ("" if bad is None else "'w' of the weights has 1 of 210003 values that are not finite")
