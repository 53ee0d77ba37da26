"""Data workers: none outlives its parent, a lost one costs time and no bit, one that hangs is named."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from tests.conftest import ROOT, start_cli, three_parts
from tests.faults.server import shared_servers
from tests.models import mlp
from tests.test_data import Noisy, feed_of, same
from tests.test_resume import OWN, wait_for_records
from thalweg import StopReason, train
from thalweg.checkpoint import FolderLock
from thalweg.core import DataError, RunFolderError
from thalweg.data.workers import STARTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
ON = {"batch": 4, "micro_batch": 2, "seed": 5}


def status(pid: int) -> dict[str, str]:
    """Of a process, as the kernel tells it; empty where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def is_alive(pid: int) -> bool:
    return status(pid).get("State", "X")[0] not in "XZ"


def children(pid: int) -> list[int]:
    """But for what other tests in this process may have started: the tracker of shared memory, and the fork server."""
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    others = {resource_tracker._resource_tracker._pid, *(server.process.pid for server in shared_servers)}
    return [c for c in found if status(c).get("PPid") == str(pid) and is_alive(c) and c not in others]


def comes_true(what: Callable[[], Any], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.02)
    return bool(what())


class Told(list):
    """What a feed tells."""

    def __call__(self, name: str, text: str, detail: dict[str, Any]) -> None:
        self.append((name, text, detail))


class Trapped(Noisy):
    """Something happens once, or each time, that a sample is read in a worker."""

    def __init__(self, num: int, at: int, act: Callable[[], Any], once: Path | None = None) -> None:
        super().__init__(num)
        self.at, self.act, self.once = at, act, once

    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        if index == self.at and get_worker_info() is not None:
            if self.once is None:
                self.act()
            else:
                with suppress(FileExistsError):  # another worker may read the sample of the next epoch at the same time
                    self.once.touch(exist_ok=False)
                    self.act()
        return sample


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bus_error() -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGBUS)


def hang() -> None:
    time.sleep(3600)


@pytest.fixture(scope="module")
def reference() -> list[Any]:
    return list(feed_of(Noisy(11), **ON).windows(0, 9))


# --- their life ------------------------------------------------------------------------------------------------------


def test_workers_leave_signals_to_the_parent_and_die_with_it() -> None:
    feed = feed_of(Noisy(11), workers=2, **ON)
    windows = feed.windows(0, 9)
    next(windows)
    workers = children(os.getpid())
    assert len(workers) == 2
    for pid in workers:
        ignored = int(status(pid)["SigIgn"], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            assert ignored >> (number - 1) & 1, number.name
    began = time.monotonic()
    windows.close()
    assert not any(is_alive(pid) for pid in workers)
    assert time.monotonic() - began < 0.9  # by themselves, before they are killed


def test_a_worker_in_the_middle_of_a_sample_does_not_hold_up_the_end(tmp_path: Path) -> None:
    feed = feed_of(Trapped(11, 0, hang), workers=2, **ON)
    windows = feed.windows(0, 9)
    at = next(step for step in range(3) if 0 in feed.samples(step))
    for _ in range(at):
        next(windows)
    workers = children(os.getpid())
    began = time.monotonic()
    windows.close()
    assert time.monotonic() - began < 5 and not any(is_alive(pid) for pid in workers)


def test_workers_do_not_keep_a_program_from_its_end() -> None:
    """A generator that is still open when Python ends."""
    code = (
        "from tests.test_workers import *\n"
        "windows = feed_of(Noisy(11), workers=2, **ON).windows(0, 9)\nnext(windows)\nprint(*children(os.getpid()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2 and not any(is_alive(pid) for pid in workers)
    assert not done.stderr


def read_and_leave_open() -> None:
    windows = feed_of(Noisy(11), workers=2, **ON).windows(0, 9)
    next(windows)
    KEPT.append(windows)


KEPT: list[Any] = []


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_do_not_keep_a_process_of_multiprocessing_from_its_end(method: str) -> None:
    """Where what is registered with atexit is not called."""
    code = (
        "import multiprocessing\nfrom tests.test_workers import *\n"
        f"process = multiprocessing.get_context('{method}').Process(target=read_and_leave_open)\n"
        "process.start()\nprocess.join(30)\nprint(process.exitcode, flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


def test_workers_do_not_go_by_how_the_program_starts_its_processes() -> None:
    """Forkserver is what Python 3.14 begins with: the workers' parent would be the server."""
    code = (
        "import multiprocessing\nfrom tests.test_workers import *\nmultiprocessing.set_start_method('forkserver')\n"
        "class Local(Noisy):\n    also = lambda: 1\n"
        "local = type('Nowhere', (Local,), {})(11)\n"
        "print(len(list(feed_of(local, workers=2, **ON).windows(0, 9))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "9\n", done.stderr


def test_a_daemonic_process_is_told_that_it_may_have_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(DataError) as err:
        read_and_leave_open()
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "Data workers cannot be started here." and "MainProcess" in numbers and "daemonic" in numbers
    assert "data.workers=0" in remedy


def test_where_a_worker_cannot_be_started_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, forks = os.fork, iter([True, False])

    def seldom() -> int:
        if not next(forks, False):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", seldom)
    before = sockets("self")
    with pytest.raises(DataError) as err:
        next(feed_of(Noisy(11), workers=3, **ON).windows(0, 9))
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "A data worker cannot be started." and "ulimit" in remedy
    assert numbers == "Worker 1 of 3: Resource temporarily unavailable."
    assert not children(os.getpid()) and sockets("self") == before


def test_where_a_worker_cannot_be_started_again_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = feed_of(Noisy(11), workers=2, **ON).windows(0, 90)
    next(windows)
    os.kill(children(os.getpid())[0], signal.SIGKILL)

    def never() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", never)
    with pytest.raises(DataError, match="cannot be started"):
        list(windows)
    assert not children(os.getpid())


def test_workers_outlive_the_thread_that_asked_first(reference: list[Any]) -> None:
    """The kernel would take the end of that thread for the end of the parent."""
    feed = feed_of(Noisy(11), workers=2, **ON)
    feed.tell = Told()
    windows, got = feed.windows(0, 9), []
    thread = threading.Thread(target=lambda: got.append(next(windows)))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert same([*got, *windows], reference) and not feed.tell


def sockets(pid: int | str) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # the descriptor of this listing is gone again
            found.add(os.readlink(path))
    return {name for name in found if name.startswith("socket")}


def test_no_worker_holds_an_end_of_the_parents() -> None:
    """It would not see then that the parent has ended."""
    before = sockets("self")
    windows = feed_of(Noisy(11), workers=3, **ON).windows(0, 9)
    next(windows)
    ours = sockets("self") - before
    assert len(ours) == 3
    for pid in children(os.getpid()):
        assert not ours & sockets(pid)
    windows.close()


SETTINGS = ["--set", "train.batch=8", "--set", "train.micro_batch=4", "--set", "precision=fp32", "--quiet"]


def test_no_worker_outlives_a_killed_parent_and_the_folder_is_free_at_once(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    process = start_cli(
        "train", "own:task", *SETTINGS, "--set", "data.workers=2", "--set", "train.steps=100000", cwd=tmp_path
    )
    folder = tmp_path / "runs" / "own"
    wait_for_records(folder, process)
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in workers:  # stopped processes cannot end by themselves, nor let go of anything
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    lock = FolderLock(folder)
    lock.acquire()
    lock.release()
    assert comes_true(lambda: not any(is_alive(pid) for pid in workers), 5)
    process.communicate()


@pytest.fixture
def sleeper() -> Iterator[Callable[[], int]]:
    """Forks a child that sleeps; it is ended after the test."""
    started: list[int] = []

    def fork() -> int:
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        started.append(pid)
        return pid

    yield fork
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_forked_child_does_not_hold_the_folder(tmp_path: Path, sleeper: Callable[[], int]) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    pid = sleeper()
    # after the fork's own hooks have run, which is when its sleep begins
    assert comes_true(lambda: str(lock.path) not in [os.path.realpath(p) for p in Path(f"/proc/{pid}/fd").iterdir()])
    other = FolderLock(tmp_path)
    with pytest.raises(RunFolderError):  # the child has not let go of the parent's lock
        other.acquire()
    lock.release()
    other.acquire()
    other.release()
    assert is_alive(pid)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(0, 11, 3))
def test_a_killed_worker_changes_no_bit(at: int, reference: list[Any], tmp_path: Path) -> None:
    feed = feed_of(Trapped(11, at, kill_me, tmp_path / "once"), workers=2, **ON)
    feed.tell = Told()
    assert same(list(feed.windows(0, 9)), reference)
    ((name, text, detail),) = feed.tell
    assert name == "data worker" and "signal SIGKILL" in text and "started again" in text
    assert at in feed.samples(detail["at_step"]) and not detail["hung"] and detail["pid"] != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGALRM])
def test_workers_killed_from_outside_at_any_time_change_no_bit(number: signal.Signals, reference: list[Any]) -> None:
    feed = feed_of(Noisy(11), workers=2, **ON)
    feed.tell = Told()
    got = []
    for window in feed.windows(0, 9):
        got.append(window)
        if len(got) in (2, 5):
            for pid in children(os.getpid()):
                os.kill(pid, number)
    assert same(got, reference) and len(feed.tell) >= 2


@pytest.mark.parametrize(
    ("act", "spoken", "remedy"),
    [
        (kill_me, "signal SIGKILL", "fewer data.workers"),
        (bus_error, "signal SIGBUS", "/dev/shm"),
        (lambda: os._exit(3), "exit code 3", "data.workers=0"),
    ],
    ids=["kill", "bus", "exit"],
)
def test_a_sample_that_kills_each_worker_is_named(act: Any, spoken: str, remedy: str) -> None:
    feed = feed_of(Trapped(11, 7, act), workers=2, **ON)
    feed.tell = Told()
    at = next(step for step in range(3) if 7 in feed.samples(step))
    windows = feed.windows(0, 9)
    for _ in range(at):
        next(windows)
    with pytest.raises(DataError) as err:
        next(windows)
    asked, numbers, what = three_parts(err.value)
    assert asked == "Data workers are killed again and again."
    assert spoken in numbers and f"{STARTS + 1} times in a row" in numbers and f"step {at + 1} (epoch 0)" in numbers
    listed = numbers.partition("samples ")[2].partition(" for")[0].split(", ")
    assert "7" in listed and {int(sample) for sample in listed} <= set(feed.samples(at))
    assert remedy in what and len(feed.tell) == STARTS
    assert not children(os.getpid())


# --- hung ------------------------------------------------------------------------------------------------------------


def test_a_worker_that_hung_once_changes_no_bit(reference: list[Any], tmp_path: Path) -> None:
    feed = feed_of(Trapped(11, 4, hang, tmp_path / "once"), workers=2, timeout=0.5, **ON)
    feed.tell = Told()
    assert same(list(feed.windows(0, 9)), reference)
    assert [detail["hung"] for _, _, detail in feed.tell] == [True]
    assert "gave nothing for 0.5 seconds" in feed.tell[0][1]


def test_a_data_set_that_hangs_is_an_error_that_names_the_samples() -> None:
    feed = feed_of(Trapped(11, 4, hang), workers=1, timeout=0.3, **ON)
    at = next(step for step in range(3) if 4 in feed.samples(step))
    with pytest.raises(DataError) as err:
        list(feed.windows(at, 9))
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "The data set hangs." and "twice" in numbers and f"step {at + 1} (epoch 0)" in numbers
    assert "4" in numbers.partition("samples ")[2].partition(" for")[0].split(", ")
    assert "data.timeout" in remedy and not children(os.getpid())


@pytest.mark.parametrize("timeout", [0.0, 600.0])
def test_a_wish_to_stop_is_heard_while_data_is_waited_for(timeout: float) -> None:
    feed = feed_of(Trapped(11, 4, hang), workers=2, timeout=timeout, **ON)
    at = next(step for step in range(3) if 4 in feed.samples(step))
    asked_at = time.monotonic() + 1
    feed.stop = lambda: time.monotonic() > asked_at
    got = list(feed.windows(0, 9))
    assert len(got) == at and time.monotonic() - asked_at < 5


def test_in_this_process_a_wish_to_stop_is_heard_between_micro_batches() -> None:
    feed = feed_of(Noisy(11), **ON)
    windows = feed.windows(0, 9)
    next(windows)
    feed.stop = lambda: True
    assert next(windows, None) is None


def mean(model: Any, batch: Any) -> torch.Tensor:
    return (model(batch["x"]).mean() - batch["y"].float().mean()) ** 2


class Slow:
    """Sample 5 takes for ever."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 5 and get_worker_info() is not None and get_worker_info().id == 1:
            hang()
        return {"x": torch.full((6,), float(index)), "y": torch.tensor(index % 2)}


def test_a_run_that_waits_for_data_is_stopped_by_a_signal_and_saved(tmp_path: Path) -> None:
    """The step that was waited for is not half done: the checkpoint is that of the last whole one."""
    (tmp_path / "slow.py").write_text(
        "from tests.test_workers import Slow, mean\nfrom torch import nn\nimport thalweg\n"
        "task = thalweg.Task(model=lambda: nn.Linear(6, 2), loss=mean, data=Slow())\n"
    )
    changes = ["--set", "data.workers=2", "--set", "train.steps=1000", "--set", "checkpoint.every=0"]
    process = start_cli("train", "slow:task", *SETTINGS, *changes, cwd=tmp_path)
    assert comes_true(lambda: len(children(process.pid)) == 2)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "--resume" in told, told


# --- a sample that cannot be read ------------------------------------------------------------------------------------


class Corrupt(Noisy):
    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise OSError("truncated JPEG\nat byte 12")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named(workers: int) -> None:
    feed = feed_of(Corrupt(11), workers=workers, **ON)
    at = next(step for step in range(3) if 7 in feed.samples(step))
    windows = feed.windows(0, 9)
    for _ in range(at):
        next(windows)
    with pytest.raises(DataError) as err:
        next(windows)
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "Sample 7 of the data set cannot be read."
    assert numbers == f"In step {at + 1} (epoch 0): OSError: truncated JPEG at byte 12."
    assert "--resume" in remedy
    assert isinstance(err.value.__cause__, OSError) and "truncated JPEG" in str(err.value.__cause__)
    if workers:
        assert any("in __getitem__" in note for note in err.value.__notes__)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_different_forms_are_named(workers: int) -> None:
    class Ragged(Noisy):
        def __getitem__(self, index: int) -> Any:
            return {"x": torch.zeros(1 + index % 2)}

    feed = feed_of(Ragged(8), workers=workers, batch=8, micro_batch=8)
    with pytest.raises(DataError) as err:
        next(iter(feed.windows(0, 1)))
    asked, numbers, _ = three_parts(err.value)
    assert asked == "Samples cannot be put together to a batch."
    assert f"In step 1 (epoch 0), samples {str(feed.samples(0))[1:-1]}: RuntimeError: stack expects" in numbers


class Odd(Exception):
    """Can be pickled and not made again."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_an_error_that_cannot_travel_is_told_by_its_text() -> None:
    class Raises(Noisy):
        def __getitem__(self, index: int) -> Any:
            raise Odd(1, 2)

    with pytest.raises(DataError, match="Odd: 1 and 2") as err:
        next(iter(feed_of(Raises(8), workers=1).windows(0, 1)))
    assert str(err.value.__cause__) == "Odd: 1 and 2"


def test_what_a_worker_cannot_send_is_an_error() -> None:
    class Local(Noisy):
        def __getitem__(self, index: int) -> Any:
            return {"x": torch.zeros(1), "f": lambda: 1}

    from thalweg.data import Items

    with pytest.raises(DataError) as err:
        next(iter(feed_of(Items(Local(8), lambda samples: samples[0]), workers=1).windows(0, 1)))
    asked, _, remedy = three_parts(err.value)
    assert asked == "A worker cannot send what the collate function gave." and "data.workers=0" in remedy


def test_memory_that_ran_out_in_a_worker_stays_what_it_is() -> None:
    class Large(Noisy):
        def __getitem__(self, index: int) -> Any:
            raise MemoryError("too much")

    for workers in (0, 1):
        with pytest.raises(MemoryError, match="too much"):
            next(iter(feed_of(Large(8), workers=workers).windows(0, 1)))


def test_the_state_before_a_corrupt_sample_is_saved_and_the_mended_run_goes_on(tmp_path: Path) -> None:
    class Points:
        bad = True

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if self.bad and index == order[-1]:
                raise OSError("half a file")
            return {"x": torch.full((6,), index / 24), "y": torch.tensor(index % 2)}

    recipe = {"train.batch": 4, "train.steps": 6, "precision": "fp32", "checkpoint.every": 0, "train.micro_batch": 4}
    order = [i for step in range(6) for i in feed_of(Points(), batch=4, micro_batch=4).samples(step)]
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        Points.bad = True
        with pytest.raises(DataError, match=f"Sample {order[-1]} of"):
            train(mlp, mean, Points(), {**recipe, "data.workers": workers}, folder=folder)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000005"]
        Points.bad = False
        resumed = train(mlp, mean, Points(), {**recipe, "data.workers": workers}, folder=folder, resume=True)
        whole = train(mlp, mean, Points(), recipe)
        assert resumed.reason is StopReason.FINISHED
        assert same(resumed.model.state_dict(), whole.model.state_dict())


# --- what workers see ------------------------------------------------------------------------------------------------


def test_a_data_set_knows_in_which_worker_it_is_read() -> None:
    class Where(Noisy):
        def __getitem__(self, index: int) -> Any:
            info = get_worker_info()
            assert info is None or info.dataset is self
            return torch.tensor([-1, 0] if info is None else [info.id, info.num_workers])

    seen = torch.cat([part for window in feed_of(Where(12), workers=3).windows(0, 3) for part in window])
    assert {tuple(row) for row in seen.tolist()} == {(0, 3), (1, 3), (2, 3)}
    assert torch.cat(next(feed_of(Where(12)).windows(0, 1))).tolist() == [[-1, 0]] * 4


def test_batches_larger_than_a_pipe_do_not_block() -> None:
    class Wide(Noisy):
        def __getitem__(self, index: int) -> Any:
            return bytes(200_000) + bytes([index])

    from thalweg.data import Items

    feed = feed_of(Items(Wide(12), lambda samples: samples), workers=3)
    until = time.monotonic() + 30
    feed.stop = lambda: time.monotonic() > until
    got = [sample[-1] for window in feed.windows(0, 6) for part in window for sample in part]
    assert got == [i for step in range(6) for i in feed.samples(step)]
