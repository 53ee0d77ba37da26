"""Checkpoints of state that is spread over ranks, through torch.distributed.checkpoint (DCP), with its gaps closed.

DCP plans who writes what and reads any world's shards into any other's: that is used. Its own file format is not: its metadata is
pickle, which runs what it is told to, it is renamed before it is on the disk, and nothing has a digest. DCP's safetensors writer
puts each rank's shards into one safetensors file whose header says where they belong, so that nothing need be unpickled. Here each
rank makes its file durable and tells its digests; the first rank writes plain data and manifest, and gives the folder its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from thalweg.checkpoint.damage import Damage
from thalweg.checkpoint.files import begin_folder, name_folder, new_file, sync_file, sync_folder
from thalweg.checkpoint.manifest import NAME, manifest_bytes
from thalweg.checkpoint.place import LocalPlace
from thalweg.checkpoint.store import STATE, Store
from thalweg.checkpoint.tensors import describe
from thalweg.core import CheckpointError

Groups = Mapping[str, Mapping[str, Tensor]]


def save_sharded(store: Store, step: int, groups: Groups, facts: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors of which each rank holds a part. All ranks call it; when it returns, it survives a power cut.

    Args:
        store: in a folder that all ranks see.
        groups: as in a ``Snapshot``; DTensors, or plain tensors that are the same on all ranks.
        facts: plain data; the first rank's are taken.

    Raises:
        CheckpointError: on all ranks, if one of them cannot write; all earlier checkpoints are as they were.
    """

    root = _folder(store)
    aside = Path(_from_first(lambda: str(begin_folder(root / store.name(step))), step, store))
    failed = _told_by_all(_written(aside, groups, store))
    rows = {name: row for _, part in failed for name, row in part.items()}
    fault = next((text for text, _ in failed if text), "")

    def publish() -> str:
        try:
            if fault:
                raise OSError(fault)
            data = json.dumps(dict(facts), indent=1, sort_keys=True).encode()
            row = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, content in ((STATE, data), (NAME, manifest_bytes(step, {**rows, STATE: row}))):
                with new_file(aside / name) as write:
                    write(content)
            name_folder(aside, root / store.name(step))
            sync_folder(root)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # what failed, or the folder that had the name before
        return ""

    _from_first(publish, step, store)


def _written(aside: Path, groups: Groups, store: Store) -> tuple[str, dict[str, Any]]:
    """This rank's shards, durable: (what went wrong, the rows of its files)."""
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    rank = dist.get_rank()
    try:
        with _without_notes():
            writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
            state_dict_saver.save(_flat(groups), storage_writer=writer)
        rows = {}
        for path in sorted(aside.glob(f"shard-{rank + 1:05d}-*.safetensors")):
            sync_file(path)
            with store.place.open(aside.name, path.name) as file:
                rows[path.name] = describe(file)
        return "", rows
    except (
        Exception,
        CheckpointException,
    ) as err:  # DCP gathers the errors of all ranks into one, which is no Exception
        return f"rank {rank}: {type(err).__name__}: {str(err)[:300]}", {}


def _from_first(act: Callable[[], str], step: int, store: Store) -> str:
    """What the first rank's action gives, on all ranks.

    Raises:
        CheckpointError: on all ranks, if it fails.
    """
    mine = ("", "")
    if dist.get_rank() == 0:
        try:
            mine = ("", act())
        except Exception as err:  # whatever it is, the others wait to hear of it
            mine = (str(err) or type(err).__name__, "")
    failed, value = _told_by_all(mine)[0]
    if failed:
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {store.place}.",
            f"{failed}.",
            "See to the folder; the state is in memory as before.",
        )
    return str(value)


def load_sharded(store: Store, step: int, into: Groups) -> dict[str, Any]:
    """Read a checkpoint of any number of ranks into tensors that are spread over these; its plain data.

    Every file is verified before anything is changed; the ranks share that work.

    Args:
        into: as in ``save_sharded``; their values are replaced.

    Raises:
        CheckpointError: on all ranks: for damage, naming the file; for a tensor that is missing or of another shape.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        facts = store.verified_facts(step, part=dist.get_rank(), parts=dist.get_world_size())
        fault = ""
    except Damage as err:
        facts, fault = {}, str(err)
    faults = [text for text in _told_by_all(fault) if text]
    if faults:
        raise CheckpointError(
            f"The checkpoint of step {step} is damaged.", faults[0], "Take another; Store.steps() lists them."
        )
    failed = ""
    try:
        with _without_notes():
            reader = HuggingFaceStorageReader(str(_folder(store) / store.name(step)))
            state_dict_loader.load(_flat(into), storage_reader=reader)
    except (Exception, CheckpointException) as err:
        failed = f"{type(err).__name__}: {str(err)[:400]}"
    if failed:
        raise CheckpointError(
            f"The checkpoint of step {step} is not of this state.",
            failed,
            "Load it with the model and recipe that it was made with.",
        )
    return facts


def _flat(groups: Groups) -> dict[str, Any]:
    return {f"{stem}/{name}": tensor for stem, tensors in groups.items() for name, tensor in tensors.items()}


def _folder(store: Store) -> Path:
    if not isinstance(store.place, LocalPlace):
        raise CheckpointError(
            f"State that is spread over ranks cannot be saved to {store.place}.",
            "Each rank writes its own file, into a folder that gets its name at the end.",
            "Give a folder on a file system that all ranks share.",
        )
    return store.place.root


def _told_by_all(mine: Any) -> list[Any]:
    """What each rank has to say, by rank."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


@contextmanager
def _without_notes() -> Iterator[None]:
    """DCP warns of its own deprecated parts, which a user can do nothing about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (UserWarning, FutureWarning, DeprecationWarning))
        yield
