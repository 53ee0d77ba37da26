"""A rule with its options, what the checks run on it, and the table of promises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from thalweg.core import ThalwegError
from thalweg.optim.batch import Batch, fold_of, new_part, views
from thalweg.optim.eager import eager
from thalweg.optim.face import face_of
from thalweg.optim.optimizer import RuleOptimizer
from thalweg.optim.program import Program, due_now
from thalweg.optim.shared import first_values, measure, settle
from thalweg.rules import Rule

#: ``oracle(ps, gs, *, lr, **options) -> ps``: float64 numpy arrays, gradients as ``gs[step][parameter]``; where the rule
#: needs them also ``noise=`` and ``curvature=``, in the form of ``gs``.
Oracle = Callable[..., Sequence[Any]]

_SHAPES = ((4, 6), (5,), (2, 4, 3), (4, 6))
_SQUARES = ((6, 6), (6, 6), (3, 4, 4))
F64 = torch.float64


class BrokenPromise(ThalwegError, AssertionError):
    """An update rule that does not do what the engine and its users rely on."""


@dataclass(frozen=True)
class Case:
    """A rule with the options that it is tried with."""

    rule: Rule
    options: Mapping[str, Any] = field(default_factory=dict)
    oracle: Oracle | None = None

    def program(self, dtype: torch.dtype = F64) -> Program:
        return Program(self.rule, self.rule.options(self.options), dtype=dtype)

    def optimizer(self, params: Sequence[Tensor] | Sequence[dict[str, Any]], **words: Any) -> RuleOptimizer:
        """The rule's face over parameters or groups."""
        groups = [p if isinstance(p, dict) else {"params": [p]} for p in params]
        if not any(isinstance(p, dict) for p in params):
            groups = [{"params": list(params)}]
        return face_of(self.rule)([{**self.options, **group} for group in groups], **{"lr": self.rule.lr, **words})

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that the rule itself takes, and no other for it."""
        return tuple(shape for shape in _SHAPES if len(shape) >= self.rule.least_ndim)


@dataclass(frozen=True)
class Promise:
    """What is promised, how it is kept, whom it is asked of, and the check itself."""

    says: str
    remedy: str
    applies: Callable[[Case], bool]
    check: Callable[[Case], None]


#: Every promise by name.
PROMISES: dict[str, Promise] = {}


def promise(
    says: str, remedy: str, applies: Callable[[Case], bool] = lambda case: True
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Add a check to the contract; what it raises names the promise."""

    def add(check: Callable[[Case], None]) -> Callable[[Case], None]:
        def run(case: Case) -> None:
            try:
                check(case)
            except _Seen as seen:
                said = f"{case.rule.name} breaks a promise: {says}"
                raise BrokenPromise(said, str(seen), remedy) from None

        PROMISES[check.__name__] = Promise(says, remedy, applies, run)
        return check

    return add


class _Seen(Exception):
    """What a check has seen that should not be."""


def _fail(text: str) -> NoReturn:
    raise _Seen(text)


def _separate(case: Case) -> bool:
    return not case.rule.is_global


def _still(case: Case) -> bool:
    return case.rule.still and not case.rule.options(case.options).get("inner_decay")


# ---------------------------------------------------------------------- what the checks run


def _normal(shape: Sequence[int], *key: int, dtype: torch.dtype = F64) -> Tensor:
    """Normal numbers named by ``key``: the same on every machine, whoever else draws."""
    seed = 0
    for part in key:
        seed = seed * 1009 + part + 1
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def _parameters(dtype: torch.dtype = F64, shapes: Sequence[Sequence[int]] = _SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(_normal(shape, 7, i, dtype=dtype)) for i, shape in enumerate(shapes)]


def _go(
    optimizer: RuleOptimizer,
    ps: Sequence[Tensor],
    steps: Sequence[int],
    *,
    sign: float = 1.0,
    without: Sequence[int] = (),
) -> None:
    """Updates with the gradients of ``steps``, which are named by step and place; none for the places ``without``."""
    for step in steps:
        for i, p in enumerate(ps):
            p.grad = None if i in without else sign * _normal(p.shape, 11, step, i, dtype=p.dtype)
        if "curvature" in optimizer.rule.needs and step % 2 == 0:
            optimizer.estimate_curvature(4.0)
        optimizer.step()


def _plain(xs: Sequence[Tensor]) -> list[Any]:
    return [x.numpy().copy() for x in xs]


def _end_to_end(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([x.reshape(-1) for x in xs])]


def _values(ps: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in ps]


def _state(optimizer: RuleOptimizer) -> dict[str, Any]:
    """A copy of every slot and count, by "parameter/name"; not of the count of tries, which skipped updates move too."""
    held = copy.deepcopy(optimizer.state_dict()["state"])
    return {f"{i}/{name}": value for i, mine in held.items() for name, value in mine.items() if name != "tries"}


def _check_same(got: Sequence[Tensor], wanted: Sequence[Tensor], what: str, relative: float = 0.0) -> None:
    """Equal to the bit, or within ``relative`` of the largest element."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        a, b = a.detach(), b.detach()
        if relative and a.shape == b.shape and a.numel() and a.isfinite().all():
            same = float((a - b).abs().max()) <= relative * max(1.0, float(b.abs().max()))
        else:
            same = a.dtype == b.dtype and torch.equal(a, b)
        if not same:
            gap = float((a.double() - b.double()).abs().max()) if a.shape == b.shape and a.numel() else float("nan")
            _fail(f"{what}: parameter {i} of shape {tuple(b.shape)}, {b.dtype}, is off by up to {gap:.2g}.")


def _check_states(got: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    if set(got) != set(wanted):
        _fail(f"{what}: the state has {sorted(set(got) ^ set(wanted))} on one side alone.")
    for name, value in wanted.items():
        other = got[name]
        same = torch.equal(other, value) and other.dtype == value.dtype if isinstance(value, Tensor) else other == value
        if not same:
            _fail(
                f"{what}: '{name}' of the state differs, {getattr(other, 'dtype', other)} and {getattr(value, 'dtype', value)}."
            )


def _run(
    case: Case,
    ps: Sequence[Tensor],
    gs: Sequence[Sequence[Tensor]],
    extra: Sequence[Mapping[str, Sequence[Tensor]]],
    *,
    tile: int = 1 << 16,
    stack: bool = False,
) -> list[Tensor]:
    """The parameters after the program itself has run, without a face.

    Args:
        extra: for each step, what the rule needs shaped like the gradients.
    """
    program, rule = case.program(ps[0].dtype), case.rule
    options, folds, ps = program.options, [fold_of(p.shape) for p in ps], _values(ps)
    slots = [
        [new_part(program, part, p, fold) for p, fold in list(zip(ps, folds))[: 1 if part.shape == "uniform" else None]]
        for part in program.parts
    ]
    kernel = eager(program, tile=tile, stack=stack)
    shared = first_values(rule, options, ps[0].device, F64)
    for t, mine in enumerate(gs, start=1):
        batch = Batch(ps, _values(mine), slots, folds)
        numbers = {"lr": rule.lr, "t": float(t)}
        scalars = {name: torch.tensor(value, dtype=F64) for name, value in numbers.items()} | shared
        if rule.shared:
            shared = {**shared, **settle(program, measure(program, batch, scalars), shared, scalars)}
            scalars |= shared
        kernel(batch, scalars, due=due_now(rule, options, t - 1), extra=extra[t - 1])
    return ps


def _given(
    case: Case, shapes: Sequence[Sequence[int]], steps: int
) -> tuple[list[Tensor], list[list[Tensor]], list[dict[str, list[Tensor]]]]:
    """(parameters, gradients of each step, what else the program needs at each step)."""

    def draw(step: int, salt: int) -> list[Tensor]:
        return [_normal(shape, salt, step, i) for i, shape in enumerate(shapes)]

    drawn = {"noise": lambda step: draw(step, 17), "curvature": lambda step: [x.square() for x in draw(step, 19)]}
    extra = [{name: drawn[name](step) for name in case.program().tensors} for step in range(steps)]
    return draw(0, 7), [draw(step, 13) for step in range(steps)], extra


def _calls(case: Case) -> Iterator[tuple[list[str], list[Tensor], Callable[[], Any]]]:
    """Bare calls of the rule, as the engine makes them: (names of the inputs, inputs, call)."""
    rule = case.rule
    for dtype in (torch.float32, F64):
        program = case.program(dtype)
        piece = next(piece for piece in program.pieces if piece.component is rule)
        names = ["parameter", "gradient", *(f"slot '{slot.name}'" for slot in rule.slots_for(program.options))]
        for k, shape in enumerate(case.shapes()):
            p, g, fold = _normal(shape, 7, k, dtype=dtype), _normal(shape, 13, k, dtype=dtype), fold_of(shape)
            slots = [[new_part(program, part, p, fold)] for part in program.parts]
            p, g, stored = views(program, Batch([p], [g], slots, [fold]), 0)
            known: dict[str, Any] = {"lr": torch.tensor(rule.lr, dtype=F64), "t": torch.tensor(3.0, dtype=F64)}
            known |= {"fresh": False, "noise": _normal(p.shape, 17, dtype=dtype), "curvature": g.square()}
            known |= {"ndim": len(shape), **first_values(rule, program.options, p.device, F64)}
            mine = stored[piece.first : piece.first + piece.num]
            for due in (True, False) if "due" in rule.needs else (False,):
                words = {name: {**known, "due": due}[name] for name in rule.needs}
                call = partial(rule.update, p, g, *mine, **words, **piece.options)
                yield names, [p, g, *mine], call
                mine = [x.clone() for x in call()[1:]]  # a second call finds slots that are not as they began
