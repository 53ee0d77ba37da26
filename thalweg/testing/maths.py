"""Promises of the function itself, and of what moves."""

from __future__ import annotations

from typing import Any

import torch

from thalweg.optim.shared import first_values
from thalweg.testing.case import (
    _SHAPES,
    _SQUARES,
    F64,
    Case,
    _calls,
    _check_same,
    _fail,
    _given,
    _go,
    _normal,
    _parameters,
    _plain,
    _run,
    _separate,
    _still,
    _values,
    promise,
)

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
