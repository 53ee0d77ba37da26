"""The contract of update rules, for anyone's rule: the promises that ours keep, each a small function.

A promise that a rule cannot keep by design is not asked of it: its metadata says so (``Rule.still``, ``shared``, ``then``).
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.core import ModelError, RecipeError, ThalwegError
from thalweg.optim.batch import Batch, fold_of, new_part, views
from thalweg.optim.eager import eager
from thalweg.optim.face import RuleOptimizer, face_of
from thalweg.optim.program import Program, due_now
from thalweg.optim.shared import first_values, measure, settle
from thalweg.rules import RULES, Rule, Slot, make_rule

__all__ = ["PROMISES", "BrokenPromise", "Case", "HostRead", "Promise", "check_rule", "no_reads"]

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


def check_rule(
    rule: Rule | str | Callable[..., Any],
    *,
    options: Mapping[str, Any] | None = None,
    oracle: Oracle | None = None,
    slots: Sequence[str | Slot] | None = None,
) -> None:
    """Ask of a rule all that is asked of the rules of this library.

    Args:
        rule: a rule, its registered name, or a function of maths ``f(p, g, *slots, lr, t, **options) -> (change, *slots)``
            that works element by element; for one that reads more, give ``thalweg.rules.make_rule(f, reads="matrix")``.
        options: other values than the defaults.
        oracle: a transcription of the paper to agree with, ``oracle(ps, gs, *, lr, **options)`` on numpy arrays.
        slots: of a function; None: the names of its arguments after p and g, each a tensor of zeros like the parameter.

    Raises:
        BrokenPromise: naming the first promise that is broken, what was seen, and what to do.
        RecipeError: for options that the rule does not have, or a function that is no rule.

    >>> def heavy_ball(p, g, m, *, lr, t, momentum=0.9):
    ...     m = momentum * m + g
    ...     return -lr * m, m
    >>> check_rule(heavy_ball)

    >>> def hasty(p, g, m, *, lr, t):
    ...     return -lr * m.mul_(0.9).add_(g), m
    >>> check_rule(hasty)
    Traceback (most recent call last):
    thalweg.testing.BrokenPromise: hasty breaks a promise: what a rule is given it leaves as it was.
      The update has written into the slot 'm'.
      Write nothing in place: m = b*m + g, not m.mul_(b).add_(g).
    """
    case = Case(_rule_of(rule, slots), dict(options or {}), oracle)
    options, words = case.rule.options(case.options), dict.fromkeys(case.rule.needs)
    tensors = [None] * (2 + len(case.rule.slots_for(options)))
    try:
        inspect.signature(case.rule.update).bind(*tensors, **words)
    except TypeError as err:
        raise RecipeError(
            f"{case.rule.name} cannot be called as a rule is.",
            f"It gets {len(tensors)} tensors, then {', '.join(words)} and its options by keyword: {err}.",
            "Declare its slots in the order of its arguments.",
        ) from None
    for promise in PROMISES.values():
        if promise.applies(case):
            promise.check(case)


def _rule_of(rule: Rule | str | Callable[..., Any], slots: Sequence[str | Slot] | None) -> Rule:
    if isinstance(rule, str):
        return RULES[rule]
    if not isinstance(rule, Rule):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        words = [p for p in inspect.signature(rule).parameters.values() if p.kind in kinds]
        if len(words) < 2:
            raise RecipeError(
                f"{getattr(rule, '__name__', rule)} is no update rule.",
                f"It takes {len(words)} tensors, and a rule takes a parameter and its gradient first.",
                "Write it as f(p, g, *slots, lr, t, **options), all behind the slots by keyword.",
            )
        named = tuple(p.name for p in words[2:] if p.default is inspect.Parameter.empty)
        rule = make_rule(rule, slots=named if slots is None else tuple(slots))
    if rule.name in RULES and RULES[rule.name] is not rule:
        raise RecipeError(
            f"A rule called '{rule.name}' is registered already.", "Names are given once.", "Give yours another name."
        )
    return rule


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


# ---------------------------------------------------------------------- the function itself


@promise(
    "what a rule is given it leaves as it was.",
    "Write nothing in place: m = b*m + g, not m.mul_(b).add_(g).",
)
def inputs_are_left(case: Case) -> None:
    for names, inputs, call in _calls(case):
        before, versions = _values(inputs), [x._version for x in inputs]
        call()
        for name, x, old, version in zip(names, inputs, before, versions):
            if x._version != version or not torch.equal(x, old):
                _fail(f"The update has written into the {name}.")


@promise(
    "it gives the change of the parameter, then every slot, in the shapes and dtypes of what it was given.",
    "Return (change, *slots) in the order of the arguments; keep numbers as Python floats or 0-dim tensors.",
)
def results_fit(case: Case) -> None:
    for names, inputs, call in _calls(case):
        results, wanted = call(), [inputs[0], *inputs[2:]]
        if not isinstance(results, tuple) or len(results) != len(wanted):
            given = len(results) if isinstance(results, tuple) else type(results).__name__
            _fail(f"It gives {given}, and with {len(wanted) - 1} slots there are {len(wanted)} results.")
        for name, result, x in zip(["change", *names[2:]], results, wanted):
            if result.shape != x.shape or result.dtype != x.dtype:
                _fail(f"The {name} is {tuple(result.shape)}, {result.dtype}, not {tuple(x.shape)}, {x.dtype}.")


@promise(
    "no result shares memory with what it was given, but for a slot that is handed back as it is.",
    "Return a clone() of it.",
)
def results_are_their_own(case: Case) -> None:
    for names, inputs, call in _calls(case):
        for k, result in enumerate(call()):
            for j, (name, x) in enumerate(zip(names, inputs)):
                if j != k + 1 - (k == 0) and result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                    _fail(f"{['The change', *names[2:]][k]} lies in the memory of the {name}.")


@promise(
    "it agrees with the transcription that was given.",
    "Compare the formulas line by line.",
    lambda case: case.oracle is not None,
)
def agrees_with_its_oracle(case: Case) -> None:
    assert case.oracle is not None
    shapes = _SQUARES if case.rule.least_ndim == 2 else ((5,), (3, 4), (2, 4, 3), ())
    ps, gs, extra = _given(case, shapes, 20)
    more = {name: [_plain(step[name]) for step in extra] for name in case.program().tensors}
    wanted = case.oracle(_plain(ps), [_plain(step) for step in gs], lr=case.rule.lr, **more, **case.options)
    _check_same(_run(case, ps, gs, extra), [torch.as_tensor(x) for x in wanted], "After 20 updates", relative=1e-12)


# ---------------------------------------------------------------------- what moves, and what does not


@promise("gradients move every parameter.", "Check the sign and the size of the change.")
def gradients_move(case: Case) -> None:
    ps = _parameters()
    before = _values(ps)
    _go(case.optimizer(ps), ps, range(3))
    for i, (p, old) in enumerate(zip(ps, before)):
        if not p.isfinite().all() or torch.equal(p, old):
            _fail(f"After 3 updates parameter {i} is {'where it was' if torch.equal(p, old) else 'not finite'}.")


@promise(
    "a rate of 0 moves nothing, with decay or without.",
    "Multiply the whole change by lr; if an average goes on, say still=False.",
    lambda case: case.rule.still,
)
def no_rate_moves_nothing(case: Case) -> None:
    for dtype in (torch.float32, F64):
        for decay in (0.0, 0.3):
            ps = _parameters(dtype)
            before = _values(ps)
            _go(case.optimizer(ps, lr=0.0, weight_decay=decay), ps, range(4))
            _check_same(ps, before, f"lr=0, weight_decay={decay}")


@promise(
    "gradients of 0 move nothing, and leave what comes after them finite.",
    "Guard divisions: x/(root + eps) or clamp(min=...); if an average goes on, say still=False.",
    _still,
)
def no_gradient_moves_nothing(case: Case) -> None:
    for dtype in (torch.float32, F64):
        ps = _parameters(dtype)
        before, optimizer = _values(ps), case.optimizer(ps)
        _go(optimizer, ps, range(4), sign=0.0)
        _check_same(ps, before, "Four gradients of 0")
        _go(optimizer, ps, range(4, 8))
        if not all(p.isfinite().all() for p in ps):
            _fail("Gradients that follow four of 0 give parameters that are not finite.")


@promise(
    "decoupled decay alone is geometric.",
    "Leave decay out of the maths: the engine adds it.",
    lambda case: _still(case) and case.rule.then is None and not case.rule.anchored,
)
def decay_alone_is_geometric(case: Case) -> None:
    ps = _parameters()
    before, rule = _values(ps), case.rule
    options = rule.options(case.options)
    own = {name: float(value) for name, value in first_values(rule, options, ps[0].device, F64).items()}
    factors = [1 - 0.1 * 0.2 * (own[rule.rate] if rule.rate and p.ndim >= rule.least_ndim else 1) for p in ps]
    _go(case.optimizer(ps, lr=0.1, weight_decay=0.2, decay_form="decoupled"), ps, range(5), sign=0.0)
    _check_same(ps, [p * f**5 for p, f in zip(before, factors)], "Five updates with lr=0.1, decay 0.2", relative=1e-12)


@promise("gradients are left as they were.", "Write nothing in place.")
def gradients_are_left(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16, F64):
        ps = _parameters(dtype)
        optimizer = case.optimizer(ps, weight_decay=0.1, decay_form="coupled", clip=0.1)
        for step in range(4):
            if step == 2:
                optimizer = case.optimizer(ps)
            gs = [_normal(p.shape, 11, step, i, dtype=dtype) for i, p in enumerate(ps)]
            before = _values(gs)
            for p, g in zip(ps, gs):
                p.grad = g
            optimizer.step()
            if any(p.grad is not g for p, g in zip(ps, gs)):
                _fail("After an update p.grad is another tensor.")
            _check_same(gs, before, "Gradients after an update")


# ---------------------------------------------------------------------- two ways of saying the same


@promise("a rate that is a tensor acts as the number.", "Use lr as it comes; do not turn it into a Python number.")
def tensor_rate_is_a_number(case: Case) -> None:
    for dtype in (torch.float32, F64):
        number, tensor = 2.0**-7, torch.tensor(2.0**-7)
        ones, others = _parameters(dtype), _parameters(dtype)
        one, other = case.optimizer(ones, lr=number), case.optimizer(others, lr=tensor)
        _go(one, ones, range(3))
        _go(other, others, range(3))
        _check_same(others, ones, "lr as a 0-dim tensor and as a number")
        if float(tensor) != number:
            _fail("The tensor that was given as lr has been written into.")
        one.param_groups[0]["lr"] = number / 4
        tensor.fill_(number / 4)
        _go(one, ones, range(3, 5))
        _go(other, others, range(3, 5))
        _check_same(others, ones, "lr changed between updates, as a tensor and as a number")


@promise("to maximize is to minimise the negative.", "Use g as it comes: its sign is the engine's.")
def maximize_is_the_negative(case: Case) -> None:
    for form in ("coupled", "decoupled"):
        for dtype in (torch.float32, F64):
            ones, others = _parameters(dtype), _parameters(dtype)
            decay: dict[str, Any] = {"weight_decay": 0.1, "decay_form": form}
            _go(case.optimizer(ones, **decay), ones, range(4))
            _go(case.optimizer(others, maximize=True, **decay), others, range(4), sign=-1.0)
            _check_same(others, ones, f"maximize on negated gradients, decay {form}")


@promise("two groups are two optimizers.", "Keep no number of your own between calls, or say shared=.", _separate)
def groups_are_optimizers(case: Case) -> None:
    together, apart = _parameters(), _parameters()
    words = [{"lr": case.rule.lr}, {"lr": case.rule.lr / 2, "weight_decay": 0.1}]
    halves = (range(2), range(2, len(_SHAPES)))
    _go(
        case.optimizer([{"params": [together[i] for i in half], **w} for half, w in zip(halves, words)]),
        together,
        range(5),
    )
    for half, w in zip(halves, words):  # every parameter is there, so that each draws the same noise
        alone = case.optimizer(apart, **w)
        _go(alone, apart, range(5), without=[i for i in range(len(_SHAPES)) if i not in half])
    _check_same(together, apart, "Two groups against two optimizers")


@promise(
    "a parameter whose gradients come later begins its own bias correction.",
    "Take the number of the update from t, not from a count of your own.",
    _separate,
)
def late_parameters_begin_anew(case: Case) -> None:
    for dtype in (torch.float32, F64):
        ps, fresh = _parameters(dtype), _parameters(dtype)
        late, others = [0, 1], [2, 3]
        optimizer = case.optimizer(ps)
        _go(optimizer, ps, range(3), without=late)
        _go(optimizer, ps, range(4, 8))
        _go(case.optimizer(fresh), fresh, range(4, 8), without=others)
        _check_same(
            [ps[i] for i in late], [fresh[i] for i in late], "Unfrozen after 3 updates, against a new optimizer"
        )


# ---------------------------------------------------------------------- parameters of every kind


@promise("complex parameters are refused.", "Nothing: the engine refuses them.")
def complex_is_refused(case: Case) -> None:
    try:
        case.optimizer([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    except ModelError:
        return
    _fail("A complex parameter was taken.")


@promise("sparse gradients are refused before anything has moved.", "Nothing: the engine refuses them.")
def sparse_is_refused(case: Case) -> None:
    ps, fresh = _parameters(), _parameters()
    before = _values(ps)
    optimizer = case.optimizer([{"params": ps[:2]}, {"params": ps[2:]}])
    for p in ps:
        p.grad = torch.ones_like(p)
    ps[-1].grad = torch.ones(4, 6, dtype=F64).to_sparse()
    try:
        optimizer.step()
    except ModelError:
        _check_same(ps, before, "A refused update")
    else:
        _fail("A sparse gradient was taken.")
    _go(optimizer, ps, range(3))
    _go(case.optimizer([{"params": fresh[:2]}, {"params": fresh[2:]}]), fresh, range(3))
    _check_same(ps, fresh, "Updates after a refused one")


@promise("numbers and empty parameters train like others.", "Do not index, and guard divisions by numel().")
def numbers_and_empty_ones_work(case: Case) -> None:
    for dtype in (torch.float32, F64):
        ps, others = _parameters(dtype, ((), (4, 6), (0, 3), (0,), (2, 0, 3))), _parameters(dtype, ((1,), (4, 6)))
        for mine in (ps, others):
            optimizer = case.optimizer(mine, weight_decay=0.1)
            for step in range(4):
                for i, p in enumerate(mine):
                    p.grad = _normal((1,) if i == 0 else p.shape, 11, step, i, dtype=dtype).reshape(p.shape)
                optimizer.step()
        _check_same([ps[0].reshape(1), ps[1]], others, "A 0-dim parameter against one of shape (1,), beside empty ones")


@promise("how a parameter or its gradient lies in memory does not matter.", "Use reshape, not view; do not flatten.")
def layouts_do_not_matter(case: Case) -> None:
    dtypes = (torch.float32, F64) if case.program().reads == "element" else (F64,)
    for dtype in dtypes:
        plain = _parameters(dtype, ((4, 6), (4, 6), (4, 3, 2, 2), (4, 6)))
        gaps, turned = torch.zeros(4, 12, dtype=dtype)[:, ::2], torch.zeros(6, 4, dtype=dtype).t()
        last = torch.zeros(4, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)
        odd = [nn.Parameter(x) for x in (gaps, turned, last, torch.zeros(4, 6, dtype=dtype))]
        with torch.no_grad():
            for p, q in zip(odd, plain):
                p.copy_(q)
        one, other = case.optimizer(plain, weight_decay=0.1), case.optimizer(odd, weight_decay=0.1)
        for step in range(4):
            _go(one, plain, [step])
            for p, q in zip(odd, plain):
                g = q.grad
                assert g is not None
                p.grad = g if step % 2 else g.transpose(0, 1).contiguous().transpose(0, 1)
            if "curvature" in case.rule.needs and step % 2 == 0:
                other.estimate_curvature(4.0)
            other.step()
        _check_same(odd, plain, "Strided, transposed and channels-last", relative=1e-10 if dtype == F64 else 1e-5)


@promise("frozen parameters are left alone and cost nothing; tied ones count once.", "Nothing: the engine sees to it.")
def frozen_and_tied_ones_work(case: Case) -> None:
    ps = _parameters()
    ps[1].requires_grad_(False)
    before, optimizer = _values(ps), case.optimizer(ps)
    _go(optimizer, ps, range(3), without=[0, 1])
    _check_same(ps[:2], before[:2], "Parameters without gradients")
    if optimizer.state.get(ps[0]) or optimizer.state.get(ps[1]):
        _fail("A parameter without gradients has slots.")
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    tied = second.weight = first.weight
    alone = nn.Parameter(tied.detach().clone())
    one, other = case.optimizer(list(nn.ModuleList([first, second]).parameters())), case.optimizer([alone])
    for step in range(3):
        x = _normal((3, 4), 23, step, dtype=torch.float32)
        for optimizer, a, b in ((one, first.weight, second.weight), (other, alone, alone)):
            optimizer.zero_grad()
            (x @ a.t() @ b.t()).square().sum().backward()
            optimizer.step()
    _check_same([tied], [alone], "A weight in two layers, against the same by hand")


@promise("parameters of several dtypes train side by side.", "Take dtypes from p; make no tensors of your own dtype.")
def dtypes_mix(case: Case) -> None:
    dtypes = (torch.float32, F64, torch.bfloat16)
    ps, apart = ([nn.Parameter(_normal((4, 6), 7, i, dtype=d)) for i, d in enumerate(dtypes)] for _ in range(2))
    before = _values(ps)
    _go(case.optimizer(ps, lr=max(case.rule.lr, 0.01)), ps, range(4))
    if any(p.dtype != d or not p.isfinite().all() for p, d in zip(ps, dtypes)):
        _fail("In one optimizer, float32, float64 and bfloat16 parameters are not all finite, in their own dtypes.")
    if torch.equal(ps[0], before[0]) or torch.equal(ps[1], before[1]):
        _fail("Beside others, a float32 or float64 parameter has not moved.")
    if not case.rule.is_global:
        for i in range(3):
            _go(
                case.optimizer(apart, lr=max(case.rule.lr, 0.01)),
                apart,
                range(4),
                without=[k for k in range(3) if k != i],
            )
        _check_same(ps, apart, "Dtypes in one optimizer, against one for each")


# ---------------------------------------------------------------------- skipping, saving, ways of running


@promise(
    "an infinite or undefined gradient changes nothing with skip_nonfinite=True: no weight, no slot, no count.",
    "Raise on no value: a linear algebra routine that does must be guarded (nan_to_num).",
)
def infinite_gradients_skip(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ps, plain = _parameters(dtype), _parameters(dtype)
        words: dict[str, Any] = {"skip_nonfinite": True, "average": 0.9, "weight_decay": 0.1}
        optimizer, other = case.optimizer(ps, **words), case.optimizer(plain, **words)
        _go(optimizer, ps, range(3))
        _go(other, plain, range(3))
        before, state = _values(ps), _state(optimizer)
        for bad in (float("inf"), float("nan")):
            for p in ps:
                p.grad = torch.ones_like(p)
            assert ps[0].grad is not None
            ps[0].grad[0, 1] = bad
            optimizer.step()
            _check_same(ps, before, f"After a gradient with {bad}")
            _check_states(_state(optimizer), state, f"After a gradient with {bad}")
        if case.rule.clock is None and not case.program().tensors:  # what is timed by tries goes its own way
            _go(optimizer, ps, range(3, 6))
            _go(other, plain, range(3, 6))
            _check_same(ps, plain, "Updates after a skipped one")


_NARROW: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.bfloat16, {"rounding": "kahan"}),
)


@promise(
    "saved and loaded, pickled or copied, it goes on to the bit, slots in their own dtype.",
    "Remember everything in slots, and nothing in closures or globals.",
)
def state_goes_on(case: Case) -> None:
    for dtype, words in _NARROW:
        ps = _parameters(dtype, ((4, 6), (5,), (4, 6)))
        optimizer = case.optimizer(ps, weight_decay=0.1, **words)
        _go(optimizer, ps, [0], without=[0])
        _go(optimizer, ps, [1], without=[2])  # parameters 0 and 2 now have counts of their own
        _go(optimizer, ps, [2])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twins = [nn.Parameter(p.detach().clone()) for p in ps]
        loaded = case.optimizer(twins, weight_decay=0.1, **words)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        found = {"state_dict": (twins, loaded)}
        found["a pickle"] = pickle.loads(pickle.dumps((ps, optimizer)))
        found["deepcopy"] = copy.deepcopy((ps, optimizer))
        state = _state(optimizer)
        for way, (_, other) in found.items():
            _check_states(_state(other), state, f"Through {way}, {dtype}")
        _go(optimizer, ps, range(3, 5))
        state = _state(optimizer)
        for way, (mine, other) in found.items():
            _go(other, mine, range(3, 5))
            _check_same(mine, ps, f"Through {way}, {dtype} {words.get('rounding', '')}")
            _check_states(_state(other), state, f"Through {way} and two updates on, {dtype}")


@promise(
    "tiles of a parameter, and all parameters laid end to end, give the same bits.",
    "If a result hangs on other elements than its own, say reads='row', 'tensor' or 'matrix'.",
    lambda case: case.program().reads == "element",
)
def tiles_and_flat_are_the_same(case: Case) -> None:
    shapes = ((700,), (20, 30), ())
    ps, gs, extra = _given(case, shapes, 4)
    whole = _run(case, ps, gs, extra, tile=0)
    _check_same(_run(case, ps, gs, extra, tile=256), whole, "In tiles of 256", relative=0)
    more = [{name: _end_to_end(xs) for name, xs in step.items()} for step in extra]
    flat = _run(case, _end_to_end(ps), [_end_to_end(step) for step in gs], more)
    _check_same(flat, _end_to_end(whole), "Laid end to end", relative=1e-12 if case.rule.is_global else 0)


@promise(
    "equal shapes in one batched call give the same bits.",
    "Reduce over the last two dimensions, not over all: leading ones are a batch of matrices.",
    lambda case: case.program().stacks,
)
def stacked_is_the_same(case: Case) -> None:
    shapes = tuple(
        s for s in ((4, 6), (4, 6), (6, 3), (2, 4, 3), (2, 4, 3), (4, 6), (5,), (5,)) if len(s) >= case.rule.least_ndim
    )
    ps, gs, extra = _given(case, shapes, 6)
    _check_same(_run(case, ps, gs, extra, stack=True), _run(case, ps, gs, extra), "Stacked by shape")


@promise(
    "no value is read back to Python during an update.",
    "Take no branch on a tensor: torch.where, clamp and maximum choose on the device.",
)
def nothing_is_read_back(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ps = _parameters(dtype)
        optimizer = case.optimizer(
            ps, lr=torch.tensor(0.01), skip_nonfinite=True, clip=1.0, average=0.9, weight_decay=0.1
        )
        try:
            with no_reads():
                _go(optimizer, ps, range(3))
        except HostRead as err:
            _fail(f"{err} was called.")


class HostRead(Exception):
    """A value was brought to the host."""


class _Refuse(TorchDispatchMode):
    names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for x in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if name in self.names or masked:  # a mask as an index hangs the shape on values
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads() -> Iterator[None]:
    """Within it, whatever brings a tensor's value to Python raises ``HostRead``."""
    names = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
    kept = {name: torch.Tensor.__dict__.get(name) for name in names}

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*_: Any, **__: Any) -> Any:
            raise HostRead(f"Tensor.{name}")

        return refuse

    for name in names:
        setattr(torch.Tensor, name, refusing(name))
    try:
        with _Refuse():
            yield
    finally:
        for name, old in kept.items():
            if old is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, old)
