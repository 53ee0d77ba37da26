"""State that lies in parts on ranks: put together by name for a checkpoint, and handed out again.

A checkpoint has the same form whatever the ranks and however parameters were cut. Each tensor is made whole by itself, in the
first rank's memory, so that no rank ever holds more than its parts and one whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.checkpoint import Snapshot
from thalweg.optim.arena import aligned
from thalweg.optim.sharded_arena import ShardedArena

if TYPE_CHECKING:
    from thalweg.engine.state import State
    from thalweg.parallel import Ranks

Groups = dict[str, dict[str, Tensor]]


class Spread:
    """Where each tensor of a sharded state lies.

    Args:
        state: of this rank; its parameters are in parts.
    """

    def __init__(self, state: State, ranks: Ranks) -> None:
        assert state.fully is not None
        self.state, self.shards, self.ranks = state, state.fully.shards, ranks
        self.arenas = [arena for arena in state.arenas if isinstance(arena, ShardedArena)]
        self._uniform = {
            f"{part.name}/{segment.names[0]}"
            for arena in self.arenas
            for segment in arena.segments
            for part in segment.program.parts
            if part.shape == "uniform"
        }
        self._owned: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if any(arena.owned() for arena in self.arenas):
            self._learn()

    # ------------------------------------------------------------------ together

    @torch.no_grad()
    def whole(self, groups: Mapping[str, Mapping[str, Tensor]]) -> Groups:
        """The same tensors whole, in the first rank's memory; the other ranks, which take part, get what they need not keep."""
        found: Groups = {}
        for stem, tensors in groups.items():
            made: dict[str, Tensor] = {}
            for name in self._names(stem, tensors):
                tensor = self._one(stem, name, tensors.get(name))
                if tensor is not None:
                    made[name] = tensor
            found[stem] = made
        return found

    def _names(self, stem: str, tensors: Mapping[str, Tensor]) -> list[str]:
        """What there is on any rank, in one order on all of them."""
        names = list(tensors)
        seen = set(names)
        for inner in ("", "weights/", "state/", "average/"):
            kind = stem if not inner else inner[:-1]
            if inner and not any(name.startswith(inner) for name in names):
                continue
            names += [inner + n for n in self._elsewhere(kind) if inner + n not in seen]
        return sorted(names)

    def _elsewhere(self, kind: str) -> Iterator[str]:
        """What owners of whole parameters keep of them."""
        for arena in self.arenas:
            for segment in arena.owned():
                for part in segment.program.parts:
                    if part.shape == "uniform" or (part.name == "average") != (kind == "average"):
                        continue
                    if kind in ("state", "average"):
                        yield from (n if kind == "average" else f"{part.name}/{n}" for n in segment.names)

    def _one(self, stem: str, path: str, mine: Tensor | None) -> Tensor | None:
        kind, name, arena = self._lies(stem, path)
        if kind == "all":
            return None if mine is None else mine.detach().cpu()
        if kind == "ring":
            assert mine is not None and arena is not None
            return self._whole_ring(arena, mine)
        if kind == "cut":
            assert mine is not None
            whole = self.shards.whole(name, mine.to(self._device()))
            return None if whole is None else whole.cpu()
        return self._from_owner(stem, path, name, arena, mine)

    def _from_owner(self, stem: str, path: str, name: str, arena: Any, mine: Tensor | None) -> Tensor | None:
        owner = arena.owner(name)
        if owner == 0 or self.shards.rank not in (0, owner):
            return None if mine is None else mine.detach().cpu()
        if self.shards.rank == owner:
            assert mine is not None
            with self.shards.touch("a whole tensor"):
                dist.send(mine.detach().to(self._device()).contiguous(), group=self.shards.group, group_dst=0)
            return None
        shape, dtype = self._form(stem, path)
        got = torch.empty(shape, dtype=dtype, device=self._device())
        with self.shards.touch("a whole tensor"):
            dist.recv(got, group=self.shards.group, group_src=owner)
        return got.cpu()

    def _form(self, stem: str, path: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what another rank owns."""
        inner = path if stem in ("state", "average") else path.partition("/")[2]
        kind = stem if stem in ("state", "average") else path.partition("/")[0]
        return self._owned[f"{kind}/{inner}"]

    def _learn(self) -> None:
        """All ranks know the shapes of what each owns; asked once, together."""
        mine: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for arena in self.arenas:
            for segment in arena.owned():
                for place, part in enumerate(segment.program.parts):
                    if part.shape == "uniform":
                        continue
                    kind = "average" if part.name == "average" else f"state/{part.name}"
                    views = arena._part_views(segment, part, place)
                    mine.update({f"{kind}/{n}": (tuple(t.shape), t.dtype) for n, t in views.items()})
        for theirs in self.ranks.told(mine):
            self._owned.update(theirs)

    # ------------------------------------------------------------------ apart

    @torch.no_grad()
    def parts(self, snapshot: Snapshot | None) -> Snapshot | None:
        """Of a snapshot that the first rank has, each rank's parts."""
        told = None
        if snapshot is not None:
            forms = [(stem, n, tuple(t.shape), t.dtype) for stem, ts in snapshot.groups.items() for n, t in ts.items()]
            told = dict(snapshot.facts), forms, list(snapshot.groups)
        told = self.ranks.from_first(told)
        if told is None:
            return None
        facts, forms, stems = told
        groups: Groups = {stem: {} for stem in stems}
        for stem, name, shape, dtype in forms:
            whole = torch.empty(shape, dtype=dtype, device=self._device())
            if snapshot is not None:
                whole.copy_(snapshot.groups[stem][name])
            self.ranks.copy([whole])
            part = self._part(stem, name, whole)
            if part is not None:
                groups[stem][name] = part
        return Snapshot(groups, facts)

    def _part(self, stem: str, path: str, whole: Tensor) -> Tensor | None:
        kind, name, arena = self._lies(stem, path)
        if kind == "all":
            return whole
        if kind == "ring":
            assert arena is not None
            return self._part_of_ring(arena, whole)
        if kind == "cut":
            fits = tuple(whole.shape) == self.shards.pieces[name].shape
            return self.shards.mine(name, whole).clone() if fits else whole  # of another shape: said by who loads it
        assert arena is not None
        return whole if arena.owner(name) == self.shards.rank else None

    # ------------------------------------------------------------------ where

    def _lies(self, stem: str, path: str) -> tuple[str, str, ShardedArena | None]:
        """("all" ranks have it, "cut", "owned" by one, or a "ring" of flat weights; the parameter; its arena)."""
        if stem not in ("weights", "state", "average", "best"):  # a copy of groups, for the guard
            inner, _, rest = path.partition("/")
            return self._lies(inner, rest) if inner in ("weights", "state", "average") else ("all", path, None)
        if stem == "state" and path.startswith("window/"):
            which = path.removeprefix("window/")
            if which.isdigit() and int(which) < len(self.arenas):
                return "ring", "", self.arenas[int(which)]
            return "all", path, None
        name = path if stem != "state" else path.partition("/")[2]
        if name not in self.shards.pieces or (stem == "state" and path in self._uniform):
            return "all", name, None
        arena = next((a for a in self.arenas if name in a.places), None)
        keeps_whole = stem == "state" or (stem == "average" and self.state.window is None)
        if arena is not None and keeps_whole and arena.owner(name) is not None:
            return "owned", name, arena
        return "cut", name, arena

    def _whole_ring(self, arena: ShardedArena, ring: Tensor) -> Tensor | None:
        rows = []
        for row in ring:
            runs: list[Tensor] = []
            for name in arena.places:
                whole = self.shards.whole(name, arena.view(row, name))
                if whole is not None:
                    runs.append(whole.reshape(-1))
                    runs.append(whole.new_zeros(aligned(whole.numel()) - whole.numel()))
            rows.append(torch.cat(runs) if runs else None)
        return torch.stack([row for row in rows if row is not None]).cpu() if rows[0] is not None else None

    def _part_of_ring(self, arena: ShardedArena, whole: Tensor) -> Tensor:
        part = whole.new_zeros(len(whole), arena.params.numel())
        at = 0
        for name in arena.places:
            piece: Any = self.shards.pieces[name]
            start, stop = piece.bounds(self.shards.rank)
            place = arena.places[name][0]
            part[:, place : place + stop - start] = whole[:, at + start : at + stop]
            at += aligned(piece.numel)
        return part

    def _device(self) -> torch.device:
        return self.state.device.torch_device
