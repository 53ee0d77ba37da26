"""What is in the checkpoints of a run, and whether they are whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from thalweg.checkpoint.convert.folders import WORDS, found
from thalweg.checkpoint.convert.weights import printable
from thalweg.checkpoint.store import Snapshot, Store
from thalweg.core import CheckpointError, human_bytes

_RANKED = 5  # best evaluations that are shown


@dataclass(frozen=True)
class Verified:
    """One checkpoint, every byte of it compared.

    Attributes:
        fault: what is wrong with it; empty where it is whole.
    """

    path: str
    step: int
    size: int
    fault: str


def verify(path: Path | str) -> Iterator[Verified]:
    """Every checkpoint of a run, oldest first, or the one that is named.

    Raises:
        CheckpointError: for a run that has none.
    """
    store, named = found(path)
    steps = steps_of(store) if named is None else [named]
    for step in steps:
        size, fault = store.size(store.name(step)), store.fault(step)
        if named is None and fault and step not in store.steps():
            continue  # the run has removed it meanwhile
        yield Verified(store.where(step), step, size, fault)


def steps_of(store: Store) -> list[int]:
    steps = store.steps()
    if not steps:
        raise CheckpointError(f"{store.place} holds no checkpoint.", "Its run has saved none.", "Name another run.")
    return steps


def show(path: Path | str, *, tensors: bool = False) -> list[str]:
    """Lines about a run's checkpoints, or about one.

    Args:
        tensors: of a run: list those of the newest good one too; of one checkpoint they are always listed.

    Raises:
        CheckpointError: if there is none that is whole.
    """
    store, named = found(path)
    at, lines = named, []
    if at is None:
        steps = steps_of(store)
        at, _ = store.newest_good()
        lines += [f"{len(steps)} checkpoint{'s' if len(steps) > 1 else ''} in {store.place}"]
        lines += [f"step {step:<8}  {human_bytes(store.size(store.name(step)))}" for step in steps]
        lines += [f"set aside as damaged: {name}" for name in store.set_asides()]
        if at is None:
            raise CheckpointError(
                f"No checkpoint of {path} is whole.", store.fault(steps[-1]), "See thalweg checkpoint verify."
            )
    snapshot = store.load(at)
    lines += ["", f"step {at}, read and compared with its manifest:", *_groups(snapshot), *_ranking(snapshot)]
    if tensors or named is not None:
        lines += ["", *_tensors(snapshot)]
    return lines


def _in_order(snapshot: Snapshot) -> list[tuple[str, Mapping[str, Tensor]]]:
    """Weights first, as they are what is asked for most."""
    first = [*WORDS]
    return sorted(snapshot.groups.items(), key=lambda pair: first.index(pair[0]) if pair[0] in first else len(first))


def _groups(snapshot: Snapshot) -> Iterator[str]:
    for group, tensors in _in_order(snapshot):
        what = WORDS.get(group, "optimizer slots and counters" if group == "state" else group)
        kinds: dict[str, int] = {}
        for tensor in tensors.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            kinds[kind] = kinds.get(kind, 0) + tensor.numel()
        numbers = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        size = human_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        yield f"  {group:8} {what}: {len(tensors)} tensors, {numbers}, {size}"


def _ranking(snapshot: Snapshot) -> Iterator[str]:
    ranking = snapshot.facts.get("ranking") or []
    if ranking:
        shown = ", ".join(f"step {step} ({value:.6g})" for value, step in ranking[:_RANKED])
        more = len(ranking) - _RANKED
        yield f"  best evaluations so far: {shown}" + (f", and {more} more" if more > 0 else "")


def _tensors(snapshot: Snapshot) -> Iterator[str]:
    rows = [
        (
            group,
            printable(name),
            "x".join(map(str, tensor.shape)) or "-",
            str(tensor.dtype).removeprefix("torch."),
            tensor.nbytes,
        )
        for group, tensors in _in_order(snapshot)
        for name, tensor in tensors.items()
    ]
    wide = max((len(name) for _, name, *_ in rows), default=0)
    for group, name, shape, dtype, size in rows:
        yield f"{group:8} {name:{wide}}  {shape:>16}  {dtype:9} {size} B"
