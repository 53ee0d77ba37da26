"""Checkpoints in an object store: a server that speaks S3, on this machine."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port, three_parts
from tests.faults.full import go
from tests.faults.samples import same, snapshot
from thalweg.checkpoint import Store
from thalweg.core import CheckpointError, MissingExtra, StopReason, read_lines

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


class Server:
    """Keeps its objects while it is stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_MAX_ATTEMPTS", "1")  # its packages' own attempts take minutes
    patch.setattr("s3fs.S3FileSystem.retries", 1)
    one = Server()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{one.port}")
    yield one
    one.stop()
    patch.undo()


_buckets = iter(range(1000))


@pytest.fixture
def address(server: Server) -> str:
    """A bucket of its own."""
    import s3fs

    name = f"bucket-{next(_buckets)}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/runs/digits"


def objects(address: str) -> list[str]:
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    return [name.partition("/runs/digits/")[2] for name in fs.find(address.removeprefix("s3://"))]


def change(address: str, name: str, data: bytes | None) -> None:
    """Put other bytes into an object, or take it away."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    path = f"{address.removeprefix('s3://')}/{name}"
    if data is None:
        fs.rm_file(path)
    else:
        fs.pipe_file(path, data)


def read(address: str, name: str) -> bytes:
    import s3fs

    data = s3fs.S3FileSystem(skip_instance_cache=True).cat_file(f"{address.removeprefix('s3://')}/{name}")
    assert isinstance(data, bytes)
    return data


def filled(address: str, *steps: int) -> Store:
    store = Store(address)
    for step in steps:
        store.save(step, snapshot(step))
    return store


def test_what_was_saved_is_read_by_another_process(address: str) -> None:
    filled(address, 3, 4)
    store = Store(address)
    assert store.steps() == [3, 4] and store.fault(3) == store.fault(4) == ""
    assert same(store.load(3), snapshot(3))
    found, faults = store.load_newest()
    assert found is not None and same(found, snapshot(4)) and not faults


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("weights.safetensors", "flipped"),
        ("state.safetensors", "cut"),
        ("state.json", "flipped"),
        ("state.json", "gone"),
        ("manifest.json", "cut"),
        ("manifest.json", "gone"),
    ],
)
def test_a_damaged_object_is_named_and_the_one_before_is_taken(address: str, name: str, kind: str) -> None:
    store = filled(address, 1, 2)
    data = read(address, f"step-00000002/{name}")
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    change(address, f"step-00000002/{name}", {"flipped": flipped, "cut": data[:middle], "gone": None}[kind])
    found, faults = store.load_newest()
    assert found is not None and same(found, snapshot(1))
    if name == "manifest.json" and kind == "gone":  # without it there is no checkpoint
        assert store.steps() == [1] and not faults
        assert [one for one in objects(address) if one.startswith("step-00000002")], (
            "others are swept when a run starts"
        )
        assert Store(address).steps() == [1]
        assert not [one for one in objects(address) if one.startswith("step-00000002")]
        return
    assert list(faults) == [2] and name in faults[2] and address in faults[2]
    with pytest.raises(CheckpointError) as caught:
        store.load(2)
    asked, numbers, remedy = three_parts(caught.value)
    assert "step 2 is damaged" in asked and name in numbers and "--resume 1" in remedy


def test_a_damaged_one_is_passed_over_and_kept(address: str) -> None:
    store = filled(address, 1, 2)
    change(address, "step-00000002/weights.safetensors", b"nothing")
    store.set_aside(2)
    assert store.steps() == Store(address).steps() == [1]
    assert read(address, "step-00000002/weights.safetensors") == b"nothing"
    store.save(2, snapshot(2))
    assert Store(address).steps() == [1, 2] and same(Store(address).load(2), snapshot(2))
    assert read(address, "step-00000002/weights.safetensors") == b"nothing", "it is still there for a person to look at"


def test_pruned_ones_leave_no_object(address: str) -> None:
    store = filled(address, *range(1, 6))
    assert store.retain(last=2, every=0, best=[2]) == [1, 3]
    assert store.steps() == [2, 4, 5]
    assert {name.partition("/")[0] for name in objects(address)} == {"step-00000002", "step-00000004", "step-00000005"}
    change(address, "step-00000005/state.json", b"{}")
    assert store.retain(last=1, every=0, best=[]) == [], "nothing is removed beside a damaged newest one"


def test_one_that_is_saved_again_is_there_all_the_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks while a checkpoint is written anew finds the old one whole; afterwards only the new one is left."""
    store = filled(address, 1)
    seen: list[bool] = []
    from thalweg.checkpoint import remote

    real = remote._Prefix.file

    def looked(prefix: Any, name: str) -> Any:
        seen.append(same(Store(address).load(1), snapshot(1)) if name != "manifest.json" else True)
        return real(prefix, name)

    monkeypatch.setattr(remote._Prefix, "file", looked)
    monkeypatch.setattr(remote.RemotePlace, "sweep", lambda self: None)  # as a reader's would
    new = snapshot(1)
    new.groups["weights"]["head.weight"].zero_()
    store.save(1, new)
    assert seen == [True] * 5
    assert same(Store(address).load(1), new)
    assert len({name.partition("/")[0] for name in objects(address)}) == 1


def test_what_a_killed_process_left_half_written_is_swept(address: str) -> None:
    filled(address, 1)
    change(address, "step-00000002/weights.safetensors", b"half")
    assert Store(address).steps() == [1]
    assert not [name for name in objects(address) if name.startswith("step-00000002")]


def test_a_store_that_nobody_answers_for_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra) as missing:
        Store("nothing-like-it://bucket/runs")
    assert "pip install s3fs" in three_parts(missing.value)[2]


SELDOM = {"checkpoint.every": 5}  # a save costs the store's server a quarter of a second


def test_a_run_whose_folder_is_lost_goes_on_from_its_store(address: str, tmp_path: Path) -> None:
    whole, _ = go(tmp_path / "whole")
    first, sink = go(
        tmp_path / "run", {20: _ask_to_end}, **{**SELDOM, "checkpoint.store": address, "checkpoint.grace": 60.0}
    )
    assert first.reason is StopReason.INTERRUPTED, sink.events
    assert not (tmp_path / "run" / "checkpoints").exists()
    stopped = first.records[-1].step
    shutil.rmtree(tmp_path / "run")
    again, _ = go(tmp_path / "run", resume="auto", **SELDOM, **{"checkpoint.store": address})
    assert again.reason is StopReason.FINISHED and again.records[0].step == stopped + 1
    want = whole.model.state_dict()
    assert all((t == want[name]).all() for name, t in again.model.state_dict().items())


def _ask_to_end() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


def test_a_store_that_goes_and_comes_back(server: Server, address: str, tmp_path: Path) -> None:
    """The run goes on in memory, says so, and saves again; it ends with the same bits.

    Its samples draw nothing: botocore draws its pauses from Python's own generator, in the middle of them.
    """
    whole, _ = go(tmp_path / "whole", drawn=False)
    more = {
        **SELDOM,
        "checkpoint.store": address,
        "checkpoint.failures": 100,
        "checkpoint.grace": 60.0,
        "train.steps": 40,
    }
    stopped = threading.Event()

    def vanish() -> None:
        server.stop()
        stopped.set()
        threading.Timer(1.0, server.start).start()

    result, sink = go(tmp_path / "run", {12: vanish, 30: lambda: time.sleep(1.5)}, drawn=False, **more)
    assert stopped.is_set() and result.reason is StopReason.FINISHED
    want = whole.model.state_dict()
    assert all((t == want[name]).all() for name, t in result.model.state_dict().items())
    assert Store(address).steps()[-1] == 40 and not Store(address).fault(40)
    steps = [line["step"] for line in read_lines(tmp_path / "run" / "records.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, 41))
    assert {event.name for event in sink.events} & {"not saved", "checkpoint"}, "nothing was said"


def test_a_store_that_does_not_come_back(server: Server, address: str, tmp_path: Path) -> None:
    more = {**SELDOM, "checkpoint.store": address, "checkpoint.failures": 100, "checkpoint.grace": 0.5}

    def leave() -> None:
        """Once something has been saved, which takes as long as it takes."""
        until = time.monotonic() + 60
        while not Store(address).steps() and time.monotonic() < until:
            time.sleep(0.05)
        server.stop()

    result, sink = go(tmp_path / "run", {12: leave}, **more)
    server.start()
    assert result.reason is StopReason.UNSAVED and result.exit_code == 4
    assert any(event.name == "not saved" and "s3://" in event.text for event in sink.events)
    newest = Store(address).steps()[-1]
    assert not Store(address).fault(newest), "what was saved before it went is there"
    again, _ = go(tmp_path / "run", resume="auto", **more)
    assert again.reason is StopReason.FINISHED and again.records[0].step == newest + 1
