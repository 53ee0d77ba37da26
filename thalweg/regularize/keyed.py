"""A layer that gets its random bits from keys: those that a ``Streams`` wrote, or one that torch's generator draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

from thalweg.core import ModelError
from thalweg.device.counters import element_bits, hashed
from thalweg.regularize.moments import recomputing

_LOW, _HIGH = -(2**31), 2**31

_calls_of_trace: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


def _call_in_trace(keys: Tensor) -> int:
    """How often torch.compile has met the layer with these keys before, in this trace.

    Run while tracing, its result stands in the trace as a constant: a compiled layer keeps no count, so that nothing has to
    be compiled again, and a block that is recomputed gets the numbers that it had.
    """
    calls = _calls_of_trace.setdefault(TracingContext.try_get(), {})
    call = calls.get(keys.data_ptr(), 0)
    calls[keys.data_ptr()] = call + 1
    return call


_call_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Keyed(nn.Module):
    """A layer whose random bits come from a ``Streams``; without one, from a key that torch's global generator draws.

    It adds nothing to state dicts. A copy (deepcopy, pickle) is on its own: without ``Streams`` and without ``factor``,
    both of which belong to a run.
    """

    #: The name under which ``set_factors`` finds it.
    rate: ClassVar[str] = "dropout"
    factor: Tensor | None
    _rows: Tensor | None  # (num, 1), int32: a key for each sample
    _fixed: Tensor | None  # (1, 1), int32: the key of the step
    _release: Callable[[], None] | None  # takes the layer back from its Streams
    _calls: int
    _again: int | None  # the call of the forward pass that is run again next, where it is known

    def __init__(self) -> None:
        super().__init__()
        self.factor = None
        self._leave()

    def _leave(self) -> None:
        self._rows = self._fixed = self._release = None
        self._calls = 0
        self._again = None
        self._by_sample = False
        self._name = ""

    def __getstate__(self) -> dict[str, Any]:
        alone = dict.fromkeys(("factor", "_rows", "_fixed", "_release", "_again"))
        return {**self.__dict__, **alone, "_calls": 0, "_by_sample": False, "_name": ""}

    def sample_bits(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Random bits of ``shape``, int32, for ``x``, keyed by sample; the first dimension is that of the samples.

        Raises:
            ModelError: if samples cannot be told apart; if a layer that is called more than once is recomputed.
        """
        rows = shape[0] if shape else 1
        if self._rows is None:
            return element_bits(_drawn(rows, x.device), _size(shape) // rows).view(shape)
        keys, num = self._rows, self._rows.shape[0]
        if not shape or rows % num:
            if self._by_sample:
                raise _no_samples(self._name, shape, num)
            keys = hashed(torch.arange(rows, dtype=torch.int32, device=keys.device).view(-1, 1), keys[:1], 5)
        keys = self._of_this_call(keys, self._rows)
        return element_bits(keys, _size(shape) // keys.shape[0]).view(shape)

    def step_bits(self, x: Tensor, shape: tuple[int, ...], *, by_call: bool) -> Tensor:
        """Random bits of ``shape``, int32, for ``x``, the same for all micro-batches of a step.

        Args:
            by_call: whether each call in a forward pass has its own.
        """
        if self._fixed is None:
            keys = _drawn(1, x.device)
        else:
            keys = self._of_this_call(self._fixed, self._fixed) if by_call else self._fixed
        return element_bits(keys, _size(shape)).view(shape)

    def _of_this_call(self, keys: Tensor, mine: Tensor) -> Tensor:
        """``keys`` for a layer's first call in a forward pass; others for its second and so on. ``mine``: its own tensor."""
        call = _call_in_trace(mine) if torch.compiler.is_compiling() else self._next_call()
        return hashed(keys, 0, 7 + call) if call else keys

    def _next_call(self) -> int:
        if not recomputing():
            self._calls += 1
            return self._calls - 1
        if self._again is not None:
            self._again += 1
            return self._again - 1
        if self._calls > 1:
            raise ModelError(
                f"The layer '{self._name}' is recomputed under activation checkpointing.",
                f"It is called {self._calls} times in a forward pass, and its calls cannot be told apart there.",
                "Give each call a layer of its own, or leave this part out of the checkpointing.",
            )
        return 0


@contextmanager
def replayed(layers: Sequence[Keyed], calls: Sequence[int]) -> Iterator[None]:
    """Inside, a backward pass runs a block again whose ``layers`` had been called so many times before it.

    A layer that is called more than once thus has the same numbers again; without this it is refused.
    """
    before = [layer._again for layer in layers]
    for layer, call in zip(layers, calls):
        layer.__dict__["_again"] = call  # past nn.Module's slow setter
    try:
        yield
    finally:
        for layer, call_before in zip(layers, before):
            layer.__dict__["_again"] = call_before


def _drawn(rows: int, device: torch.device) -> Tensor:
    return torch.randint(_LOW, _HIGH, (rows, 1), dtype=torch.int32, device=device)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _no_samples(name: str, shape: tuple[int, ...], num: int) -> ModelError:
    return ModelError(
        f"The layer '{name}' cannot tell the samples apart.",
        f"Its mask has shape {tuple(shape)}; the micro-batch has {num} samples.",
        "Put the samples first in what the layer is given, or key the masks by micro-batch (by_sample=False).",
    )
