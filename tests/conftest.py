"""Shared pieces of the tests: small models, a recipe that does as it is told, and processes of the command line."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def old_objects_are_not_looked_at_again() -> Iterator[None]:
    """Each start of a run collects garbage, which takes half a second where all that was imported is looked through."""
    freeze()
    yield
    gc.unfreeze()


def freeze() -> None:
    """What is here now is not looked at again, neither here nor in processes that are forked."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_torch_random_state() -> Iterator[None]:
    """Tests run in random order: none may hang on what another drew."""
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(1234)
    yield
    torch.set_rng_state(state)


@pytest.fixture(autouse=True, scope="session")
def one_fork_server() -> Iterator[None]:
    """Started by the first test that asks for it."""
    from tests.faults.server import close_shared_server

    yield
    close_shared_server()


def run_cli(*arguments: str, cwd: Path, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """``thalweg ARGUMENTS`` in a process of its own.

    It is a child of one that has imported torch already, which saves more than most commands take; where it is ``fresh``, or is
    given an environment, it is a new interpreter.
    """
    if not fresh and not environment:
        return _forked(arguments, cwd)
    return subprocess.run(
        [sys.executable, "-m", "thalweg.cli.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _forked(arguments: tuple[str, ...], cwd: Path) -> subprocess.CompletedProcess[str]:
    from tests.faults.server import shared_server

    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "COLUMNS": "120"}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        running = shared_server().start([*arguments], out, errors=errors, cwd=cwd, environ=environ)
        code = running.ended(300)
        return subprocess.CompletedProcess(["thalweg", *arguments], code, out.read_text(), errors.read_text())


def start_cli(*arguments: str, cwd: Path, start_new_session: bool = False) -> subprocess.Popen[str]:
    """The same, still running."""
    return subprocess.Popen(
        [sys.executable, "-m", "thalweg.cli.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=start_new_session,
    )


def three_parts(err: Any) -> tuple[str, str, str]:
    """The parts of an error; each must be there."""
    from thalweg.core import ThalwegError

    assert isinstance(err, ThalwegError)
    assert all(part and part.strip() for part in (err.asked, err.numbers, err.remedy))
    return err.asked, err.numbers, err.remedy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """``function(rank, world, port, *arguments)`` in so many processes; they are forked by one, which has imported it for all."""
    import torch.multiprocessing as mp

    mp.spawn(_fork, (function, world, (world, free_port(), *arguments)), nprocs=1)


def _fork(_: int, function: Callable[..., None], world: int, arguments: tuple[Any, ...]) -> None:
    import torch.multiprocessing as mp

    freeze()
    mp.start_processes(function, arguments, nprocs=world, start_method="fork")


def join_ranks(rank: int, world: int, port: int) -> None:
    """This process becomes one of ``world`` that train together, over gloo, with one thread."""
    import torch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def ended() -> None:
    """This rank is done. A gloo group that Python's end finds still there, as DCP keeps it, aborts the process now and then."""
    import torch

    torch.distributed.barrier()
    os._exit(0)


@pytest.fixture
def shared_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of real data that THALWEG_DATA names, or ``shared/data`` beside the repository; named by it inside the test."""
    folder = Path(os.environ.get("THALWEG_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the data folder {folder} is not there; THALWEG_DATA names one")
    monkeypatch.setenv("THALWEG_DATA", str(folder))
    return folder
