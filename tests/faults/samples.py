"""Checkpoints of the kind that runs write, small, each with values of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.checkpoint import Snapshot


def snapshot(step: int, size: int = 24) -> Snapshot:
    """Weights, their average, slots and counters, as of a step."""
    draw = torch.Generator().manual_seed(step)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    weights = {"body.0.weight": values(size, 48), "body.0.bias": values(size), "head.weight": values(10, size)}
    slots = {f"{name}.{slot}": torch.randn(t.shape, generator=draw) for name, t in weights.items() for slot in "mv"}
    slots["counters"] = torch.tensor([step, step], dtype=torch.int64)
    average = {name: t.clone() + 1 for name, t in weights.items()}
    facts = {"step": step, "records_bytes": 0, "ranking": [[0.5, step]], "early": [0.5, 0.0], "streak": 0}
    return Snapshot({"weights": weights, "average": average, "state": slots}, facts)


def same(a: Snapshot, b: Snapshot) -> bool:
    """Whether two hold the same, to the bit."""
    names = [(stem, name) for stem, tensors in b.groups.items() for name in tensors]
    found = [(stem, name) for stem, tensors in a.groups.items() for name in tensors]
    alike = sorted(names) == sorted(found) and dict(a.facts) == dict(b.facts)
    return alike and all(torch.equal(a.groups[stem][name], b.groups[stem][name]) for stem, name in names)
