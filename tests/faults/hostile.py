"""Checkpoints and run folders that mean harm: each is refused with a clear error, nothing is run, nothing written outside."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.core import Given, Row, fault
from tests.faults.crafted import MARK, attacks
from tests.faults.runs import command
from tests.faults.samples import same, snapshot
from tests.faults.server import shared_server
from thalweg.checkpoint import Store
from thalweg.core import ThalwegError

TASK = "tests.faults.tasks:items"
_SECONDS, _MEMORY = 30, 1 << 30


class TookTooLong(Exception):
    """What was asked has not come to an end."""


@contextmanager
def bounded(seconds: int = _SECONDS, memory: int = _MEMORY) -> Iterator[None]:
    """Inside, neither time nor memory may grow beyond a bound."""

    def late(number: int, frame: Any) -> None:
        raise TookTooLong(f"it has not ended after {seconds} s")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_or_refused(act: Callable[[], Any]) -> str:
    """What an error says, or nothing; an error is one of ours, with three parts.

    Raises:
        AssertionError: for any other error.
    """
    try:
        act()
    except ThalwegError as err:
        assert all(part.strip() for part in (err.asked, err.numbers, err.remedy)), err
        assert len(str(err)) < 5000, f"an error of {len(str(err))} letters"
        return str(err)
    return ""


def some(given: Given, pairs: list[Any], num: int) -> list[Any]:
    """All of them; in the short form so many."""
    return given.draw.sample(pairs, num) if given.quick else pairs


def tree_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@fault("hostile checkpoints: pickle, paths, headers, links, bombs, nesting", times=1, quick=1)
def crafted(row: Row, given: Given) -> None:
    """Each beside a good one, which is taken; every attack is made ``times`` over."""
    base = Store(given.folder / "base" / "checkpoints")
    for step in (1, 2):
        base.save(step, snapshot(step))
    weights = (base.path(2) / "weights.safetensors").read_bytes()
    for what, attack in some(given, list(attacks(weights, 2).items()), 60):
        folder = given.folder / "under attack"
        shutil.copytree(given.folder / "base", folder)
        with row.trial(what), bounded():
            attack(folder / "checkpoints" / "step-00000002")
            before = tree_of(folder)
            _loads_nothing_bad(Store(folder / "checkpoints"))
            assert MARK not in tree_of(folder), "a pickle was run"
            assert tree_of(folder) == before, f"written: {tree_of(folder) ^ before}"
        shutil.rmtree(folder)


def _loads_nothing_bad(store: Store) -> None:
    """The good one is taken, or the other, if it holds nothing but tensors and plain data after all."""
    text = read_or_refused(lambda: store.load(2))
    found, faults = store.load_newest()
    assert found is not None, faults
    if text:
        assert "step-00000002" in text or "step 2" in text, text
        assert same(found, snapshot(1)) and list(faults) == [2]
    else:
        assert not faults
    fault = store.fault(2)
    assert fault or not text or "It was written so" in text or "names no state" in text, (fault, text)


def said(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what it printed) of the command line, in this process.

    Raises:
        AssertionError: for a traceback.
    """
    from thalweg.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("default")  # as on the command line: printed
        try:
            code = main(arguments)
        except SystemExit as err:
            code = err.code if isinstance(err.code, int) else 2
        except TookTooLong:
            raise
        except Exception:
            raise AssertionError(f"a traceback:\n{traceback.format_exc()[-900:]}") from None
    return code, out.getvalue()


SMALL = {"train.steps": 6, "data.workers": 0, "checkpoint.every": 3, "evaluate.every": 0}


def _a_run(given: Given) -> Path:
    """A finished run's folder."""
    arguments = command(TASK, given.folder, "good", **SMALL)
    running = shared_server().start(arguments, given.folder / "good.log")
    assert running.ended() == 0, running.text()
    return given.folder / "good"


@fault("hostile checkpoints, resumed, shown, verified, pruned, converted by the command line", times=1, quick=1)
def resumed(row: Row, given: Given) -> None:
    """Exit code 2 and an error, or the good one is taken: never a traceback."""
    good = _a_run(given)
    weights = (good / "checkpoints" / "step-00000006" / "weights.safetensors").read_bytes()
    chosen = list(attacks(weights, 6).items())
    if given.quick:
        chosen = given.draw.sample([pair for pair in chosen if "state.json" in pair[0]], 4) + given.draw.sample(
            chosen, 4
        )
    for what, attack in chosen:
        folder = given.folder / "attacked"
        shutil.copytree(good, folder)
        with row.trial(what), bounded(60):
            attack(folder / "checkpoints" / "step-00000006")
            where, one = str(folder), str(folder / "checkpoints" / "step-00000006")
            out = str(given.folder / "converted.safetensors")
            looks = {
                "show": ["checkpoint", "show", where],
                "show one": ["checkpoint", "show", one],
                "verify": ["checkpoint", "verify", where],
                "convert": ["checkpoint", "convert", one, out, "--force"],
                "prune": ["checkpoint", "prune", where, "--last", "1", "--dry-run"],
                "weights": ["train", TASK, "--weights", one, "--set", "train.steps=1", "--name", "new"],
            }
            looks["weights"] += ["--runs", str(given.folder / f"with-{row.n}"), "--quiet"]
            chosen_looks = given.draw.sample(list(looks), 1) if given.quick else looks
            for name in [*chosen_looks, "train"]:
                code, text = said(looks.get(name) or command(TASK, given.folder, "attacked", **SMALL))
                assert code in (0, 1, 2) and "Traceback" not in text, (name, code, text)
                assert code != 2 or text.count("\n  ") >= 2, (name, text)
                assert code != 1 or name == "verify", (name, text)  # 1: it has found one that is damaged
                assert MARK not in tree_of(given.folder), f"a pickle was run by {name}"
                row.count(f"exit code {code}")
        shutil.rmtree(folder)


def _hostile_texts() -> dict[str, bytes]:
    """What may stand in a file of a run folder."""
    return {
        "nothing": b"",
        "brackets": b"[" * 200_000,
        "TOML brackets": b"a = " + b"[" * 200_000,
        "nesting": b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n",
        "a list": b"[1, 2]\n",
        "null": b"null\n",
        "zeros": bytes(1 << 16),
        "no UTF-8": b"\xff\xfe\x00\n",
        "a number of 100,000 digits": b'{"step": ' + b"9" * 100_000 + b', "kind": "step"}\n',
        "long line": b'{"kind": "step", "x": "' + b"x" * (8 << 20) + b'"}\n',
        "script": b'{"kind": "event", "step": 1, "name": "<script>alert(1)</script>", "text": "</script><script>1"}\n',
        "unknown keys": b'__import__ = "os"\n[train]\n"../../x" = 1\n',
        "dates": b"seed = 1979-05-27T07:32:00Z\n",
    }


@fault("hostile files of a run folder: recipe, plan, records, outcome", times=1, quick=1)
def files(row: Row, given: Given) -> None:
    """``train --resume``, ``report``, ``plan`` and ``train --recipe`` end with an error, or read them as valid."""
    good = _a_run(given)
    names = ("recipe.toml", "plan.json", "records.jsonl", "outcome.json")
    for name, (what, data) in some(given, list(itertools.product(names, _hostile_texts().items())), 16):
        folder = given.folder / "attacked"
        shutil.copytree(good, folder)
        (folder / name).write_bytes(data)
        targets = {"report": ["report", str(folder)], "train": command(TASK, given.folder, "attacked", **SMALL)}
        if name == "recipe.toml":
            targets["plan"] = ["plan", TASK, "--recipe", str(folder / name)]
            targets["preview"] = ["schedules preview", str(folder / name), "--svg", str(given.folder / "x.svg")]
        for target, arguments in targets.items():
            with row.trial(f"{name}: {what}, {target}"), bounded(60):
                code, text = said(arguments)
                assert code in (0, 2) and "Traceback" not in text, (code, text)
                assert code == 0 or "\n  " in text, text
                if target == "report" and code == 0 and what == "script":
                    assert b"<script>alert" not in (folder / "report.html").read_bytes(), "a script was taken over"
        shutil.rmtree(folder)


@fault("a lock, records or an outcome that are links or folders", times=1, quick=1)
def odd(row: Row, given: Given) -> None:
    """A run folder that somebody prepared: nothing outside it is written."""
    outside = given.folder / "outside"
    outside.mkdir()
    names = ("records.jsonl", "outcome.json", "plan.json", "recipe.toml", "checkpoints", "report.html", "lock")
    for name, kind in some(given, list(itertools.product(names, ("folder", "link to a folder", "FIFO"))), 6):
        folder = given.folder / "runs" / "prepared"
        folder.mkdir(parents=True)
        target = folder / name
        if kind == "folder":
            target.mkdir()
        elif kind == "FIFO":
            os.mkfifo(target)
        else:
            target.symlink_to(outside)
        with row.trial(f"{name} is a {kind}"):
            arguments = command(TASK, given.folder / "runs", "prepared", **SMALL)
            running = shared_server().start(arguments, given.folder / "odd.log")
            code = running.ended(40)
            text = running.text()
            assert code in (0, 2, 4), (code, text)
            assert "Traceback" not in text, text
            assert name == "checkpoints" or not any(outside.iterdir()), list(outside.iterdir())
        shutil.rmtree(folder)
        shutil.rmtree(outside)
        outside.mkdir()
