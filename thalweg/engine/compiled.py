"""The training step as one graph: forward, backward, clipping and update, compiled together.

It takes over where ``engine/step.py`` computes: seeds and the row of the timetable are the host's as they were, and what they
write is read by the graph as tensors, so that no step is traced again. A window of one micro-batch is one graph; of several, one
that adds gradients up and one for the last of them with the update; on ranks the sum over them stands between two graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.device import ran_out
from thalweg.engine.compiled_backend import Compiler
from thalweg.engine.compiled_check import FirstCheck
from thalweg.engine.compiled_graph import FlatArena, LossOf, due_of, gradients, names_in, update
from thalweg.engine.compiled_replay import Record, Replayed
from thalweg.engine.compiled_several import Repeated
from thalweg.engine.compiled_statistics import GraphStatistics
from thalweg.engine.portions import Failure, go_through, in_update
from thalweg.engine.step import RING, Step
from thalweg.engine.undo import Undo
from thalweg.optim.norm import global_norm


class CompiledStep(Step):
    """A step whose passes and update are graphs.

    Args:
        compiler: makes graphs; the rest is as for ``Step``.

    Attributes:
        check: of the first step of this process, until it was made.
        repeated: how the graph is called again within ``run_several``.
    """

    def __init__(self, *args: Any, compiler: Compiler, **words: Any) -> None:
        super().__init__(*args, **words)
        state = self.state
        self.compiler, self.news = compiler, compiler.news
        self.module = LossOf(state.model, self.loss, self.policy, state.device)
        names = names_in(self.module)
        self.flats = [FlatArena(arena, names) for arena in state.arenas]
        self.graph_statistics = GraphStatistics(state.statistics, "model.")
        self.at = torch.zeros(1, dtype=torch.int64, device=state.device.torch_device)  # the row of this step
        self.check: FirstCheck | None = FirstCheck(self)
        self.undo = Undo(state.model, state.arenas, self.sums, self.graph_statistics)
        self.repeated = Repeated()
        #: The step for which torch's generators were not seeded, since its graph draws nothing.
        self.unseeded: int | None = None
        self._graphs: dict[str, Callable[..., Any]] = {
            "add": compiler.graph(self._add),
            "end": compiler.graph(self._end),
            "single": compiler.graph(self._single),
            "update": compiler.graph(self._update),
        }

    def replay(self, record: Record) -> None:
        """Graphs are recorded by ``record`` and played again from here on."""
        self._graphs = {name: Replayed(graph, record) for name, graph in self._graphs.items()}

    # ------------------------------------------------------------------ what the host does

    def run_several(self, windows: Sequence[Sequence[Any]]) -> None:
        """Torch looks at all that it has compiled for before the first step; the others run its graph again."""
        if self.per_call == 1 or self.place is not None:
            super().run_several(windows)
            return
        self.compiler.noting = True
        try:
            self.run(windows[0])
            with self.policy.around(self.state.device), self.graph_statistics.taking():
                for window in windows[1:]:
                    self.run(window)
        finally:
            if self.unseeded is not None:  # what comes between steps finds them as after one step a call
                self._seed_generators(self.unseeded, 0)
                self.unseeded = None
            self.compiler.noting = False
            self.repeated.begin()
            self.compiler.take()

    def _run(self, window: Sequence[Any]) -> Tensor:
        if self.compiler.noting and (row := self._run_again(window)) is not None:
            return row
        self.unseeded = None  # this step is
        state = self.state
        parts = state.limit.cut(window)
        state.timetable.turn(state.applied, state.step)
        with self.policy.around(state.device), self.graph_statistics.taking():
            check = self.check.begin(parts) if self.check is not None else None
            for arena in state.arenas:
                arena.let_go_of_gradients()
            row, ok = self._single_pass(parts) if self._is_alone(parts) else self._passes_of(parts, check)
            if check is not None and self.place is None:
                check.compare(row[0], row[1], row[2] * (row[1] * row[5] * self.unit))
        self.check, self.compiler.stepped, self.compiled_s = None, True, self.compiler.seconds
        return self._passed(row, ok)

    def _run_again(self, window: Sequence[Any]) -> Tensor | None:
        """A step by the graph of the last one; None, and nothing done, where that would be another."""
        state, due = self.state, due_of(self.flats, self.state.step)
        known = self.repeated.fitting(window[0], due) if len(window) == 1 and not state.limit.most else None
        if known is None:
            return None
        state.timetable.turn(state.applied, state.step)
        if known.draws or self.streams is not None:
            self._seed(0, 0, window[0])
            self.unseeded = None
        else:
            self.unseeded = state.step
        return self._passed(*self._moved(known.again, window[0], due))

    def _passed(self, row: Tensor, ok: Tensor) -> Tensor:
        """What the host notes of a step that is done."""
        state = self.state
        if state.device.is_host:
            self.rows[state.step % RING][0].copy_(row)
        else:  # to copy into a row would be another program for each
            with torch.no_grad():
                self.at.fill_(state.step % RING)
                self.ring.index_copy_(0, self.at, row[None])
        state.step += 1
        if state.window is not None:
            state.window.keep(state.step, ok)
        if state.watch is not None and state.watch.spikes is not None:
            state.watch.spikes.turn(state.step)
        for arena in state.arenas:
            arena.left_clear()
        state.updating = False
        return row

    def _is_alone(self, parts: Sequence[Any]) -> bool:
        return self.place is None and len(parts) == 1

    def _single_pass(self, parts: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """A window of one micro-batch; what ran for it is noted where it may be run again."""
        batch, due = parts[0], due_of(self.flats, self.state.step)
        self._seed(0, 0, batch)
        if not self.compiler.noting:
            return self._moved(self._graphs["single"], batch, due)
        before = [generator.get_state() for generator in self.generators]
        found = self._moved(self._graphs["single"], batch, due)
        draws = any(not torch.equal(was, now.get_state()) for was, now in zip(before, self.generators))
        self.repeated.learn(self.compiler.take(), batch, due, found, draws)
        return found

    def _passes_of(self, parts: Sequence[Any], check: FirstCheck | None) -> tuple[Tensor, Tensor]:
        """A window of several, or a rank's share of one."""
        self.sums.zero_()
        self.graph_statistics.clear()
        for arena in self.state.arenas:
            arena.clear_gradients()
        found: list[tuple[Tensor, Tensor]] = []

        def one(index: int, first: int, batch: Any, last: bool) -> int:
            num = self._seed(index, first, batch)
            self.undo.touched = True
            if last and self.place is None:
                found.append(self._moved(self._graphs["end"], batch, due_of(self.flats, self.state.step)))
            else:
                self._graphs["add"](batch)
            return num

        go_through(parts, one, self.state.limit, self.undo)
        if self.place is None:
            return found[0]
        if check is not None:
            check.compare(*self.sums, global_norm([flat.grads for flat in self.flats]))
        self._add_ranks(True)
        return self._moved(self._graphs["update"], due_of(self.flats, self.state.step))

    def _moved(self, graph: Callable[..., Any], *given: Any) -> tuple[Tensor, Tensor]:
        """What a graph with the update in it gives, for a batch where it has one, and what of the rule's work is due.

        Raises:
            OutOfMemoryError: where memory runs out in it: how far it has come cannot be told, and nothing can be taken back.
        """
        self.state.updating = True
        try:
            found: tuple[Tensor, Tensor] = graph(*given)
            return found
        except Exception as err:
            if not ran_out(err):
                raise
            failure = Failure.of(err, "a compiled step")
        raise in_update(failure, moved=True)

    # ------------------------------------------------------------------ what is traced

    def _pass(self, batch: Any) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        """(sums of losses and of weights, flat gradients, what batch normalization saw) of a micro-batch."""
        seen, buffers = self.graph_statistics.open()
        total, weight, grads = gradients(self.module, self.flats, buffers, batch, self._start)
        weight = torch.as_tensor(weight, dtype=self.sums.dtype, device=self.sums.device).reshape(1)
        return torch.cat([total.reshape(1).to(self.sums.dtype), weight]), grads, self.graph_statistics.close(seen)

    def _start(self, total: Tensor) -> Tensor:
        """As ``_backward_seed``, with nothing kept."""
        if self.state.scale is not None:
            return (self.state.scale.scale * self.unit).to(total.dtype).reshape(total.shape)
        return torch.full_like(total, self.unit)

    def _add(self, batch: Any) -> None:
        """A micro-batch joins what has been added up."""
        sums, grads, statistics = self._pass(batch)
        with torch.no_grad():
            for flat, grad in zip(self.flats, grads):
                flat.grads.add_(grad)
            self.sums.add_(sums)
            if statistics is not None:
                self.graph_statistics.sums.add_(statistics)

    def _end(self, batch: Any, due: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The last micro-batch of a window, and the update."""
        sums, grads, statistics = self._pass(batch)
        with torch.no_grad():
            whole = [flat.grads + grad for flat, grad in zip(self.flats, grads)]
            if statistics is not None:
                statistics = self.graph_statistics.sums + statistics
            found = self._applied(whole, self.sums + sums, statistics, due)
            for flat in self.flats:
                flat.grads.zero_()
        return found

    def _single(self, batch: Any, due: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A window of one micro-batch: nothing is added up anywhere."""
        sums, grads, statistics = self._pass(batch)
        with torch.no_grad():
            return self._applied(grads, sums, statistics, due)

    def _update(self, due: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The update by what all ranks have added up."""
        with torch.no_grad():
            statistics = self.graph_statistics.sums if self.graph_statistics.layers else None
            found = self._applied([flat.grads for flat in self.flats], self.sums, statistics, due)
            for flat in self.flats:
                flat.grads.zero_()
        return found

    def _applied(
        self, grads: Sequence[Tensor], sums: Tensor, statistics: Tensor | None, due: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Norm, check, clipping, update, statistics, the row and the counters: (row, whether it was applied)."""
        state, losses, weights = self.state, sums[0], sums[1]
        scale, now = self._scale(), state.timetable.cut()
        lr, share = now["lr"], now.get("share")
        mass = weights * (scale * self.unit)
        norm = global_norm(grads) / mass
        ok = torch.isfinite(norm + losses)
        if state.watch is not None:
            ok = state.watch.judge(ok, norm, losses, weights, scale)
        divisor = mass * self._excess_of(norm, now.get("clip", self.options.clip), ok)
        skipped = (~ok).to(torch.float32)
        update(self.flats, grads, lr=lr, t=state.t, divisor=divisor, skipped=skipped, share=share, moved=now, due=due)
        if statistics is not None:
            self.graph_statistics.moved(statistics, ok)
            self.graph_statistics.averaged(state.averaged_statistics, share, ok)
        told = [now[name] for name in state.timetable.told]
        told += [] if state.watch is None else [state.watch.told]
        values = [losses, weights, norm, skipped, lr, scale, state.applied, *told]
        row = torch.cat([value.reshape(-1).to(self.ring.dtype) for value in values])
        if state.timetable.feedback.pieces:
            state.timetable.feedback.hear("loss", losses / weights, state.applied, ok)
        state.applied.add_(ok)
        state.t.add_(ok)
        if state.watch is not None and state.watch.spikes is not None:
            state.watch.spikes.remember(ok)
        if state.scale is not None:
            state.scale.update(skipped, None if state.watch is None else state.watch.still)
        return row, ok

    @torch.no_grad()
    def _add_ranks(self, counted: bool) -> None:
        """As for ``Step``; what batch normalization has seen lies in one tensor here."""
        packed = torch.cat([self.sums, self.graph_statistics.sums]) if self.graph_statistics.layers else self.sums
        self.ranks.add([*(flat.grads for flat in self.flats), packed])
        if self.graph_statistics.layers:
            self.sums.copy_(packed[:2])
            self.graph_statistics.sums.copy_(packed[2:])
