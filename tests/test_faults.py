"""The short form of the fault harness: each fault a few times. ``python -m tests.faults`` is the long one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults import __main__ as command
from tests.faults import kill
from tests.faults.core import FAULTS, Fault, Row, Skip
from tests.faults.table import FAMILIES, printed

#: What takes longest, and is made by another of the same family too.
LONG_ONLY = (
    "SIGKILL, one of two ranks or the process that started them",
    "SIGTERM, SIGINT, SIGUSR1, SIGHUP, fresh processes",
    "every sample once an epoch, over SIGTERM, 0 and 2 workers",
    # tests/test_elastic.py has a short form of its own
    "SIGKILL, one of four ranks, started again by torchrun's agent",
    "SIGSTOP, one of four ranks",
    "two groups of ranks in one folder",
    "two nodes of two ranks are parted, and one joins again",
)
SHORT = [fault for fault in FAULTS if fault.name not in LONG_ONLY]


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: f"{fault.family}: {fault.name}")
def test_what_is_promised_holds(fault: Fault) -> None:
    row = fault.run(quick=True)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.passed == row.n > 0, printed(row)


def test_every_family_has_faults_and_stands_in_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "faults.md").read_text()
    assert {fault.family for fault in FAULTS} == set(FAMILIES)
    assert {name for name in FAMILIES if f"| `{name}` |" not in page} == set()
    assert {fault.name for fault in SHORT} == {fault.name for fault in FAULTS} - set(LONG_ONLY)


def _broken(row: Row, given: Any) -> None:
    for number in range(given.times):
        with row.trial(f"try {number}"):
            assert number != 1, "lost"


def test_one_failure_in_many_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What the table says, what is kept, and the exit code."""
    kept: list[Any] = []
    monkeypatch.setattr(
        command,
        "FAULTS",
        [Fault("kill", "made for this test", _broken, 3, 2), Fault("rot", "of another day", _broken, 1, 1)],
    )
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    (tmp_path / "faults.json").write_text(json.dumps({"rows": [{"family": "rot", "fault": "of another day", "n": 7}]}))
    monkeypatch.setattr(command, "keep", lambda name, rows, line: kept.append((name, rows, line)))
    assert command.main(["kill"]) == 1
    assert "2 of 3" in (out := capsys.readouterr().out) and "try 1: AssertionError: lost" in out
    name, rows, line = json.loads(json.dumps(kept[0]))
    assert [row["n"] for row in rows] == [3, 7] and rows[0]["command"] == line, "what was kept of others stays"
    assert (name, line) == ("faults", "python -m tests.faults kill")
    assert (rows[0]["n"], rows[0]["passed"], len(rows[0]["failures"])) == (3, 2, 1)
    assert rows[0]["failures"][0].startswith("try 1: AssertionError: lost")
    assert command.main(["kill", "--times", "1", "--no-keep"]) == 0 and len(kept) == 1


def test_a_fault_that_cannot_be_made_is_no_success() -> None:
    def none(row: Row, given: Any) -> None: ...

    def skipped(row: Row, given: Any) -> None:
        raise Skip("there is no disk")

    assert not Fault("kill", "nothing was tried", none, 1, 1).run().good
    row = Fault("kill", "cannot be tried", skipped, 1, 1).run()
    assert row.good and row.skipped == "there is no disk" and "skipped: there is no disk" in printed(row)


def test_a_checkpoint_that_a_kill_destroyed_is_noticed(tmp_path: Path) -> None:
    """The rig's own eyes: fewer whole checkpoints than were seen are a failure."""
    from tests.faults.samples import snapshot
    from thalweg.checkpoint import Store

    store = Store(tmp_path / "checkpoints")
    for step in (1, 2):
        store.save(step, snapshot(step))
    victim = kill.Victim(tmp_path)
    victim.look()
    assert victim.made == {1, 2}
    victim.check({1, 2})
    (store.path(2) / "state.json").write_bytes(b"{}")
    with pytest.raises(AssertionError, match="step 2 was saved, and is gone"):
        victim.check({1, 2})
    store.place.remove("step-00000001")
    store.save(3, snapshot(3))
    with pytest.raises(AssertionError, match="1 verified checkpoints, and 2 had been made"):
        victim.check({1, 2})
