"""Promises that the engine keeps for every rule: parameters of every kind, skipping, saving, ways of running."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn

from thalweg.core import ModelError
from thalweg.testing import maths  # noqa: F401  its promises come first
from thalweg.testing.case import (
    F64,
    Case,
    _check_same,
    _check_states,
    _end_to_end,
    _fail,
    _given,
    _go,
    _normal,
    _parameters,
    _run,
    _state,
    _values,
    promise,
)
from thalweg.testing.reads import HostRead, no_reads

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
