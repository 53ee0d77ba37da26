"""Release of gradients: each parameter is updated in the backward pass, as soon as its gradient is there, which is then freed.

No buffer holds gradients, so that the largest few are all that is alive at once. The idea is LOMO's (Lv et al. 2023,
arXiv:2306.09782), for any rule that needs one parameter at a time. "one-pass": what must be known of all gradients together
(their norm) comes too late to be used. "two-pass": the same pass, with the same random streams, is run twice: the first
measures and keeps nothing, the second updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import ModelError, ParameterRow, Recipe, RecipeError
from thalweg.optim import Arena
from thalweg.optim.arena import Segment, numbers_of
from thalweg.optim.batch import Batch, laid_like
from thalweg.optim.eager import as_lain
from thalweg.optim.pieces import Turn
from thalweg.optim.program import due_now
from thalweg.precision import POLICIES
from thalweg.rules import RULES


@dataclass
class _Piece:
    """One parameter and how it is updated alone."""

    name: str
    p: nn.Parameter
    arena: Arena
    segment: Segment
    place: int
    batch: Batch
    turn: Turn


class Release:
    """Uses and frees the gradients of some arenas while backward passes run.

    Args:
        arenas: made with ``How(release=True)``.
        two_pass: whether a pass that measures comes before the one that updates.

    Cost: a call for each parameter in place of one for each segment; "two-pass": twice the forward and backward passes.
    """

    def __init__(self, arenas: Sequence[Arena], *, two_pass: bool) -> None:
        self.arenas, self.two_pass = arenas, two_pass
        self.pieces: list[_Piece] = []
        self.turns: list[Turn] = []
        for arena in arenas:
            for segment in arena.segments:
                turn = Turn(segment.program, segment.batch)
                self.turns.append(turn)
                for place, name in enumerate(segment.names):
                    p, batch = arena.places[name][1], arena.alone(segment, place)
                    self.pieces.append(_Piece(name, p, arena, segment, place, batch, turn))
        self._seen: set[int] = set()  # parameters whose gradient has come in this pass
        self._norms: list[Tensor] = []
        self._scalars: dict[int, dict[str, Any]] = {}  # of each segment
        self._due = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, a backward pass leaves nothing but ``norm``."""
        with self._hooks(lambda piece, g: self._norms.append(_norm(g))):
            yield

    def norm(self) -> Tensor:
        """Global norm of the gradients of the last pass, as they came; 0-dim."""
        if not self._norms:
            return torch.zeros((), device=self.arenas[0].device)
        wide = max((n.dtype for n in self._norms), key=lambda d: torch.finfo(d).bits)
        total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(wide) for n in self._norms]))
        return total

    @contextmanager
    def updating(self, numbers: Mapping[str, Any], *, due: int) -> Iterator[None]:
        """Inside, a backward pass updates the parameters; those without a gradient are updated behind it, with one of zero.

        Args:
            numbers: of the step, as for ``update``; "skipped" holds for all parameters. In one pass, a parameter whose own
                gradient is not finite is skipped besides.
            due: steps attempted before this one.
        """
        self._due, given = due, numbers_of(self.arenas[0].scalar_dtype, **numbers)
        for arena in self.arenas:
            for segment in arena.segments:
                self._scalars[id(segment)] = arena.scalars(segment, given)
        with self._hooks(self._update if self.two_pass else self._measure_and_update):
            yield
        for piece in self.pieces:
            if id(piece.p) not in self._seen:
                self._update(piece, torch.zeros_like(piece.p))
        for turn in self.turns:
            turn.end()
        for arena in self.arenas:
            arena.torn = False

    @contextmanager
    def _hooks(self, use: Callable[[_Piece, Tensor], None]) -> Iterator[None]:
        """Inside, ``use`` gets each gradient as it comes. The model has no hooks of ours outside."""
        self._seen.clear()
        self._norms.clear()
        handles = [p.p.register_post_accumulate_grad_hook(self._hook(p, use)) for p in self.pieces]
        try:
            yield
        finally:
            for handle, piece in zip(handles, self.pieces):
                handle.remove()
                piece.p.grad = None

    def _hook(self, piece: _Piece, use: Callable[[_Piece, Tensor], None]) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            g, p.grad = p.grad, None
            assert g is not None
            if id(piece.p) in self._seen:
                raise ModelError(
                    f"The gradient of '{piece.name}' came twice in one backward pass.",
                    "Where it came first it has been used and freed.",
                    "Use torch.utils.checkpoint with use_reentrant=False, or optimizer.release_gradients='off'.",
                )
            self._seen.add(id(piece.p))
            with torch.no_grad():
                use(piece, g.to_dense() if g.is_sparse else g)

        return hook

    def _measure_and_update(self, piece: _Piece, g: Tensor) -> None:
        norm = _norm(g)
        self._norms.append(norm)
        whole: Tensor = self._scalars[id(piece.segment)]["skipped"]
        self._update(piece, g, torch.maximum(whole, (~torch.isfinite(norm)).to(whole.dtype)))

    def _update(self, piece: _Piece, g: Tensor, skipped: Tensor | None = None) -> None:
        segment, batch = piece.segment, piece.batch
        if not g.numel():
            return
        scalars = self._scalars[id(segment)]
        if skipped is not None:
            scalars = {**scalars, "skipped": skipped}
        element = segment.program.reads == "element"
        batch.gs = [as_lain(g, piece.p)] if element else laid_like([g], batch.ps)
        extra = None
        if "noise" in segment.program.tensors:
            extra = {"noise": [piece.arena.noise(segment, piece.place, self._due)]}
        piece.arena.torn = True
        piece.turn.begin(batch)
        now = due_now(segment.program.rule, segment.program.options, self._due)
        segment.update.run(batch, scalars, due=now, extra=extra)
        piece.turn.note(batch, scalars["skipped"])
        batch.gs = []


def _norm(g: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
    return norm


def why_not_released(recipe: Recipe, passes: str, rows: Sequence[ParameterRow]) -> RecipeError | None:
    """What stands against ``optimizer.release_gradients`` being ``passes``, or None.

    Args:
        recipe: with its micro-batch settled.
        rows: the parameter table.
    """
    asked = f"optimizer.release_gradients='{passes}' is not possible"
    train, wanted = recipe.train, recipe.regularize
    if train.micro_batch not in (None, train.batch):
        return RecipeError(
            f"{asked} over several micro-batches.",
            f"train.batch={train.batch}, train.micro_batch={train.micro_batch}: a gradient is freed when it has been used, "
            "and cannot wait for the next.",
            f"Give train.micro_batch={train.batch}, or optimizer.release_gradients='off'.",
        )
    if wanted.sharpness:
        return RecipeError(
            f"{asked} with sharpness-aware minimization.",
            f"regularize.sharpness={wanted.sharpness:g} needs all gradients at once, to go to the neighbour.",
            "Give regularize.sharpness=0, or optimizer.release_gradients='off'.",
        )
    shared = sorted({row.rule for row in rows if RULES[row.rule].is_global})
    if shared:
        return RecipeError(
            f"{asked} with the rule {shared[0]}.",
            f"It estimates {', '.join(RULES[shared[0]].shared)} from all gradients at once, before any is used.",
            "Use a rule with a rate of its own for each parameter, such as adamw, or optimizer.release_gradients='off'.",
        )
    if passes == "two-pass":
        return None
    if recipe.guard.active:
        return RecipeError(
            f"{asked} with this guard.",
            f"guard.nonfinite='{recipe.guard.nonfinite}', guard.spike='{recipe.guard.spike}': a step that must not be applied is "
            "known after all of its gradients.",
            "Leave out the table guard, or give optimizer.release_gradients='two-pass'.",
        )
    late = {"train.clip": train.clip, "train.clip_history": train.clip_history}
    for path, value in late.items():
        if value:
            return RecipeError(
                f"{asked} with clipping.",
                f"{path}={value:g} needs the norm of all gradients before the first is used.",
                f"Give {path}=0, or optimizer.release_gradients='two-pass'.",
            )
    if recipe.precision != "auto" and POLICIES[recipe.precision].scaled:
        return RecipeError(
            f"{asked} with a loss scale.",
            f"precision='{recipe.precision}' skips a whole step where one gradient is not finite, which is known too late.",
            "Use precision='bf16', or optimizer.release_gradients='two-pass'.",
        )
    return None


def why_not_offloaded(recipe: Recipe, kind: str, rows: Sequence[ParameterRow]) -> RecipeError | None:
    """What stands against ``optimizer.offload`` on a device of this kind, or None."""
    if kind == "cpu":
        return RecipeError(
            "optimizer.offload=true moves nothing.",
            f"device='{recipe.device}': slots lie in the CPU's memory already.",
            "Give optimizer.offload=false; optimizer.slots='int8' takes a quarter of the bytes.",
        )
    shared = sorted({row.rule for row in rows if RULES[row.rule].is_global})
    if shared:
        return RecipeError(
            f"optimizer.offload=true is not possible with the rule {shared[0]}.",
            f"It estimates {', '.join(RULES[shared[0]].shared)} from all of its slots at once, before any is updated.",
            "Use a rule with a rate of its own for each parameter, such as adamw, or optimizer.offload=false.",
        )
    return None


def check_release(
    recipe: Recipe, kind: str, rows: Sequence[ParameterRow], tell: Callable[[str, Any, str], Any]
) -> None:
    """Refuse a release of gradients or an offload that cannot be, and say what they change.

    Args:
        recipe: with its micro-batch and precision settled.
        kind: of device.
        rows: the parameter table.
        tell: ``Decisions.take``.

    Raises:
        RecipeError: of ``why_not_released`` or ``why_not_offloaded``.
    """
    passes, path = recipe.optimizer.release_gradients or "off", "optimizer.release_gradients"
    against = why_not_released(recipe, passes, rows) if passes != "off" else None
    if against is None and recipe.optimizer.offload:
        against = why_not_offloaded(recipe, kind, rows)
    if against is not None:
        raise against
    if passes == "one-pass":
        tell(
            path,
            passes,
            "a tensor whose gradient is not finite stays as it is while others move; a step is skipped as a whole, and "
            "counted as skipped, where its loss is not finite",
        )
    elif passes == "two-pass":
        tell(path, passes, "each step runs its forward and backward pass twice, with the same random streams")


def check_window(window: Sequence[Any]) -> None:
    """A window whose gradients are released is one micro-batch.

    Raises:
        RecipeError: if it is more.
    """
    if len(window) != 1:
        raise RecipeError(
            "optimizer.release_gradients is not possible over several micro-batches.",
            f"This window has {len(window)}: a gradient is freed when it has been used, and cannot wait for the next.",
            "Give batches of at most train.micro_batch samples, or optimizer.release_gradients='off'.",
        )
