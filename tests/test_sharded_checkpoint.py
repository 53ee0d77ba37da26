"""State that is spread over ranks: saved by one world, read by another, verified, durable, and never unpickled."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ended, join_ranks, spawn, three_parts
from thalweg.checkpoint import Store
from thalweg.core import CheckpointError

SHAPES = {"embedding.weight": (13, 6), "head.weight": (8, 5), "bias": (3,), "scale": ()}


def values() -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    state = {f"{name}.m": torch.randn(shape, generator=draw).bfloat16() for name, shape in SHAPES.items()}
    return {"weights": weights, "state": {**state, "applied": torch.tensor([12])}}


def spread(groups: dict[str, dict[str, torch.Tensor]], world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Matrices over the ranks by their rows or columns, uneven ones too; the rest on all."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))

    def one(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2:
            return tensor.clone()
        return distribute_tensor(tensor, mesh, [Shard(1 if name.startswith("head") else 0)])

    return {stem: {name: one(name, t) for name, t in tensors.items()} for stem, tensors in groups.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def differs(got: Any, wanted: Any) -> list[str]:
    return [
        f"{stem}/{name}"
        for stem, tensors in wanted.items()
        for name, tensor in tensors.items()
        if not torch.equal(whole(got[stem][name]), tensor)
    ]


def _save(rank: int, world: int, port: int, folder: str) -> None:
    from thalweg.checkpoint.sharded import save_sharded

    join_ranks(rank, world, port)
    save_sharded(Store(Path(folder)), 12, spread(values(), world), {"step": 12, "rank": rank})
    ended()


def _load(rank: int, world: int, port: int, folder: str) -> None:
    """Into zeros; then everything that a hostile or a rotten folder can hold, refused on every rank."""
    from thalweg.checkpoint.sharded import load_sharded

    join_ranks(rank, world, port)
    store = Store(Path(folder))
    empty = {stem: {name: torch.zeros_like(t) for name, t in tensors.items()} for stem, tensors in values().items()}
    into = spread(empty, world)
    assert load_sharded(store, 12, into) == {"step": 12, "rank": 0}
    assert differs(into, values()) == []
    assert refusal(lambda: load_sharded(store, 12, {"weights": {"other": torch.zeros(3)}})).startswith("The checkpoint")
    before = {stem: {name: whole(t).clone() for name, t in tensors.items()} for stem, tensors in into.items()}
    for step in (13, 14):  # a flipped bit; a shard of another run with a fitting name
        text = refusal(lambda step=step: load_sharded(store, step, into))
        assert "damaged" in text and "shard-0000" in text, text
    assert differs(into, before) == []
    ended()


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as err:
        act()
    return "\n".join(three_parts(err.value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 12 that three ranks have saved, and two copies that are no longer what was written."""
    folder = tmp_path_factory.mktemp("sharded")
    spawn(_save, 3, str(folder))
    for step, shard in ((13, 2), (14, 1)):
        copy = folder / f"step-{step:08d}"
        copy.mkdir()
        for path in (folder / "step-00000012").iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        resealed(copy, step)
        rotten = next(copy.glob(f"shard-{shard:05d}-*"))
        data = bytearray(rotten.read_bytes())
        data[-3] ^= 4
        rotten.write_bytes(data)
    return folder


def resealed(folder: Path, step: int) -> None:
    from thalweg.checkpoint.manifest import manifest_bytes

    path = folder / "manifest.json"
    path.write_bytes(manifest_bytes(step, json.loads(path.read_text())["files"]))


def test_what_ranks_save_one_process_reads(folder: Path) -> None:
    store = Store(folder)
    assert store.fault(12) == ""
    snapshot = store.load(12)
    assert snapshot.facts == {"step": 12, "rank": 0}
    assert differs(snapshot.groups, values()) == []
    assert store.load_newest()[0] is not None and "shard-00002" in store.fault(13)


def test_nothing_in_it_is_pickle_and_every_tensor_has_a_digest(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "step-00000012").iterdir())
    assert [name.endswith((".json", ".safetensors")) for name in names] == [True] * 5, names
    files = json.loads((folder / "step-00000012" / "manifest.json").read_text())["files"]
    held = {key for name, row in files.items() if name.startswith("shard-") for key in row["tensors"]}
    assert held == {f"{stem}/{name}" for stem, tensors in values().items() for name in tensors}


@pytest.mark.parametrize("world", [2, 4])
def test_another_number_of_ranks_reads_it_and_refuses_damage(folder: Path, world: int) -> None:
    spawn(_load, world, str(folder))


def test_shards_that_do_not_fill_a_tensor_are_damage(folder: Path, tmp_path: Path) -> None:
    """Also where the manifest fits, as a hostile hand would write it."""
    copy = tmp_path / "step-00000012"
    copy.mkdir()
    for path in (folder / "step-00000012").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    next(copy.glob("shard-00002-*")).unlink()
    path = copy / "manifest.json"
    files = {n: row for n, row in json.loads(path.read_text())["files"].items() if not n.startswith("shard-00002")}
    from thalweg.checkpoint.manifest import manifest_bytes

    path.write_bytes(manifest_bytes(12, files))
    assert "do not fill it" in refusal(lambda: Store(tmp_path).load(12))


class Marks:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_among_the_shards_is_not_run(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000012"
    copy.mkdir()
    for path in (folder / "step-00000012").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / ".metadata").write_bytes(pickle.dumps(Marks(tmp_path / "it ran")))
    assert "is not in it" in refusal(lambda: Store(tmp_path).load(12))
    assert not (tmp_path / "it ran").exists()


def _fail(rank: int, world: int, port: int, folder: str) -> None:
    """One rank cannot write: all are told, and nothing is left behind."""
    from thalweg.checkpoint import sharded

    join_ranks(rank, world, port)
    if rank == 1:
        real = sharded.sync_file

        def refuse(path: Path) -> None:
            real(path)
            raise OSError(28, "No space left on device")

        sharded.sync_file = refuse
    text = refusal(lambda: sharded.save_sharded(Store(Path(folder)), 20, spread(values(), world), {"step": 20}))
    assert "rank 1" in text and "No space left" in text, text
    dist.barrier()
    assert list(Path(folder).iterdir()) == []
    ended()


def test_a_rank_that_cannot_write_is_named_on_all(tmp_path: Path) -> None:
    spawn(_fail, 2, str(tmp_path))
