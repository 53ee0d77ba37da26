"""An arena of the parts that a rank has of sharded parameters.

Rules that work element by element run on these parts as they are, in the same kernels. A parameter that a rule must see whole
has an owner: the rank that gets its gradient and its weights from all, updates them once, keeps its slots, and sends everyone
the new part. Slots are therefore shared out over the ranks too, whole ones by parameters instead of by rows; and all numbers
are those of the update on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import seed_for
from thalweg.device import exact_dtype
from thalweg.optim.arena import Arena, How, Segment, Treatment, aligned
from thalweg.optim.batch import Batch, evaluation_weights
from thalweg.optim.codecs import Part
from thalweg.optim.program import Program, due_now
from thalweg.optim.shards import Owners, Shards


@dataclass
class OwnedSegment(Segment):
    """A segment whose parameters must be whole: of these, the ones that this rank owns.

    Attributes:
        mine: their names; none where a stand-in of one zero is updated for the numbers that belong to the whole segment.
        firsts: number of each one's first element in the segment on one rank.
    """

    mine: list[str] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)


class ShardedArena(Arena):
    """The flat buffers of this rank's parts of the parameters of one dtype.

    Args:
        named: (name, this rank's part).
        shards: which part of the whole it is.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        treatments: Mapping[str, Treatment],
        how: How,
        shards: Shards,
    ) -> None:
        self.shards = shards
        self.owners: Owners | None = None
        self._owned = self._must_be_whole(named, treatments, how)
        super().__init__(named, treatments, how)

    def _must_be_whole(
        self, named: Sequence[tuple[str, nn.Parameter]], treatments: Mapping[str, Treatment], how: How
    ) -> set[Treatment]:
        """Treatments whose updates read more than single elements."""
        first = named[0][1]
        self.dtype, self.device, self.how = first.dtype, first.device, how
        self.scalar_dtype = exact_dtype(self.device)
        kinds = {treatments[name] for name, _ in named}
        whole = {t for t in kinds if _reads_more(self._program(t, 0))}
        names = [name for name, _ in named if treatments[name] in whole]
        if names:
            self.owners = Owners(self.shards, names)
            parts = {name: p.detach() for name, p in named if treatments[name] in whole}
            self._wholes = self.owners.gather(parts, self.dtype, self.device)  # slots may start from the weights
        return whole

    def _room(self, name: str, p: Tensor) -> int:
        return self.shards.pieces[name].room

    def _extent(self, names: Sequence[str]) -> int:
        """Elements of a segment on one rank: what decides how it is updated."""
        return sum(aligned(self.shards.pieces[name].numel) for name in names)

    def _segment(self, treatment: Treatment, names: list[str], border: tuple[int, int]) -> Segment:
        program = self._program(treatment, self._extent(names))
        if treatment not in self._owned:
            start, stop = border
            ps, gs = [self.params[start:stop]], [self.grads[start:stop]]
            slots, lowered = self._slots_and_way(program, ps, ["batch"], self._extent(names))
            return Segment(treatment, names, program, Batch(ps, gs, slots, ["batch"]), lowered)
        assert self.owners is not None
        program.clear = False  # its gradients are there for the update alone
        mine = [name for name in names if self.owners.of[name] == self.shards.rank]
        ps = [self._seen(program, self._wholes.pop(name)) for name in mine]
        if not mine:
            ps = [self._stand_in(program)]
        folds = [treatment.fold if program.reads != "element" else "batch"] * len(ps)
        slots, lowered = self._slots_and_way(program, ps, folds, self._extent(names))
        firsts, place = {}, 0
        for name in names:
            firsts[name] = place
            numel = self.shards.pieces[name].numel
            place += aligned(numel) if program.reads == "element" else numel
        at = [firsts[name] for name in mine] or [0]
        return OwnedSegment(treatment, names, program, Batch([], [], slots, folds, firsts=at), lowered, mine, at)

    @staticmethod
    def _seen(program: Program, whole: Tensor) -> Tensor:
        return whole.reshape(-1) if program.reads == "element" else whole

    def _stand_in(self, program: Program) -> Tensor:
        return torch.zeros(1 if program.reads == "element" else (1, 1), dtype=self.dtype, device=self.device)

    # ------------------------------------------------------------------ an update

    def owned(self) -> list[OwnedSegment]:
        return [segment for segment in self.segments if isinstance(segment, OwnedSegment)]

    def _fill(self, *, gradients: bool) -> None:
        """What this rank owns comes together from all ranks."""
        if self.owners is None:
            return
        names = list(self.owners.of)
        ps = self.owners.gather({n: self.view(self.params, n) for n in names}, self.dtype, self.device)
        gs = {}
        if gradients:
            gs = self.owners.gather({n: self.view(self.grads, n) for n in names}, self.grads.dtype, self.device)
        for segment in self.owned():
            batch, program = segment.batch, segment.program
            batch.ps = [self._seen(program, ps[name]) for name in segment.mine] or [self._stand_in(program)]
            if gradients:
                batch.gs = [self._seen(program, gs[name]) for name in segment.mine]
                batch.gs = batch.gs or [self._stand_in(program).to(self.grads.dtype)]

    def _empty(self) -> None:
        for segment in self.owned():
            segment.batch.ps, segment.batch.gs = [], []

    def prepare(self) -> None:
        self._fill(gradients=True)

    def total(self, value: Tensor) -> Tensor:
        return self.shards.total(value)

    def run(self, given: Mapping[str, Any], *, due: int) -> None:
        for segment in self.segments:
            program = segment.program
            now = due_now(program.rule, program.options, due)
            extra = {"noise": self._noise(segment, due)} if "noise" in program.tensors else None
            batch = segment.batch
            if program.random and not isinstance(segment, OwnedSegment):
                batch, extra = self._by_parameter(segment, extra)
            segment.update.run(batch, self.scalars(segment, given), due=now, extra=extra)
        if all(segment.program.clear for segment in self.segments):
            self._cleared = self.grads._version
        if self.owners is not None:
            wholes = {name: p for s in self.owned() for name, p in zip(s.mine, s.batch.ps)}
            for name, part in self.owners.scatter(wholes, self.dtype, self.device).items():
                self.view(self.params, name).copy_(part)
            self._empty()

    def _by_parameter(self, segment: Segment, extra: Any) -> tuple[Batch, Any]:
        """A segment of elements, parameter by parameter: random bits are drawn by an element's number on one rank."""
        begin, place = self.places[segment.names[0]][0], 0
        cuts, firsts = [], []
        for name in segment.names:
            piece = self.shards.pieces[name]
            start, stop = piece.bounds(self.shards.rank)
            at = self.places[name][0] - begin
            cuts.append(slice(at, at + stop - start))
            firsts.append(place + start)
            place += aligned(piece.numel)
        whole = segment.batch
        slots = [
            mine if part.shape == "uniform" else [mine[0][cut] for cut in cuts]
            for part, mine in zip(segment.program.parts, whole.slots)
        ]
        ps, gs = [whole.ps[0][cut] for cut in cuts], [whole.gs[0][cut] for cut in cuts]
        more = None if extra is None else {name: [xs[0][cut] for cut in cuts] for name, xs in extra.items()}
        return Batch(ps, gs, slots, ["batch"] * len(cuts), firsts=firsts), more

    def _noise(self, segment: Segment, step: int) -> list[Tensor]:
        if not isinstance(segment, OwnedSegment):
            return super()._noise(segment, step)
        drawn = [self.noise(segment, segment.names.index(name), step) for name in segment.mine]
        return drawn or [torch.zeros_like(p, dtype=segment.program.wide) for p in segment.batch.ps]

    def noise(self, segment: Segment, k: int, step: int) -> Tensor:
        """The numbers that one rank would draw; of them, those that are asked for here."""
        piece = self.shards.pieces[segment.names[k]]
        seed = seed_for(self.how.seed, "noise", segment.names[0], k, step)
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (piece.numel,) if segment.program.reads == "element" else piece.shape
        drawn = torch.randn(shape, generator=generator, device=self.device, dtype=segment.program.wide)
        return drawn if isinstance(segment, OwnedSegment) else drawn[slice(*piece.bounds(self.shards.rank))]

    def alone(self, segment: Segment, k: int) -> Batch:
        raise AssertionError("gradients are not released on ranks")

    # ------------------------------------------------------------------ what is kept, by name

    def owner(self, name: str) -> int | None:
        """Which rank of the group keeps what rules remember of a parameter whole; None: each keeps its part."""
        return None if self.owners is None else self.owners.of.get(name)

    def averages(self) -> list[tuple[Tensor, Tensor]]:
        self.wait()
        pairs: list[tuple[Tensor, Tensor]] = []
        wholes: dict[str, Tensor] = {}
        found = False
        for segment in self.segments:
            if isinstance(segment, OwnedSegment):
                continue
            weights = evaluation_weights(segment.program, segment.batch)
            pairs += [] if weights is None else list(zip(weights, segment.batch.ps))
        if self.owners is None:
            return pairs
        self._fill(gradients=False)
        names = []
        for segment in self.owned():
            weights = evaluation_weights(segment.program, segment.batch)
            found = found or weights is not None
            names += [] if weights is None else segment.names
            wholes.update(zip(segment.mine, segment.batch.ps if weights is None else weights))
        self._empty()
        if found:
            parts = self.owners.scatter(wholes, torch.promote_types(self.dtype, torch.float32), self.device)
            pairs += [(parts[name], self.view(self.params, name)) for name in names]
        return pairs

    def _part_views(self, segment: Segment, part: Part, place: int) -> dict[str, Tensor]:
        mine = segment.batch.slots[place]
        if not isinstance(segment, OwnedSegment):
            return super()._part_views(segment, part, place)
        if part.shape == "uniform":
            return {segment.names[0]: mine[0]}
        views = dict(zip(segment.mine, mine))
        if segment.program.reads == "element" and part.shape == "like":
            return {name: view.view(self.shards.pieces[name].shape) for name, view in views.items()}
        return views


def _reads_more(program: Program) -> bool:
    """Whether an update needs more of a parameter than one element at a time, or keeps a number for a block of them."""
    return program.reads != "element" or program.blocked
