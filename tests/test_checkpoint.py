"""Nothing is lost (contract C7): a checkpoint is there whole or not at all, and what is damaged is named, never loaded."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, three_parts
from thalweg.checkpoint import FolderLock, Snapshot, Store, write_file
from thalweg.core import CheckpointError, RunFolderError

FILES = ("weights.safetensors", "average.safetensors", "state.safetensors", "state.json")
often = settings(
    max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def snapshot(value: float = 1.0, step: int = 1) -> Snapshot:
    groups = {
        "weights": {"layer.weight": torch.full((3, 2), value), "layer.bias": torch.tensor([value, -value])},
        "average": {"layer.weight": torch.full((3, 2), value / 2)},
        "state": {"layer.weight.m": torch.zeros(6), "updates": torch.tensor(step)},
    }
    return Snapshot(groups, {"step": step, "metrics": {"loss": 0.1 * value}, "ranking": [[0.5, 1]]})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_equal(got: Snapshot, wanted: Snapshot) -> None:
    assert got.facts == wanted.facts
    assert {stem: set(group) for stem, group in got.groups.items()} == {s: set(g) for s, g in wanted.groups.items()}
    for stem, group in wanted.groups.items():
        for name, tensor in group.items():
            other = got.groups[stem][name]
            assert other.dtype == tensor.dtype and other.shape == tensor.shape, f"{stem}: {name}"
            assert bits(other) == bits(tensor.detach()), f"{stem}: {name}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")


templates: dict[range, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def folder_of_templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Saving is slow, as it waits for the disk: what tests begin from is saved once and copied."""
    templates[range(0)] = tmp_path_factory.mktemp("templates")
    yield
    templates.clear()


def filled(folder: Path, steps: range = range(1, 4)) -> Store:
    """A store with a checkpoint of each of ``steps``."""
    if steps not in templates:
        templates[steps] = templates[range(0)] / str(steps)
        store = Store(templates[steps])
        for step in steps:
            store.save(step, snapshot(float(step), step))
    shutil.copytree(templates[steps], folder, dirs_exist_ok=True)
    return Store(folder)


def refused(store: Store, step: int) -> tuple[str, str, str]:
    """The parts of the error that loading a damaged checkpoint ends in."""
    with pytest.raises(CheckpointError) as err:
        store.load(step)
    return three_parts(err.value)


def seal(step: int, files: Any) -> bytes:
    """A manifest that fits, as a hostile hand would write it: bit rot does not."""
    body = {"format": 2, "step": step, "files": files}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1, sort_keys=True).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def row_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file, by the format's definition; of a file that is none, what fits best."""
    data = path.read_bytes()
    row: dict[str, Any] = {"bytes": len(data), "sha256": sha256(data)}
    if path.suffix == ".safetensors":
        base = 8 + int.from_bytes(data[:8], "little")
        row |= {"header": sha256(data[:base]), "tensors": {}}
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            for name, told in json.loads(data[8:base]).items():
                start, stop = told["data_offsets"]
                row["tensors"][name] = sha256(data[base + start : base + stop])
    return row


def reseal(store: Store, step: int) -> None:
    """Give a checkpoint's files, as they now are, a manifest that fits."""
    found = [p for p in store.path(step).iterdir() if p.name != "manifest.json"]
    files = {p.name: row_of(p) for p in found}
    (store.path(step) / "manifest.json").write_bytes(seal(step, files))


# --- round trip ------------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def every_kind_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    size = torch.empty((), dtype=dtype).element_size()
    noise = torch.randint(0, 2 if dtype == torch.bool else 256, (24 * size,), dtype=torch.uint8).view(dtype)
    return {  # bit patterns at random: NaN with payloads, infinities and subnormals among the floats
        "plain": noise,
        "scalar": noise[0],
        "empty": noise[:0],
        "empty rows": noise[:0].reshape(0, 3),
        "transposed": noise.reshape(4, 6).T,
        "strided": noise[::3],
        "flipped view": noise.reshape(2, 3, 4).permute(2, 0, 1),
        "expanded": noise[:1].expand(5),
        "tail of a storage": noise[20:],
        "ünïcode.name/with.all ": noise[:2],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_to_the_bit(store: Store, dtype: torch.dtype) -> None:
    wanted = Snapshot({"weights": every_kind_of(dtype)}, {})
    store.save(7, wanted)
    assert_equal(store.load(7), wanted)


def test_special_values_come_back_to_the_bit(store: Store) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1e-40, 3.4e38], dtype=torch.float64)
    wanted = Snapshot({"state": {str(d): values.to(d) for d in DTYPES[:4]}}, {})
    store.save(1, wanted)
    assert_equal(store.load(1), wanted)


def test_parameters_and_tied_weights_come_back(store: Store) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    wanted = Snapshot({"weights": {"embedding": weight, "head": weight, "row": weight[0]}, "nothing": {}}, {})
    store.save(1, wanted)
    got = store.load(1)
    assert_equal(got, wanted)
    got.groups["weights"]["embedding"].zero_()  # what was read is the reader's own
    assert_equal(store.load(1), wanted)


def test_facts_come_back_as_they_were(store: Store) -> None:
    facts = {
        "rate": 0.1 + 0.2,
        "tiny": 5e-324,
        "big": 2**62,
        "none": None,
        "ü": ["ä", True, {"deep": [1.5]}],
        "inf": float("inf"),
    }
    store.save(3, Snapshot({"weights": {}}, facts))
    assert store.load(3).facts == facts


def test_a_checkpoint_is_files_that_others_can_read(store: Store) -> None:
    """The format is a promise: names, JSON, and a manifest of every other file."""
    from safetensors.torch import load_file

    path = Path(store.save(120, snapshot(step=120)))
    assert path == store.folder / "step-00000120"
    assert {p.name for p in path.iterdir()} == {*FILES, "manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 2 and manifest["step"] == 120 and set(manifest["files"]) == set(FILES)
    for name, said in manifest["files"].items():
        assert said == row_of(path / name)
    assert set(manifest["files"]["weights.safetensors"]["tensors"]) == {"layer.weight", "layer.bias"}
    assert (path / "manifest.json").read_bytes() == seal(120, manifest["files"])
    assert set(load_file(path / "weights.safetensors")) == {"layer.weight", "layer.bias"}
    assert json.loads((path / "state.json").read_text())["step"] == 120


def test_steps_are_sorted_as_numbers(store: Store) -> None:
    for step in (3, 123_456_789_012, 99_999_999, 100_000_000):
        store.save(step, snapshot(step=step))
    assert store.steps() == [3, 99_999_999, 100_000_000, 123_456_789_012]
    assert store.load(123_456_789_012).facts["step"] == 123_456_789_012
    assert store.newest_good() == (123_456_789_012, [])


def test_a_step_saved_again_is_the_later_one(store: Store) -> None:
    store.save(2, snapshot(1.0, 2))
    store.save(2, Snapshot({"weights": {"w": torch.ones(1)}}, {"second": True}))
    assert_equal(store.load(2), Snapshot({"weights": {"w": torch.ones(1)}}, {"second": True}))
    assert [p.name for p in store.folder.iterdir()] == ["step-00000002"]


def test_only_our_own_names_are_checkpoints(store: Store) -> None:
    """A name that we would not have written stands for no step: reading or removing that step would miss it."""
    store.save(1, snapshot())
    for name in (
        "step-000000001",
        "step-000000009",
        "step-٠٠٠٠٠٠٠٩",
        "step-7",
        "step-00000003.old",
        "xstep-00000004",
        ".step-00000005",
    ):
        (store.folder / name).mkdir()
    assert store.steps() == [1]
    assert store.newest_good() == (1, [])
    store.remove_after(1)
    assert store.retain(last=1, every=0, best=[]) == []


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_named_and_another_checkpoint_offered(tmp_path: Path, name: str) -> None:
    store = filled(tmp_path)
    path = store.path(3) / name
    whole = path.read_bytes()
    places = random.Random(name).sample(range(len(whole) * 8), 40)
    for place in [0, len(whole) * 8 - 1, *places]:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        assert name in store.fault(3) and "sha256" in store.fault(3), f"bit {place}"
        _, numbers, remedy = refused(store, 3)
        assert name in numbers and "--resume 2" in remedy
        assert store.newest_good() == (2, [store.fault(3)])
    path.write_bytes(whole)
    assert store.fault(3) == ""
    assert_equal(store.load(3), snapshot(3.0, 3))


def test_any_flipped_bit_of_a_manifest_is_a_fault(store: Store) -> None:
    """All of its bits, so also those of the step's number and of the names of its fields."""
    store.save(2, Snapshot({"weights": {"w": torch.ones(1)}}, {}))
    path = store.path(2) / "manifest.json"
    whole = path.read_bytes()
    unseen, crashed = [], []
    with open(path, "r+b", buffering=0) as file:
        for place in range(len(whole) * 8):
            file.seek(place // 8)
            file.write(bytes([whole[place // 8] ^ 1 << place % 8]))
            try:
                if not store.fault(2):
                    unseen.append(place)
            except Exception as err:
                crashed.append((place, repr(err)))
            file.seek(place // 8)
            file.write(whole[place // 8 : place // 8 + 1])
    assert (unseen, crashed) == ([], [])
    assert store.fault(2) == ""


def test_a_manifest_without_a_field_is_a_fault(tmp_path: Path) -> None:
    """One flipped bit in a field's name is enough to lose it."""
    store = filled(tmp_path)
    path = store.path(3) / "manifest.json"
    for field in ("bytes", "sha256", "format", "files"):
        path.write_text(path.read_text().replace(f'"{field}"', f'"{field[:-1]}_"'))
        assert store.fault(3), field
        assert store.newest_good()[0] == 2
        refused(store, 3)


def test_a_checkpoint_under_another_steps_name_is_a_fault(tmp_path: Path) -> None:
    """A run would go on from the wrong place in its data and its schedule."""
    store = filled(tmp_path)
    shutil.copytree(store.path(1), store.path(9))
    assert store.fault(9)
    assert store.newest_good()[0] == 3


def cut(size: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * size))


def replaced(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def lengthened(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nonexistent/file")


DAMAGES = {
    "empty": cut(0),
    "half": cut(0.5),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte long": lengthened,
    "missing": Path.unlink,
    "other": replaced(b"other bytes"),
    "a page of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "a folder": made_a_folder,
    "a dangling link": made_a_dangling_link,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_found_and_passed_over(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    store = filled(tmp_path)
    damage(store.path(3) / name)
    fault = store.fault(3)
    assert "step-00000003" in fault
    asked, numbers, remedy = refused(store, 3)
    assert "3" in asked and numbers == fault and "--resume 2" in remedy
    assert store.newest_good() == (2, [fault])


def test_a_file_of_the_wrong_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    path = store.path(3) / "weights.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 9)
    assert f"{size - 9} bytes, not {size}" in store.fault(3)


def test_a_file_too_many_is_a_fault(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (store.path(3) / "extra.safetensors").write_bytes(b"")
    assert "step-00000003" in store.fault(3)
    refused(store, 3)


@pytest.mark.parametrize("number", [0, 1, 99, "2", None])
def test_a_format_of_another_version_is_refused_by_number(tmp_path: Path, number: Any) -> None:
    store = filled(tmp_path)
    path = store.path(3) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    assert f"format {number!r}, this thalweg reads 2" in store.fault(3)
    refused(store, 3)


def test_the_newest_good_one_is_found_behind_several_bad_ones(tmp_path: Path) -> None:
    store = filled(tmp_path, range(1, 6))
    (store.path(5) / "manifest.json").unlink()
    cut(0.5)(store.path(4) / "weights.safetensors")
    cut(0)(store.path(2) / "state.json")
    step, faults = store.newest_good()
    assert step == 3
    assert ["step-00000005" in faults[0], "weights.safetensors" in faults[1], len(faults)] == [True, True, 2]
    for bad in (2, 4, 5):
        assert "--resume 3" in refused(store, bad)[2]


def test_where_no_checkpoint_is_good_none_is_offered(tmp_path: Path) -> None:
    store = filled(tmp_path, range(1, 3))
    for step in (1, 2):
        cut(0)(store.path(step) / "state.json")
    assert store.newest_good()[0] is None and len(store.newest_good()[1]) == 2
    assert "--resume" not in refused(store, 2)[2]


def test_no_checkpoints_are_no_fault(store: Store) -> None:
    assert store.steps() == [] and store.newest_good() == (None, [])


def test_a_step_that_was_never_saved_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    asked, _, remedy = refused(store, 77)
    assert "77" in asked and "--resume 3" in remedy


# --- hostile files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        '{"format": 2}',
        '{"format": 2, "files": 3}',
        '{"format": 2, "files": "ab"}',
        '{"format": 2, "files": [["a"]]}',
        '{"format": 2, "files": [[["a"], 1]]}',
        '{"format": 2, "files": {}}',
        json.dumps({"format": 2, "step": 3, "files": dict.fromkeys(FILES, 3)}),
        json.dumps({"format": 2, "step": 3, "files": dict.fromkeys(FILES)}),
        json.dumps({"format": 2, "step": 3, "files": {name: {} for name in FILES}}),
        json.dumps({"format": 2, "step": 3, "files": {name: {"bytes": "x", "sha256": []} for name in FILES}}),
        "9" * 5000,
        "[" * 100_000,
        '{"a":' * 100_000,
        "\ud800",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_a_manifest_of_any_content_is_a_fault(tmp_path: Path, text: str) -> None:
    store = filled(tmp_path)
    (store.path(3) / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "step-00000003" in store.fault(3)
    assert store.newest_good()[0] == 2
    refused(store, 3)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.sampled_from(FILES)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)),
    max_leaves=8,
)


@given(
    place=st.sampled_from(["top", "format", "step", "files", "file", "bytes", "sha256"]),
    value=json_values,
    fits=st.booleans(),
)
@example(place="sha256", value="", fits=True)
@often
def test_a_manifest_with_any_value_at_any_place_ends_in_our_error(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: Any, fits: bool
) -> None:
    """Also where its own digest fits it."""
    store = filled(tmp_path_factory.mktemp("fuzz"), range(1, 2))
    path = store.path(1) / "manifest.json"
    tree = json.loads(path.read_text())
    whole, before = json.loads(path.read_text()), store.load(1)
    if place == "top":
        tree = value
    elif place in ("format", "step", "files"):
        tree[place] = value
    elif place == "file":
        tree["files"][FILES[0]] = value
    else:
        tree["files"][FILES[0]][place] = value
    path.write_bytes(seal(1, tree["files"]) if fits and place != "top" else json.dumps(tree).encode())
    fault = store.fault(1)
    if fault:
        refused(store, 1)
    elif fits and place == "sha256" and FILES[0].endswith(".safetensors"):
        assert_equal(store.load(1), before)  # the digests of its header and of each tensor stand beside it
    else:
        assert json.loads(path.read_text()) == whole


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "../step-00000002/state.json",
        "state.json/../state.json",
        "",
        ".",
        "..",
        "a\0b",
    ],
)
def test_names_that_lead_elsewhere_are_never_followed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    path = store.path(3) / "manifest.json"
    files = json.loads(path.read_text())["files"]
    path.write_bytes(seal(3, {**files, name: {"bytes": 1, "sha256": "0" * 64}}))
    read: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda p, *rest: read.append(os.path.realpath(p)) or real(p, *rest))
    assert "step-00000003" in store.fault(3)
    refused(store, 3)
    assert read and all(Path(p).parent in (store.path(1), store.path(2), store.path(3)) for p in read)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_a_link_to_a_file_elsewhere_is_a_fault(tmp_path: Path, name: str) -> None:
    """A checkpoint that was handed on must not pull in other files of this machine, even if their digest is known."""
    store = filled(tmp_path / "checkpoints")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(store.path(3) / name, elsewhere)
    (store.path(3) / name).symlink_to(elsewhere)
    assert name in store.fault(3)
    refused(store, 3)


CRAFTED = {
    "not JSON": ("state.json", b"{nope"),
    "no table": ("state.json", b"[1, 2]"),
    "not UTF-8": ("state.json", b"\xff\xfe\x00"),
    "deep JSON": ("state.json", b"[" * 100_000),
    "long number": ("state.json", b'{"step": ' + b"9" * 5000 + b"}"),
    "no header": ("weights.safetensors", b""),
    "huge header": ("weights.safetensors", b"\xff" * 64),
    "header not JSON": ("weights.safetensors", b"\x08\0\0\0\0\0\0\0{garbage"),
    "header no table": ("weights.safetensors", b"\x08\0\0\0\0\0\0\0[1,2,3] "),
    "tensor outside": (
        "weights.safetensors",
        (lambda head: len(head).to_bytes(8, "little") + head)(
            b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
        ),
    ),
    "unknown dtype": (
        "weights.safetensors",
        (lambda head: len(head).to_bytes(8, "little") + head + bytes(16))(
            b'{"w":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}'
        ),
    ),
}


@pytest.mark.parametrize(("name", "data"), CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_file_with_a_fitting_manifest_ends_in_our_error(tmp_path: Path, name: str, data: bytes) -> None:
    store = filled(tmp_path)
    (store.path(3) / name).write_bytes(data)
    reseal(store, 3)
    refused(store, 3)


@given(data=st.binary(max_size=200))
@settings(often, max_examples=40)
def test_random_bytes_for_tensors_end_in_our_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    store = filled(tmp_path_factory.mktemp("fuzz"), range(1, 2))
    (store.path(1) / "state.safetensors").write_bytes(data)
    reseal(store, 1)
    refused(store, 1)


def test_a_plain_file_under_a_steps_name_stops_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path, range(1, 3))
    (tmp_path / "step-00000007").write_text("not a folder")
    assert store.newest_good()[0] == 2
    refused(store, 7)
    store.remove_after(2)
    assert store.newest_good()[0] == 2


# --- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "every", "best", "kept"),
    [
        (1, 0, [], [12]),
        (2, 0, [], [11, 12]),
        (3, 4, [], [4, 8, 10, 11, 12]),
        (1, 0, [3, 7], [3, 7, 12]),
        (2, 5, [3, 12], [3, 5, 10, 11, 12]),
        (99, 0, [], [*range(1, 13)]),
        (1, 1, [], [*range(1, 13)]),
        (1, 0, [40], [12]),
    ],
)
def test_retention_keeps_the_newest_the_best_and_the_round_ones(
    tmp_path: Path, last: int, every: int, best: list[int], kept: list[int]
) -> None:
    store = filled(tmp_path, range(1, 13))
    assert store.retain(last=last, every=every, best=best) == [s for s in range(1, 13) if s not in kept]
    assert store.steps() == kept
    assert all(not store.fault(s) for s in kept)
    assert {p.name for p in tmp_path.iterdir()} == {f"step-{s:08d}" for s in kept}


def test_names_decide_what_is_newest_and_never_the_clock(tmp_path: Path) -> None:
    """The clock of a machine may be set back in the middle of a run."""
    store = filled(tmp_path, range(1, 7))
    for age, step in enumerate(store.steps()):
        for path in [*store.path(step).iterdir(), store.path(step)]:
            os.utime(path, (1e9 - age * 86_400, 1e9 - age * 86_400))
    assert store.newest_good() == (6, [])
    assert store.retain(last=2, every=0, best=[]) == [1, 2, 3, 4]
    assert store.steps() == [5, 6]


def test_nothing_is_removed_while_the_newest_is_damaged(tmp_path: Path) -> None:
    store = filled(tmp_path, range(1, 5))
    cut(0.5)(store.path(4) / "weights.safetensors")
    assert store.retain(last=1, every=0, best=[]) == []
    assert store.steps() == [1, 2, 3, 4] and store.newest_good()[0] == 3


def test_retention_of_nothing_removes_nothing(store: Store) -> None:
    assert store.retain(last=2, every=0, best=[]) == []


def test_later_checkpoints_are_removed_when_a_run_goes_back(tmp_path: Path) -> None:
    store = filled(tmp_path, range(1, 6))
    store.remove_after(3)
    assert store.steps() == [1, 2, 3] and len(list(tmp_path.iterdir())) == 3


# --- kills and errors at every stage ---------------------------------------------------------------------------------


class Killed(BaseException):
    """What a process that was killed looks like from inside."""


class Kernel:
    """Stands between the store and the operating system, numbers its calls, and lets one of them fail.

    Args:
        fatal: the number of the call that fails; None: none does.
        error: what that call raises; None: the process dies there, so that no later call does anything either.
        torn: a write that fails leaves half of its file.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, fatal: int | None = None, error: Exception | None = None, torn: bool = False
    ) -> None:
        self.calls: list[str] = []
        self.dead = False
        self.fatal, self.error, self.torn = fatal, error, torn
        for owner, name in (
            (os, "mkdir"),
            (os, "fsync"),
            (os, "rename"),
            (os, "replace"),
            (os, "unlink"),
            (os, "write"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, self.between(name, getattr(owner, name)))

    def between(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Killed(name)
            self.calls.append(name)
            if len(self.calls) - 1 != self.fatal:
                return real(*args, **kwargs)
            if self.torn and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if self.error is not None:
                raise self.error
            self.dead = True
            raise Killed(name)

        return call


def stages_of(act: Callable[[], Any]) -> list[str]:
    """The calls that ``act`` makes, in order."""
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel(patch)
        act()
    return kernel.calls


def whole_and_nothing_else(folder: Path) -> list[int]:
    """The steps in a folder, each under its own name and whole, with nothing beside them."""
    store = Store(folder)
    assert {p.name for p in folder.iterdir()} == {f"step-{s:08d}" for s in store.steps()}
    assert [store.fault(s) for s in store.steps()] == [""] * len(store.steps())
    return store.steps()


@pytest.mark.parametrize("torn", [False, True], ids=["before a call", "within a write"])
def test_a_save_killed_at_any_stage_leaves_the_checkpoint_whole_or_absent(tmp_path: Path, torn: bool) -> None:
    dry = filled(tmp_path / "dry", range(1, 2))
    stages = stages_of(lambda: dry.save(2, snapshot()))
    assert {"mkdir", "write", "fsync", "rename"} <= set(stages)
    for place, stage in enumerate(stages):
        folder = tmp_path / f"{place}"
        store = filled(folder, range(1, 3))
        with pytest.MonkeyPatch.context() as patch:
            Kernel(patch, place, torn=torn)
            with pytest.raises(Killed):
                store.save(3, snapshot(3.0, 3))
        visible = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        assert set(visible) - {"step-00000003"} == {"step-00000001", "step-00000002"}, stage
        assert whole_and_nothing_else(folder) in ([1, 2], [1, 2, 3]), stage
        for step in Store(folder).steps():
            assert_equal(Store(folder).load(step), snapshot(float(step), step))
        assert ("step-00000003" in visible) == ("rename" in stages[:place]), stage


@pytest.mark.parametrize("kind", ["error", "kill"])
def test_a_step_saved_again_is_never_lost(tmp_path: Path, kind: str) -> None:
    """A resumed run that is stopped at once saves the step that it came from, perhaps the only good one."""
    dry = filled(tmp_path / "dry", range(1, 2))
    stages = stages_of(lambda: dry.save(1, snapshot()))
    lost = []
    for place, stage in enumerate(stages):
        folder = tmp_path / f"{place}"
        store = filled(folder, range(1, 2))
        with pytest.MonkeyPatch.context() as patch:
            error = OSError(errno.EIO, os.strerror(errno.EIO)) if kind == "error" else None
            Kernel(patch, place, error)
            with suppress(Killed, CheckpointError):
                store.save(1, snapshot(9.0, 1))
        if whole_and_nothing_else(folder) != [1]:
            lost.append(f"{place}: {stage}")
    assert lost == []


class Refusing:
    """A C library on a file system that cannot exchange two names, as NFS cannot."""

    renameat2 = staticmethod(lambda *_: -1)


@pytest.mark.parametrize("libc", [Refusing(), object()], ids=["refused", "unknown to the C library"])
def test_a_step_is_saved_again_where_folders_cannot_be_exchanged(
    store: Store, libc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(2, snapshot(1.0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
        patch.setattr(ctypes, "get_errno", lambda: errno.EINVAL)
        store.save(2, snapshot(9.0, 2))
    assert_equal(store.load(2), snapshot(9.0, 2))
    assert whole_and_nothing_else(store.folder) == [2]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
    ids=["EIO", "ENOSPC"],
)
def test_a_save_that_fails_at_any_stage_ends_in_our_error_and_leaves_nothing_behind(
    tmp_path: Path, error: Exception
) -> None:
    dry = filled(tmp_path / "dry", range(1, 2))
    stages = stages_of(lambda: dry.save(2, snapshot()))
    for place, stage in enumerate(stages):
        folder = tmp_path / f"{place}"
        store = filled(folder, range(1, 3))
        with pytest.MonkeyPatch.context() as patch:
            Kernel(patch, place, error, torn=True)
            with pytest.raises(CheckpointError) as err:
                store.save(3, snapshot(3.0, 3))
        asked, numbers, remedy = three_parts(err.value)
        assert "step 3" in asked and str(folder) in asked and str(error) in numbers and "resume" in remedy
        assert ("Free" in remedy) == (getattr(error, "errno", 0) == errno.ENOSPC)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")], stage
        assert set(store.steps()) >= {1, 2} and not any(store.fault(s) for s in store.steps()), stage
        if "rename" not in stages[: place + 1]:
            assert "step-00000002" in numbers and store.steps() == [1, 2], stage


def test_an_interrupt_in_the_middle_of_a_save_leaves_nothing_behind(tmp_path: Path) -> None:
    store = filled(tmp_path, range(1, 3))
    for place in range(5):
        with pytest.MonkeyPatch.context() as patch:
            Kernel(patch, place, KeyboardInterrupt(), torn=True)  # type: ignore[arg-type]
            with pytest.raises(KeyboardInterrupt):
                store.save(3, snapshot())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_what_a_killed_process_left_is_swept_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / ".step-00000004.0123abcd.tmp").mkdir(parents=True)
    (tmp_path / ".step-00000004.0123abcd.tmp" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".step-00000005.tmp").write_bytes(b"")
    kept = [".mine.tmp", "notes.txt", "step-00000001.tmp", ".step-notes"]
    for name in kept:
        (tmp_path / name).write_text("kept")
    Store(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_a_removal_killed_at_any_stage_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    acts = {"retain": lambda s: s.retain(last=1, every=0, best=[]), "remove": lambda s: s.remove_after(1)}
    for name, act in acts.items():
        dry = filled(tmp_path / f"{name}-dry")
        stages = stages_of(lambda act=act, dry=dry: act(dry))
        assert {"rename", "rmtree"} <= set(stages)
        for place, stage in enumerate(stages):
            store = filled(tmp_path / f"{name}-{place}")
            with pytest.MonkeyPatch.context() as patch:
                Kernel(patch, place)
                with pytest.raises(Killed):
                    act(store)
            assert (3 if name == "retain" else 1) in whole_and_nothing_else(store.folder), f"{name}: {stage}"


class Tracer:
    """Records what is made durable, by name and by size, and what is renamed, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[Any, ...]] = []
        real_fsync = os.fsync

        def fsync(handle: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.events.append(("fsync", path, path.stat().st_size if path.is_file() else "folder"))
            real_fsync(handle)

        def renaming(real: Callable[..., Any]) -> Callable[..., Any]:
            def rename(source: Any, target: Any) -> None:
                source, target = Path(source), Path(target)
                held = (
                    {p.name: p.stat().st_size for p in source.iterdir()} if source.is_dir() else source.stat().st_size
                )
                self.events.append(("rename", source, target, held))
                real(source, target)

            return rename

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", renaming(os.rename))
        patch.setattr(os, "replace", renaming(os.replace))


def test_a_checkpoint_is_durable_before_it_has_its_name(store: Store) -> None:
    """Every file, then their folder, then the rename, then the folder above: any other order loses to a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        events = Tracer(patch).events
        target = Path(store.save(5, snapshot()))
    renames = [place for place, event in enumerate(events) if event[0] == "rename"]
    assert len(renames) == 1
    _, aside, named, held = events[renames[0]]
    assert named == target and aside.parent == target.parent and aside.name.startswith(".")
    before, after = events[: renames[0]], events[renames[0] + 1 :]
    assert set(held) == {*FILES, "manifest.json"}
    assert {path.name: size for _, path, size in before if path.parent == aside} == held  # in full when made durable
    assert before[-1] == ("fsync", aside, "folder")
    assert after == [("fsync", store.folder, "folder")]


def test_write_file_is_durable_before_it_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        events = Tracer(patch).events
        write_file(path, b"new content")
    (_, aside, size), renamed, last = events
    assert size == 11 and renamed == ("rename", aside, path, 11) and last == ("fsync", tmp_path, "folder")
    assert path.read_bytes() == b"new content" and list(tmp_path.iterdir()) == [path]


def test_write_file_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    write_file(tmp_path / "plan.json", b"old")
    stages = stages_of(lambda: write_file(tmp_path / "plan.json", b"old"))
    assert {"fsync", "replace"} <= set(stages)
    for place, stage in enumerate(stages):
        for error in (None, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            path = tmp_path / f"{place}-{error}" / "plan.json"
            path.parent.mkdir()
            write_file(path, b"old")
            with pytest.MonkeyPatch.context() as patch:
                Kernel(patch, place, error)
                with pytest.raises((Killed, OSError)):
                    write_file(path, b"new")
            assert path.read_bytes() == (b"new" if "replace" in stages[:place] else b"old"), stage
            if error is not None and stage != "unlink":
                assert list(path.parent.iterdir()) == [path], stage


# --- real kills, full disks, bad folders -----------------------------------------------------------------------------


def python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


SAVES_UNTIL_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from thalweg.checkpoint import Snapshot, Store

draw = random.Random(0)
tensors = {f"p{i}": torch.full((2000,), float(i)) for i in range(8)}
for attempt in range(30):
    folder = Path(sys.argv[1]) / f"{attempt}"
    Store(folder)
    inward, outward = os.pipe()
    child = os.fork()
    if child == 0:
        store, step = Store(folder), 0
        while True:
            step += 1
            store.save(step, Snapshot({"weights": tensors}, {"step": step}))
            os.write(outward, step.to_bytes(8, "little"))
            store.retain(last=2, every=0, best=[])
    os.close(outward)
    told = os.read(inward, 8)
    time.sleep(draw.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(inward, 8):
        told = more
    os.close(inward)
    visible = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    store = Store(folder)
    newest, faults = store.newest_good()
    assert sorted(visible) == sorted(p.name for p in folder.iterdir()), visible
    assert not faults and not any(map(store.fault, store.steps())), faults
    assert newest >= int.from_bytes(told, "little"), (newest, told)
    assert store.load(newest).facts == {"step": newest}
print("never lost")
"""


def test_a_process_killed_at_random_loses_nothing_that_it_had_saved(tmp_path: Path) -> None:
    done = python(SAVES_UNTIL_KILLED, tmp_path)
    assert done.stdout == "never lost\n", done.stderr


SAVES_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from thalweg.checkpoint import Snapshot, Store
from thalweg.core import CheckpointError

store = Store(Path(sys.argv[1]))
store.save(1, Snapshot({"weights": {"w": torch.ones(100)}}, {"step": 1}))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    store.save(2, Snapshot({"weights": {"w": torch.ones(1_000_000)}}, {"step": 2}))
except CheckpointError as err:
    assert "step 2" in err.asked and "step-00000001" in err.numbers and "resume" in err.remedy, str(err)
    assert [p.name for p in store.folder.iterdir()] == ["step-00000001"]
    assert store.load(1).facts == {"step": 1}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.save(2, Snapshot({"weights": {"w": torch.ones(1_000_000)}}, {"step": 2}))
    assert store.newest_good() == (2, [])
    print("refused, then saved")
"""


def test_a_file_that_may_not_grow_ends_in_our_error_and_saves_again_when_it_may(tmp_path: Path) -> None:
    done = python(SAVES_ON_A_FULL_DISK, tmp_path)
    assert done.stdout == "refused, then saved\n", done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    asked = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if mount is None or subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs to be root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_in_our_error_and_saves_again_when_there_is_room(small_disk: Path) -> None:
    store = filled(small_disk / "checkpoints", range(1, 3))
    large = Snapshot({"weights": {"w": torch.ones(100_000)}}, {})
    (small_disk / "filler").write_bytes(bytes(800_000))
    with pytest.raises(CheckpointError) as err:
        store.save(3, large)
    _, numbers, remedy = three_parts(err.value)
    assert "step-00000002" in numbers and "Free 391 KiB" in remedy
    assert whole_and_nothing_else(store.folder) == [1, 2]
    (small_disk / "filler").unlink()
    store.save(3, large)
    assert whole_and_nothing_else(store.folder) == [1, 2, 3]


def test_a_folder_that_went_away_ends_in_our_error(tmp_path: Path) -> None:
    """A network disk that was unmounted in the middle of a run."""
    store = filled(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError) as err:
        store.save(4, snapshot())
    three_parts(err.value)


def test_checkpoints_below_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises((CheckpointError, RunFolderError)) as err:
            Store(folder)
        three_parts(err.value)


# --- the lock --------------------------------------------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from thalweg.checkpoint import FolderLock

FolderLock(Path(sys.argv[1])).acquire()
lock = FolderLock(Path(sys.argv[2]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_one_ends_however_it_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "other"), str(tmp_path / "run")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            mine = FolderLock(tmp_path / "run")
            for _ in range(2):
                with pytest.raises(RunFolderError) as err:
                    mine.acquire()
                asked, numbers, remedy = three_parts(err.value)
                assert str(tmp_path / "run") in asked and str(holder.pid) in numbers and "--name" in remedy
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    mine.acquire()
    assert (tmp_path / "run" / "lock").read_text().startswith(f"{os.getpid()}\n")
    mine.release()


def test_a_lock_is_for_one_holder_and_can_be_let_go(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "deep" / "run"), FolderLock(tmp_path / "deep" / "run")
    first.acquire()
    with pytest.raises(RunFolderError) as err:
        second.acquire()
    assert str(os.getpid()) in three_parts(err.value)[1]
    second.release()  # it holds nothing: the first one's is untouched
    with pytest.raises(RunFolderError):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


def test_locks_of_different_folders_do_not_meet(tmp_path: Path) -> None:
    locks = [FolderLock(tmp_path / name) for name in ("a", "b")]
    for lock in locks:
        lock.acquire()
    for lock in locks:
        lock.release()


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run" / "lock").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "run", Path("/proc/nowhere/run")):
        with pytest.raises(RunFolderError) as err:
            FolderLock(folder).acquire()
        asked, _, remedy = three_parts(err.value)
        assert str(folder) in asked and "--runs" in remedy
