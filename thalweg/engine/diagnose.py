"""Where a value that is not finite came from: which samples, and the first module that made one from finite inputs.

The window of the step is gone through again, on the weights as they are. Everything is left as it was: buffers, generators,
modes, gradients. A diagnosis that fails says so, and ends no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import Feed
from thalweg.data import batch_size, micro_batches, split, tensors
from thalweg.device.kept import restored, same_generators, same_modes
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.portions import uncuttable
from thalweg.engine.preflight import as_written
from thalweg.engine.step import Step
from thalweg.optim import named_trainable, plain_name

_MOST_PASSES = 64  # over parts of a window, to find the samples


@dataclass(frozen=True)
class Finding:
    """What a diagnosis found.

    Attributes:
        samples: numbers of the samples concerned; None where they have none.
        module: the name of the first module that made a value that is not finite; "the model" for the whole, "the data",
            "the loss", or "".
        how: the rest of the sentence on it.
    """

    samples: list[int] | None
    module: str
    how: str

    def __str__(self) -> str:
        shown = []
        if self.samples is not None and self.samples:
            few = ", ".join(map(str, self.samples[:8])) + (" and others" if len(self.samples) > 8 else "")
            shown.append(f"{'Sample' if len(self.samples) == 1 else f'{len(self.samples)} samples:'} {few}.")
        if self.how:
            shown.append(self.how)
        return " ".join(shown)


def diagnose(step: Step, feed: Feed, at: int) -> Finding:
    """Look into step ``at`` (from 1), whose loss or gradient was not finite. Never raises for what goes wrong on the way."""
    samples: list[int] | None = None
    try:
        samples = feed.samples(at - 1)
        if samples is None:
            return Finding(None, "", "Its data is a stream, which is not read twice, so nobody has looked into it.")
        with as_it_was(step, at):
            return _looked_into(step, feed, at, samples)
    except Exception as err:  # whatever it is: the run goes on without a diagnosis
        return Finding(samples, "", f"Looking into it failed: {type(err).__name__}: {err}"[:300])


@contextmanager
def as_it_was(step: Step, at: int) -> Iterator[None]:
    """Inside, the step's number is that of step ``at``; afterwards all that passes move is as it was."""
    state = step.state
    now, state.step = state.step, at - 1
    try:
        with (
            restored(list(state.model.buffers())),
            same_generators(state.device),
            same_modes(state.model),
            as_written(),
        ):
            yield
    finally:
        state.step = now


def _looked_into(step: Step, feed: Feed, at: int, samples: list[int]) -> Finding:
    window = next(iter(feed.windows(at - 1, at)))
    whole, samples = samples, _own(step, samples)
    if rows := _rows_not_finite(window):
        return Finding([samples[i] for i in rows], "the data", "What is not finite is in the data.")
    found, first = _Origin(step.state.model), 0
    with found.watching():
        for index, batch in enumerate(window):
            first += _pass(step, index, first, batch, found)
            if found.module:
                break
    if not found.module:
        return Finding(whole, "", _nothing_found(step))
    rows = _rows_alone(step, window)
    return Finding([samples[i] for i in rows] if rows else samples, found.module, found.sentence())


def _own(step: Step, samples: list[int]) -> list[int]:
    """Those samples of a window that this process goes through, in order: all, or its rank's share."""
    place = step.place
    if place is None:
        return samples
    starts = micro_batches(len(samples), place.micro_batch, (place.rank, place.world))
    return [sample for start in starts for sample in samples[start : start + place.micro_batch]]


def _nothing_found(step: Step) -> str:
    found = "Gone through again, everything is finite at the weights as they are now."
    if step.place is None:
        return found
    return f"Only the share of rank {step.place.rank} of {step.place.world} was looked into. {found}"


def _rows_not_finite(window: list[Any]) -> list[int]:
    """Places in the window of samples that hold NaN or infinity; a tensor that does in every sample, as a mask, is passed over."""
    rows, first = set(), 0
    for batch in window:
        num = batch_size(batch)
        for _, tensor in tensors(batch):
            if tensor.is_floating_point() and tensor.ndim and len(tensor) == num:
                bad = (~tensor.isfinite()).reshape(num, -1).any(1)
                if num == 1 or not bool(bad.all()):
                    rows |= {first + int(i) for i in bad.nonzero().flatten()}
        first += num
    return sorted(rows)


def _pass(step: Step, index: int, first: int, batch: Any, found: _Origin) -> int:
    """One forward and, where that was finite, backward pass of a micro-batch; how many samples it has."""
    step._seed(index, first, batch)
    grads = _gradients(step, batch, found.forward_over)
    if grads is not None:
        found.backward_over(dict(zip((name for name, _ in named_trainable(step.state.model)), grads)))
    return batch_size(batch)


def _gradients(step: Step, batch: Any, over: Callable[[Tensor], bool]) -> tuple[Tensor | None, ...] | None:
    """The gradients; None where ``over``, told the sum of losses, has heard enough."""
    params = [p for _, p in named_trainable(step.state.model)]
    with step.policy.around(step.state.device):
        with step.policy.forward(step.state.device):
            total, _ = sum_and_weight(step.loss(step.state.model, batch), batch)
        if over(total):
            return None
        return torch.autograd.grad(total, params, step._backward_seed(total), allow_unused=True)


def _rows_alone(step: Step, window: list[Any]) -> list[int]:
    """Places in the window of samples that are not finite by themselves, in evaluation mode; empty where none is found."""
    step.state.model.eval()
    budget = [_MOST_PASSES]

    def bad(batch: Any) -> bool:
        budget[0] -= 1
        grads = _gradients(step, batch, lambda total: not bool(total.isfinite().all()))
        return grads is None or not all(bool(g.isfinite().all()) for g in grads if g is not None)

    def within(batch: Any, first: int) -> Iterator[int]:
        num = batch_size(batch)
        if budget[0] <= 0 or not bad(batch):
            return
        if num == 1 or uncuttable(batch):
            yield from range(first, first + num)
            return
        for part in split(batch, -(-num // 2)):
            yield from within(part, first)
            first += batch_size(part)

    rows, first = [], 0
    for batch in window:
        rows += list(within(batch, first))
        first += batch_size(batch)
    return rows if budget[0] > 0 else []


class _Origin:
    """Watches one pass of a model for the first value that is not finite.

    Attributes:
        module: what made it; "" while nothing has.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): plain_name(name) for name, module in model.named_modules()}
        self.module, self.forward = "", True
        self._order: dict[str, int] = {}  # module to its place in the forward pass
        self._seen: list[tuple[str, str]] = []  # (role, module) of the first gradient that is not finite
        self._at: Tensor | None = None  # the tensor that it is of

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for module in self.model.modules():
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward_over(self, total: Tensor) -> bool:
        """The loss is there; whether the origin is known."""
        if not self.module and not bool(total.isfinite().all()):
            self.module = "the loss"
        return bool(self.module)

    def backward_over(self, grads: dict[str, Tensor | None]) -> None:
        """All gradients are there."""
        bad = [plain_name(n).rpartition(".")[0] for n, g in grads.items() if g is not None and not _finite(g)]
        origin = self._of_gradient()
        if bad and origin != "the loss":  # the last in the forward pass is the first in the backward pass
            origin = max(bad if origin is None else [origin, *bad], key=lambda name: self._order.get(name, -1))
        if origin is not None:
            self.module, self.forward = origin or "the model", False

    def sentence(self) -> str:
        which = "forward" if self.forward else "backward"
        where = self.module if self.module in ("the loss", "the model") else f"'{self.module}'"
        return f"The first value that is not finite came from {where}, in the {which} pass."

    def _before(self, module: nn.Module, inputs: Any, named: Any) -> None:
        name = self.names[id(module)]
        self._order.setdefault(name, len(self._order))
        self._listen("input", name, (inputs, named))

    def _after(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        name = self.names[id(module)]
        if not self.module and not _all_finite(output) and _all_finite((inputs, named)):
            self.module = name or "the model"
        self._listen("output", name, output)

    def _listen(self, role: str, name: str, tree: Any) -> None:
        for _, tensor in tensors(tree):
            if tensor.requires_grad and tensor.is_floating_point():

                def heard(grad: Tensor, tensor: Tensor = tensor) -> None:
                    if (self._at is None and not _finite(grad)) or self._at is tensor:
                        self._at = tensor
                        self._seen.append((role, name))

                tensor.register_hook(heard)

    def _of_gradient(self) -> str | None:
        """Whose backward pass made the first gradient that is not finite: the innermost module that took that tensor in."""
        takers = [name for role, name in self._seen if role == "input"]
        if takers:
            return takers[-1]
        makers = [name for role, name in self._seen if role == "output"]
        if not makers:
            return None
        return "the loss" if "" in makers else makers[-1].rpartition(".")[0]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _all_finite(tree: Any) -> bool:
    return all(_finite(t) for _, t in tensors(tree) if t.is_floating_point())
