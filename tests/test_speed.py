"""The benchmark beside other trainers: equal maths, honest windows, and a table that says what was measured."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import draw, keep, short, sizes, table
from benchmarks.speed import driver, environments
from benchmarks.speed.adapters import raw
from benchmarks.speed.adapters import thalweg as ours
from benchmarks.speed.feed import Feed, Stop
from benchmarks.speed.nets import write_weights
from benchmarks.speed.peers import PEERS, Peer
from benchmarks.speed.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
ADAPTERS = ROOT / "benchmarks/speed/adapters"


def row(workload: str, peer: str, kind: str, *rates: float) -> dict[str, Any]:
    ratios = [rate / 100 for rate in rates]
    told = lambda values: {"n": 3, "median": sorted(values)[1], "low": min(values), "high": max(values)}
    return {
        "workload": workload,
        "peer": peer,
        "kind": kind,
        "rates": list(rates),
        "rate": told(rates),
        "ratio": told(ratios),
    }


ROWS = [
    row("W1", "by hand", "hand", 100, 100, 100),
    row("W1", "thalweg, eager", "ours", 99, 101, 102),
    row("W1", "thalweg, auto", "ours", 240, 250, 260),
    row("W1", "ignite", "trainer", 90, 100, 104),
    row("W1", "skorch, bare", "trainer", 400, 400, 400),
    {"workload": "W1", "peer": "Composer", "kind": "trainer", "failed": "cannot be installed: a wants b"},
]


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*.py")), ids=lambda path: path.stem)
def test_adapters_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= 60


def test_every_peer_has_an_adapter_and_an_environment():
    for peer in PEERS.values():
        assert peer.environment in ("", *environments.ENVIRONMENTS)
        assert (ADAPTERS / f"{peer.adapter}.py").exists() or peer.name == "Composer"  # which no environment can hold


@pytest.mark.parametrize("name", ["W1", "W4"])
def test_thalweg_trains_as_the_loop_by_hand(name: str):
    w = WORKLOADS[name]
    losses = [run(w, Feed(w, 2, print, input), "") for run in (raw.run, ours.run)]
    start = raw.run(w, Feed(w, 1, print, input), "")
    assert losses[0] == pytest.approx(losses[1], rel=2e-6 if not w.bf16 else 1e-3)
    assert abs(losses[0] - start) > 1e-3  # or nothing was trained


def test_windows_are_timed_from_draw_to_draw_and_end_on_another_word():
    said: list[tuple[str, dict[str, Any]]] = []
    words = iter(["go", "go", "stop"])
    feed = Feed(WORKLOADS["W4"], None, lambda what, **values: said.append((what, values)), lambda: next(words), 0.01)
    drawn, waited = 0, []
    feed.wait = lambda: waited.append(1)
    with pytest.raises(Stop):
        for _ in feed:
            drawn += 1
    kinds = [what for what, _ in said]
    assert kinds == ["ready", "window", "window"] and len(waited) == 2
    assert drawn == sum(values["updates"] for _, values in said[1:]) * 4  # accumulation: four micro-batches an update
    assert all(values["seconds"] >= 0.01 for _, values in said[1:])


def test_a_peer_that_fails_is_a_row_with_its_last_line(tmp_path: Path):
    write_weights(str(tmp_path))
    broken = Peer("broken", "trainer", "nothing_here")
    (told,) = driver.measure(WORKLOADS["W1"], [broken], tmp_path, rounds=1, seconds=0.01)
    assert "No module named 'benchmarks.speed.adapters.nothing_here'" in told["failed"]


def test_the_reason_of_pip_is_the_conflict_not_the_headline():
    told = "ERROR: Cannot install a and b\n\nThe conflict is caused by:\n    a depends on b<2\n    c depends on b>2\n"
    assert environments.reason(told) == "a depends on b<2"
    assert environments.reason("ERROR: No matching distribution found for x") == "No matching distribution found for x"


def test_what_cannot_be_installed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setitem(environments.ENVIRONMENTS, "jax", ("wanted==1",))
    (tmp_path / "jax.failed").write_text("wanted==1\n\nthe mirror has it not")
    monkeypatch.setattr(environments, "_make", lambda name: pytest.fail("tried again"))
    with pytest.raises(environments.CannotInstall, match="the mirror has it not"):
        environments.ready("jax")


def test_the_table_holds_ratios_intervals_and_failures():
    told = table.speed_table(ROWS).splitlines()
    assert told[0] == "| steps/s over the loop by hand | MLP 64-128-128-10, batch 64 |"
    assert told[2] == "| the loop by hand, steps/s | 100 |"
    assert told[3].startswith("| skorch, bare | 4.00") and told[4] == "| **thalweg, auto** | 2.50 (2.40 to 2.60) |"
    assert not any("Composer" in line for line in told)
    assert table.failures(ROWS) == ["Composer cannot be installed: a wants b."]


def test_bars_are_held_against_the_fastest_trainer_that_is_not_bare_in_pairs():
    lines = table.speed_bars(ROWS)
    assert [line["bar"] for line in lines] == [1.0, 2.5, 1.2]
    assert lines[0]["figure"] == "1.01 (0.99 to 1.02)"
    assert lines[2]["what"] == "... auto over the fastest trainer here, ignite"
    assert lines[2]["figure"] == "2.50 (2.50 to 2.67)"  # 240/90, 250/100, 260/104


def test_few_rounds_are_not_called_a_95_percent_interval():
    assert table.spread({"rows": ROWS}) == "medians and whole ranges of 3 rounds"
    many = {"ratio": {"n": 6}}
    assert table.spread({"rows": [many]}) == "medians and 95 % intervals"


def test_readme_says_what_is_kept():
    readme = (ROOT / "README.md").read_text()
    assert readme == table.replaced(readme, table.section())
    tree = table.shown("speed")
    assert tree is not None and (ROOT / table.PICTURE).read_text() == table.picture(tree)
    assert "| **thalweg, eager** |" in readme


def test_the_sizes_picture_is_that_of_the_kept_rows():
    kept = json.loads((ROOT / "benchmarks/results/sizes.json").read_text())
    assert sizes.PICTURE.read_text() == sizes.picture(kept["rows"])


def test_bars_are_as_long_as_their_values_and_dark_pages_have_colours():
    drawn = draw.bars([("a <b>", [draw.Bar("x", 2.0, 1.9, 2.1, "ours"), draw.Bar("y", 1.0, 1.0, 1.0, "hand")])], "note")
    root = ElementTree.fromstring(drawn)
    boxes = [e for e in root if e.tag.endswith("rect")]
    assert float(boxes[0].get("width")) == pytest.approx(2 * float(boxes[1].get("width")), abs=0.2)
    assert "prefers-color-scheme: dark" in drawn and "a &lt;b&gt;" in drawn


def test_a_part_gives_its_rows_that_are_lines():
    rows = [{"what": "a", "figure": "1.0", "bar": None}, {"what": "no line"}]
    assert short.own_lines({"rows": rows}) == rows[:1] and short.own_lines({"other": 1}) == []
    ratio = {"n": 5, "median": 1.2, "low": 1.1, "high": 1.25}
    (line,) = short.startup_lines({"rows": [{"ratio": ratio}]})
    assert line["figure"] == "1.20 (1.10 to 1.25)" and line["bar"] == 1.3


def test_the_short_forms_run_in_turn_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ran: list[list[str]] = []

    def run(command: list[str], check: bool = False) -> Any:
        ran.append(command[1:])
        return type("Done", (), {"returncode": int(command[2].endswith("speed"))})

    lacking = short.Part("road_sst2", missing=lambda: "No weights.")
    monkeypatch.setattr(short.subprocess, "run", run)
    monkeypatch.setattr(short, "PARTS", (short.Part("speed"), lacking, short.Part("sizes")))
    assert short.main() == 1
    assert ran == [
        ["-m", "benchmarks.speed", "--short"],
        ["-m", "benchmarks.sizes", "--short"],
        ["-m", "benchmarks.table", "--write", "README.md"],
    ]
    told = capsys.readouterr().out
    assert "road_sst2: passed over. No weights." in told and "Failed: speed." in told


def test_neither_form_takes_the_place_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(keep, "RESULTS", tmp_path)
    full = keep.keep("speed", [{"a": 1}], "full")
    assert not capsys.readouterr().out
    keep.keep("speed", [{"a": 2}], "short", short=True)
    assert "a full form of" in (told := capsys.readouterr().out) and told.endswith("show the full form.\n")
    assert keep.kept("speed")["rows"] == [{"a": 1}] and keep.kept("speed", short=True)["rows"] == [{"a": 2}]
    assert keep.shown("speed")["form"] == "full"
    full.write_text(full.read_text().replace(date.today().isoformat(), "2000-01-01"))
    assert keep.shown("speed")["form"] == "short" and keep.shown("nothing") is None
    keep.keep("speed", [{"a": 3}], "short", short=True)
    assert capsys.readouterr().out.endswith("show this short form, which is newer.\n")


def test_the_short_form_has_trainers_at_every_workload_and_nothing_bare():
    for name in WORKLOADS:
        here = {p.kind for p in PEERS.values() if name in p.short.split()}
        assert here == {"hand", "ours", "trainer"}
    assert not any(p.short for p in PEERS.values() if p.name.endswith("bare"))


def test_sizes_measure_a_step_over_the_one_by_hand():
    told = sizes.measure("samples", 1000, pairs=1)
    assert told["python_calls"] > 20 and told["hand_ms"]["median"] > 0
    over = 1e3 * (told["thalweg_ms"]["median"] - told["hand_ms"]["median"])
    assert told["over_us"]["median"] == pytest.approx(over)
