"""The State is all that changes in a run, with one owner; what is not here needs no saving."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thalweg.checkpoint import Snapshot
from thalweg.core import CheckpointError, Decision, Guard
from thalweg.device import Device
from thalweg.device.kept import restored
from thalweg.engine.portions import EVALUATED, TRAINED, Limit
from thalweg.engine.spikes import Watch
from thalweg.engine.timetable import Timetable
from thalweg.optim import Arena, plain_name
from thalweg.optim.history import NormHistory
from thalweg.precision import LossScale
from thalweg.regularize import GhostBatchNorm, PooledStatistics, WindowAverage

if TYPE_CHECKING:
    from thalweg.engine.fully import FullySharded
    from thalweg.engine.spread import Spread
    from thalweg.engine.tensor import TensorParallel


class State:
    """Parameters, slots, averages, running statistics, loss scale and counters.

    Attributes:
        step: steps attempted, on the host; names the random streams and the data position.
        applied: updates applied, on the device, of shape (1,); the schedule and the averages follow it.
        t: the number of the next update, from 1, 0-dim float32.
        timetable: the scheduled values of this step; what its schedules have heard is state.
        window: the last few weights, where their mean is the average.
        watch: judges steps, where the recipe's guard asks for more than to skip what is not finite.
        limit, evaluation_limit: how many samples a pass may take, as memory has taught.
        updating: whether an update is under way: after an error, some of it may have moved.
        fully, spread: where parameters lie on ranks in parts: the model in parts, and the state put together and apart.
    """

    def __init__(
        self,
        model: nn.Module,
        arenas: list[Arena],
        device: Device,
        timetable: Timetable,
        *,
        scaled: bool,
        average: bool,
        clip_history: float = 0.0,
        window: tuple[int, int, int] | None = None,
        guard: Guard | None = None,
        fully: FullySharded | TensorParallel | None = None,
    ) -> None:
        self.model, self.arenas, self.device, self.timetable = model, arenas, device, timetable
        self.fully = fully
        self.spread: Spread | None = None
        self.watch: Watch | None = None
        if guard is not None and guard.active:
            self.watch = Watch(guard, device.torch_device, device.exact, scaled=scaled)
        self.statistics = PooledStatistics(model, device.exact)
        self.history = NormHistory(clip_history, device.torch_device, device.exact) if clip_history else None
        self.scale = LossScale.start(device) if scaled else None
        self.applied = torch.zeros(1, dtype=torch.int64, device=device.torch_device)
        self.t = torch.ones((), dtype=torch.float32, device=device.torch_device)
        self.step = 0
        self.averaged_statistics = [b.clone() for b in self.statistics.buffers()] if average else []
        ghosts = [layer.size for layer in model.modules() if isinstance(layer, GhostBatchNorm)]
        self.limit = Limit(TRAINED, device, grain=math.lcm(*ghosts))
        self.evaluation_limit = Limit(EVALUATED, device)
        self.updating = False
        self.window: WindowAverage | None = None
        if window is not None:
            self.window = WindowAverage([*(a.params for a in arenas), *self.statistics.buffers()], *window)

    def averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(average, live) tensors: parameters, and the float statistics that belong to them."""
        if self.window is not None:
            yield from zip(self.window.means(), self.window.tensors)
            return
        for arena in self.arenas:
            yield from arena.averages()
        yield from zip(self.averaged_statistics, self.statistics.buffers())

    def average_statistics(self, share: Tensor | None, ok: Tensor) -> None:
        """The running statistics' averages follow those of the parameters, which the update moves itself."""
        if share is not None:
            for average, live in zip(self.averaged_statistics, self.statistics.buffers()):
                average.lerp_(live.to(average.dtype), (share * ok).to(average.dtype))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds the averaged weights and statistics; afterwards the live ones, to the bit."""
        pairs = list(self.averages())
        with restored([live for _, live in pairs]):
            with torch.no_grad():
                for average, live in pairs:
                    live.copy_(average)
            yield

    def adopt_average(self) -> None:
        """Leave the averaged weights in the model for good, as at the end of a run."""
        with torch.no_grad():
            for average, live in self.averages():
                live.copy_(average)

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot:
        """All of the state, for a checkpoint; tensors are named after the model's parameters, never by place.

        Raises:
            CheckpointError: where an update broke off in the middle.
        """
        self.check_whole()
        weights = self.weights()
        groups = {"weights": weights, "state": dict(self._slots())}
        if averages := self._averages():
            groups["average"] = {**weights, **averages}
        most = {limit.what: limit.most for limit in self.limits() if limit.most}
        whole = self.put_together(groups)
        plain = {**facts, "step": self.step, **({"most_samples": most} if most else {})}
        return Snapshot(whole, {**plain, "tied": tied} if (tied := self.tied()) else plain)

    def put_together(self, groups: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Mapping[str, Tensor]]:
        """Tensors by name, whole where they lie on ranks in parts: on the first rank, and all take part."""
        return groups if self.spread is None else self.spread.whole(groups)

    def whole(self) -> AbstractContextManager[None]:
        """Inside, ranks may run the model as often as they like, each by itself."""
        return nullcontext() if self.fully is None else self.fully.whole()

    def copied(self) -> Snapshot:
        """A copy in the CPU's memory of all that ``load`` takes over; of this moment, whatever moves later."""
        groups = {"weights": self.weights(), "state": dict(self._slots())}
        if self.window is None and (averages := self._averages()):
            groups["average"] = averages
        copies = {stem: {name: t.to("cpu", copy=True) for name, t in group.items()} for stem, group in groups.items()}
        return Snapshot(copies, {"step": self.step})

    def go_back(self, copy: Snapshot) -> None:
        """Weights and all that belongs to them are again those of ``copied``; steps count on, what memory has taught stays."""
        step, most = self.step, [limit.most for limit in self.limits()]
        self.load(copy)
        self.step = step
        for limit, value in zip(self.limits(), most):
            limit.most = value

    def load(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of a run with the same model and recipe.

        Raises:
            CheckpointError: if names or shapes differ; nothing has been changed then.
        """
        pairs = [*_matched(self.weights(), snapshot.groups["weights"], "weights")]
        pairs += _matched(dict(self._slots()), snapshot.groups["state"], "state")
        if self.window is None and (averages := self._averages()):
            saved = snapshot.groups.get("average", {})
            pairs += _matched(averages, {name: t for name, t in saved.items() if name in averages}, "average")
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)
        self.t.copy_(self.applied[0] + 1)
        self.step = int(snapshot.facts["step"])
        for limit in self.limits():
            limit.most = int(snapshot.facts.get("most_samples", {}).get(limit.what, 0))
        self.updating = False
        for arena in self.arenas:
            arena.torn = False

    def tensors(self) -> list[Tensor]:
        """Every tensor that changes in a run, live; in an order that follows from model and recipe."""
        averages = {} if self.window is not None else self._averages()  # a window's means follow from its weights
        return [*self.weights().values(), *dict(self._slots()).values(), *averages.values()]

    def limits(self) -> tuple[Limit, Limit]:
        return self.limit, self.evaluation_limit

    def moved(self) -> bool:
        """Whether some of an update may have moved, and some not."""
        return self.updating or any(arena.torn for arena in self.arenas)

    def check_whole(self) -> None:
        """
        Raises:
            CheckpointError: where an update broke off in the middle.
        """
        if self.moved():
            raise CheckpointError(
                "An update broke off in the middle, and this state is none to go on from.",
                f"Step {self.step + 1}: some weights may have moved, and others not.",
                "Go on from the last checkpoint.",
            )

    def weights(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by plain name; tied ones once."""
        wanted = self.model.state_dict(keep_vars=True)
        seen: set[int] = set()
        named = {}
        for name, tensor in wanted.items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                named[plain_name(name)] = tensor.detach()
        return named if self.fully is None else self.fully.local(named)

    def tied(self) -> dict[str, str]:
        """Further names of tensors that ``weights`` has once: name to the one that is there."""
        first: dict[int, str] = {}
        wanted = self.model.state_dict(keep_vars=True)
        named = [
            (plain_name(name), first.setdefault(id(t), plain_name(name)))
            for name, t in wanted.items()
            if isinstance(t, Tensor)
        ]
        return {name: kept for name, kept in named if name != kept}

    def _averages(self) -> dict[str, Tensor]:
        """Averaged parameters and statistics: views of the flat averages, or means of the window."""
        named: dict[str, Tensor] = {}
        if self.window is not None and (means := self.window.means()):
            for arena, mean in zip(self.arenas, means):
                named.update({name: arena.view(mean, name) for name in arena.places})
            return named | (self._statistics(*means[len(self.arenas) :]) if self.statistics.layers else {})
        for arena in self.arenas:
            if arena.how.average:
                named.update(arena.average_views())
        if self.averaged_statistics:
            named.update(self._statistics(*self.averaged_statistics))
        return named

    def _statistics(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Flat statistics by the names that the weights have, whatever is wrapped around the model."""
        return {plain_name(name): part for name, part in self.statistics.views(mean, var).items()}

    def _slots(self) -> Iterator[tuple[str, Tensor]]:
        for arena in self.arenas:
            yield from arena.slots().items()
        for rule, numbers in self.arenas[0].shared.items():
            yield from ((f"shared.{rule}/{name}", number) for name, number in numbers.items())
        yield "applied", self.applied
        if self.timetable.feedback.pieces:
            yield "heard", self.timetable.feedback.values
        if self.window is not None:
            yield "window/count", self.window.count
            for k, ring in enumerate(self.window.rings):
                yield f"window/{k}", ring
        if self.history is not None:
            yield "norm_history", self.history.values
        if self.scale is not None:
            yield "loss_scale", self.scale.scale
            yield "loss_scale_streak", self.scale.streak
        if self.watch is not None:
            yield from self.watch.slots().items()

    def ways(self) -> list[Decision]:
        """How the updates run, and why."""
        found: dict[tuple[str, str, str], int] = {}
        for arena in self.arenas:
            for segment in arena.segments:
                key = (segment.treatment.rule, segment.update.how, segment.update.why)
                found[key] = found.get(key, 0) + len(segment.names)
        return [Decision(f"update by {rule}", how, f"{why}; {num} tensors") for (rule, how, why), num in found.items()]

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        sizes: dict[str, int] = {}
        for arena in self.arenas:
            for purpose, size in arena.nbytes().items():
                sizes[purpose] = sizes.get(purpose, 0) + size
        if self.window is not None:
            sizes["average"] = sizes.get("average", 0) + sum(ring.nbytes for ring in self.window.rings)
        sizes["buffers"] = sum(buffer.nbytes for buffer in self.model.buffers())
        if self.watch is not None and self.watch.guard.rewinding:
            sizes["copies to rewind to"] = 2 * sum(size for purpose, size in sizes.items() if purpose != "gradients")
        return sizes


def _matched(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> Iterator[tuple[Tensor, Tensor]]:
    if mine.keys() != saved.keys():
        missing, extra = sorted(mine.keys() - saved.keys())[:4], sorted(saved.keys() - mine.keys())[:4]
        raise CheckpointError(
            f"The checkpoint's {what} are not those of this model.",
            f"Missing: {', '.join(missing) or 'none'}. Not known: {', '.join(extra) or 'none'}.",
            "Resume with the model and recipe that the run began with, or start a new run.",
        )
    for name, tensor in mine.items():
        other = saved[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise CheckpointError(
                f"'{name}' in the checkpoint's {what} is of another shape or dtype.",
                f"{tuple(other.shape)} {other.dtype}, and the model has {tuple(tensor.shape)} {tensor.dtype}.",
                "Resume with the model and recipe that the run began with, or start a new run.",
            )
        yield tensor, other
