"""All that is parsed, fuzzed with hypothesis: each text is read, or refused in three parts."""

from __future__ import annotations

import copy
import json
import shutil
import string
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as over
from hypothesis import strategies as st

from tests.faults.core import Given, Row, fault
from tests.faults.crafted import sign, with_header
from tests.faults.hostile import SMALL, TASK, bounded, read_or_refused
from tests.faults.runs import SETTINGS, command
from tests.faults.samples import snapshot
from tests.faults.server import shared_server
from tests.faults.tasks import items
from thalweg.checkpoint import Store
from thalweg.core import Recipe
from thalweg.recipes import recipe_for
from thalweg.report import write_report
from thalweg.run import RunFolder, train_task
from thalweg.run.facts import check_snapshot

NAMES = st.one_of(
    st.sampled_from(
        ("step", "../../x", "/etc/passwd", "", "\0", "__class__", "train.steps", "weights.safetensors", "é")
    ),
    st.text(string.printable, max_size=12),
)
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from((2**31, 2**53 + 1, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400)),
    st.floats(allow_nan=True, allow_infinity=True),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, NAMES)
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values of a tree."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(path for key, value in inside for path in places(value, (*at, key)))]


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A tree with up to three values replaced, removed, or put in."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(JUNK)
            continue
        *above, last = path
        holder = tree
        for key in above:
            holder = holder[key]
        act = draw(st.sampled_from(("put", "put", "remove", "add")))
        if act == "remove":
            del holder[last]
        elif act == "add" and isinstance(holder, dict):
            holder[draw(NAMES)] = draw(JUNK)
        else:
            holder[last] = draw(JUNK)
    return tree


@st.composite
def texts(draw: Any, tree: Any) -> bytes:
    """JSON of a changed tree; at times with some of its bytes changed too."""
    data = json.dumps(draw(changed(tree))).encode()
    if draw(st.integers(0, 3)) == 0 and data:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 4)) :]
    return data


def fuzz(row: Row, given: Given, strategy: Any, act: Callable[[Any], Any]) -> None:
    """Try ``times`` values; the first that is neither read nor refused is made small and told of."""
    seed = given.draw.randrange(2**32)

    def one(value: Any) -> None:
        text = ""
        with bounded(20):
            text = read_or_refused(lambda: act(value))
        row.count("refused" if text else "read")

    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
    phases = (Phase.generate, Phase.shrink)
    tried = settings(max_examples=given.times, phases=phases, **quiet)(over(strategy)(one))
    with row.trial(f"seed {seed}", given.times):
        from hypothesis import seed as seeded

        try:
            seeded(seed)(tried)()
        except BaseExceptionGroup as several:
            raise AssertionError("\n".join(map(_told, several.exceptions))) from several
        except Exception as err:
            raise AssertionError(_told(err)) from err


def _told(err: BaseException) -> str:
    """What went wrong, where, and on what value."""
    where = traceback.extract_tb(err.__traceback__)[-1]
    notes = " ".join(getattr(err, "__notes__", []))
    return f"{type(err).__name__}: {str(err)[:100]} at {where.filename[-30:]}:{where.lineno} in {where.name}; {notes[-160:]}"


@fault("recipes: TOML of any kind", times=1500, quick=60)
def recipes(row: Row, given: Given) -> None:
    import tomli_w

    tree = Recipe().to_dict()

    def as_toml(value: Any) -> str:
        try:
            return tomli_w.dumps(value)
        except (TypeError, AttributeError, ValueError):
            return repr(value)

    lines = st.lists(st.sampled_from(tomli_w.dumps(tree).splitlines()) | st.text(max_size=40), max_size=20).map(
        "\n".join
    )
    fuzz(row, given, changed(tree).map(as_toml) | lines, Recipe.from_toml)


@fault("recipes: values given by path", times=1500, quick=60)
def overrides(row: Row, given: Given) -> None:
    paths = st.sampled_from(sorted(Recipe().flat())) | NAMES
    values = st.dictionaries(paths, JUNK | NAMES | NUMBERS.map(str), min_size=1, max_size=2)
    fuzz(row, given, values, lambda value: Recipe().override(value))


def _good(given: Given) -> Path:
    running = shared_server().start(command(TASK, given.folder, "good", **SMALL), given.folder / "good.log")
    assert running.ended() == 0, running.text()
    return given.folder / "good"


def _file(row: Row, given: Given, name: str, act: Callable[[Path], Any]) -> None:
    """A file of a run folder."""
    folder = _good(given)
    file = folder / name
    if name.endswith("l"):  # JSON Lines
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        strategy = (
            st.lists(st.sampled_from(rows).flatmap(texts), max_size=4).map(b"\n".join).map(lambda data: data + b"\n")
        )
    else:
        strategy = texts(json.loads(file.read_text()))

    def one(data: bytes) -> None:
        file.write_bytes(data)
        act(folder)

    fuzz(row, given, strategy, one)


@fault("plan.json, read to resume and to report", times=600, quick=40)
def plans(row: Row, given: Given) -> None:
    def act(folder: Path) -> None:
        RunFolder(folder).saved_plan()
        write_report(folder)

    _file(row, given, "plan.json", act)


@fault("records.jsonl, reported", times=600, quick=40)
def records(row: Row, given: Given) -> None:
    _file(row, given, "records.jsonl", write_report)


@fault("outcome.json, reported", times=300, quick=20)
def outcomes(row: Row, given: Given) -> None:
    _file(row, given, "outcome.json", write_report)


def _checkpoint(row: Row, given: Given, name: str, strategy: Any, make: Callable[[Path, bytes], None]) -> None:
    store = Store(given.folder / "checkpoints")
    store.save(1, snapshot(1))
    folder = store.path(1)
    kept = given.folder / "kept"
    shutil.copytree(folder, kept)

    def one(data: bytes) -> None:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        make(folder, data)
        store.fault(1)
        check_snapshot(store.load(1), folder)

    before = {path.name for path in given.folder.iterdir()}
    fuzz(row, given, strategy, one)
    assert {path.name for path in given.folder.iterdir()} == before, "something was written outside"


@fault("manifest.json, and one that is signed anew", times=1000, quick=60)
def manifests(row: Row, given: Given) -> None:
    store = Store(given.folder / "sample")
    store.save(1, snapshot(1))
    tree = json.loads((store.path(1) / "manifest.json").read_text())
    shutil.rmtree(given.folder / "sample")

    def make(folder: Path, data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        try:
            files = json.loads(data)["files"]
            if isinstance(files, dict):
                sign(folder, lambda rows: (rows.clear(), rows.update(files)))  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError):
            return

    _checkpoint(row, given, "manifest.json", texts(tree), make)


@fault("headers of safetensors, signed", times=1000, quick=60)
def headers(row: Row, given: Given) -> None:
    store = Store(given.folder / "sample")
    store.save(1, snapshot(1))
    data = (store.path(1) / "weights.safetensors").read_bytes()
    shutil.rmtree(given.folder / "sample")
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    def make(folder: Path, text: bytes) -> None:
        (folder / "weights.safetensors").write_bytes(with_header(data, text))
        sign(folder)

    _checkpoint(row, given, "weights.safetensors", texts(table), make)


@fault("state.json, signed", times=1000, quick=60)
def facts(row: Row, given: Given) -> None:
    tree = {**snapshot(1).facts, "owed": False, "most_samples": {"micro-batch": 4}}

    def make(folder: Path, data: bytes) -> None:
        (folder / "state.json").write_bytes(data)
        sign(folder)

    _checkpoint(row, given, "state.json", texts(tree), make)


@fault("state.json of a run, signed, resumed", times=300, quick=8)
def resumed(row: Row, given: Given) -> None:
    changes = {**SMALL, "guard.nonfinite": "rewind", "guard.every": 2}
    running = shared_server().start(command(TASK, given.folder, "good", **changes), given.folder / "good.log")
    assert running.ended() == 0, running.text()
    folder, kept = given.folder / "good", given.folder / "kept"
    shutil.copytree(folder, kept)
    one = folder / "checkpoints" / "step-00000006"
    tree = json.loads((one / "state.json").read_text())

    def act(data: bytes) -> None:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        (one / "state.json").write_bytes(data)
        sign(one)
        recipe = recipe_for(items).override({**SETTINGS[TASK], **changes})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train_task(items, recipe, folder=folder, resume=True)

    fuzz(row, given, texts(tree), act)
