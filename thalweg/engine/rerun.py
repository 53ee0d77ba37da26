"""Running a block again in the backward pass, for what its first run did not keep.

Not torch.utils.checkpoint, which imports all of the compiler (torch._dynamo) at its first call. As there, autograd's graph is
that of the first run, so that gradients are the same to the bit: only what its nodes saved is thrown away, and made again when
the first of them asks. The second run ends at the last tensor that is wanted (early stop).

References: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198 (what is cheap to run again).
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.core import ModelError
from thalweg.device import Device
from thalweg.engine.products import is_product
from thalweg.regularize.keyed import Keyed, replayed


class _Done(BaseException):
    """All that is wanted has been made; no error, so that no ``except Exception`` of a model takes it for one."""


@dataclass(slots=True)
class _Input:
    """A tensor among the arguments, cut off from the graph."""

    tensor: Tensor
    version: int
    grows: bool

    @classmethod
    def of(cls, value: Any) -> Any:
        if isinstance(value, Tensor):
            return cls(value.detach(), value._version, value.requires_grad)
        return value


@dataclass(slots=True)
class _Last:
    """A tensor that autograd saved, and that is kept."""

    tensor: Tensor
    version: int
    nbytes: int


@dataclass(slots=True)
class _Kept:
    """What a product of matrices returned.

    Attributes:
        by: the operator.
        result: a tensor, or a tuple with tensors in it.
        versions: of the tensors, when they were made.
        before: tensors that had been saved for the backward pass by then.
    """

    by: Any
    result: Any
    versions: tuple[int, ...]
    before: int


class Run:
    """One run of a block, and its second one.

    What autograd saved last is kept after all, as far as it is together no larger than the block's inputs: the mask of a last
    dropout, the input of a last normalization. The second run then ends before the product that comes before them.

    Args:
        name: of the block, for messages.
        forward: the block's own.
        layers: its dropout layers with named streams.
        products: whether results of products of matrices are kept.

    Cost: besides the second run, about 3 us; with ``products`` about 3 us more for every operation.
    """

    def __init__(self, name: str, forward: Callable[..., Any], layers: Sequence[Keyed], products: bool) -> None:
        self.name, self.forward, self.layers = name, forward, layers
        self.kept: list[_Kept | None] | None = [] if products else None
        self.saved: list[tuple[torch.Size, torch.dtype]] = []  # what autograd saved, in order
        self.made: list[Tensor | None] | None = None  # the same, from the second run
        self.last: deque[_Last] = deque()  # of them, those that are kept
        self.room = self.taken = 0  # bytes that these may take, and that they take
        self.wanted = 0  # how many the second run makes
        self.whole = False  # whether the first run is over; a block may differentiate inside its forward pass
        self.again = False  # whether a second run is under way

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it; what autograd saves is not kept."""
        self.args, self.kwargs = _mapped(args, _Input.of), _mapped(kwargs, _Input.of)
        self.kinds = _kinds(args, kwargs)
        self.calls = [layer._calls for layer in self.layers]
        self.autocast = {kind: _autocast(kind) for kind in self.kinds}
        self.room = sum(one.tensor.nbytes for one in _inputs((self.args, self.kwargs)))
        self.states = [(g, g.get_state()) for g in self._generators(args, kwargs)]
        with saved_tensors_hooks(self._save, self._saved):
            if self.kept is None:
                result = self.forward(*args, **kwargs)
            else:
                with _Keep(self, self.kept):
                    result = self.forward(*args, **kwargs)
        self.states = [(g, state) for g, state in self.states if not _same(state, g.get_state())]
        self.made = None  # of a backward pass inside the forward pass
        while any(one.version != one.tensor._version for one in self.last):
            self.last.popleft()
        self.wanted = len(self.saved) - len(self.last)
        if self.kept is not None:
            self._let_go(self.kept)
        self.whole = True
        return result

    def _generators(self, args: Any, kwargs: Any) -> list[torch.Generator]:
        found = [torch.default_generator]
        devices: list[torch.device] = []

        def look(value: Any) -> None:
            if isinstance(value, Tensor) and value.device.type != "cpu" and value.device not in devices:
                devices.append(value.device)

        _mapped((args, kwargs), look)
        for device in devices:
            found += Device(device).generators()[1:]
        return found

    def _let_go(self, kept: list[_Kept | None]) -> None:
        """Of what was kept, forget what is not asked for: changed in place since, or made after all that autograd saved."""
        for place, one in enumerate(kept):
            if one is None or one.before >= self.wanted or one.versions != _versions(one.result):
                kept[place] = None
            else:
                one.result = _each(one.result, Tensor.detach)  # not the graph, which holds this run

    def _save(self, x: Tensor) -> int:
        self.saved.append((x.shape, x.dtype))
        self.wanted = len(self.saved)
        self._keep_last(x)
        return self.wanted - 1

    def _keep_last(self, x: Tensor) -> None:
        """Keep ``x``, and of what was saved before it what there is room for."""
        nbytes = 0 if isinstance(x if x._base is None else x._base, nn.Parameter) else x.nbytes
        if nbytes and _is_of_weights(x):  # with it the second run would end before the same product
            self.last.clear()
            self.taken = 0
            return
        self.last.append(_Last(x.detach(), x._version, nbytes))
        self.taken += nbytes
        while self.taken > self.room:
            self.taken -= self.last.popleft().nbytes

    def _saved(self, place: int) -> Tensor:
        if place >= self.wanted:
            return self._of_last(self.last[place - self.wanted])
        if self.made is None or place >= len(self.made) or self.made[place] is None:  # not yet, or used
            self._second()
        assert self.made is not None
        found, self.made[place] = self.made[place], None
        assert found is not None
        return found

    def _of_last(self, one: _Last) -> Tensor:
        if one.version != one.tensor._version:
            raise self._changed("What its backward pass needs", one.tensor)
        return one.tensor

    def _second(self) -> None:
        """Run it again as it ran before, up to the last tensor that autograd saved."""
        made: list[Tensor | None] = []

        def collect(x: Tensor) -> Tensor:
            x = x.detach() if x.requires_grad else x
            if (x.shape, x.dtype) != self.saved[len(made)]:
                raise self.differs(f"a tensor of {tuple(x.shape)}, {x.dtype}, where it was {self.saved[len(made)]}")
            made.append(x)
            if len(made) == self.wanted:
                raise _Done
            return x

        args, kwargs = _mapped(self.args, self._again), _mapped(self.kwargs, self._again)
        with ExitStack() as stack:
            stack.enter_context(_drawing(self.states))
            stack.enter_context(torch.enable_grad())
            for kind, before in self.autocast.items():
                if _autocast(kind) != before:
                    on, dtype, cached = before
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=cached))
            stack.enter_context(replayed(self.layers, self.calls))
            stack.enter_context(saved_tensors_hooks(collect, _as_it_is))
            if self.kept is not None and self.whole:
                stack.enter_context(_Replay(self, self.kept))
            with suppress(_Done):
                self.again = True
                self.forward(*args, **kwargs)
            self.again = False
        if len(made) < self.wanted:
            raise self.differs(f"{len(made)} tensors for the backward pass, where it saved {self.wanted} or more")
        self.made = made

    def _again(self, value: Any) -> Any:
        if not isinstance(value, _Input):
            return value
        if value.tensor._version != value.version:
            raise self._changed("Its input", value.tensor)
        return value.tensor.detach().requires_grad_(value.grows)

    def _changed(self, what: str, tensor: Tensor) -> ModelError:
        return ModelError(
            f"The block '{self.name}' cannot be computed again.",
            f"{what}, of shape {tuple(tensor.shape)}, was changed in place after it was used.",
            "Change a copy (x = x + y, not x += y), or set recompute='none'.",
        )

    def differs(self, how: str) -> ModelError:
        return ModelError(
            f"The block '{self.name}' did not compute the same again.",
            f"The second time it saved {how}.",
            "Its forward pass must not depend on what it changes itself, such as a cache or a count; or set recompute='none'.",
        )


class _Keep(TorchDispatchMode):
    """Notes the results of products of matrices."""

    def __init__(self, run: Run, kept: list[_Kept | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run, self.kept = run, kept

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # that would import it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_product(func, args, kwargs) and not self.run.again:
            self.kept.append(_Kept(func, result, _versions(result), len(self.run.saved)))
        return result


class _Replay(TorchDispatchMode):
    """Gives the results that were kept, in their order, and computes what was not."""

    def __init__(self, run: Run, kept: list[_Kept | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run, self.kept, self.place = run, kept, -1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_product(func, args, kwargs):
            self.place += 1
            one = self.kept[self.place] if self.place < len(self.kept) else None
            if one is not None and one.by is not func:
                raise self.run.differs(f"the result of {one.by}, where it asked for {func}")
            if one is not None and one.versions == _versions(one.result):
                self.kept[self.place] = None  # given once: the second run owns it now
                return one.result
        return func(*args, **(kwargs or {}))


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or the tensors in a tuple, changed."""
    if isinstance(result, Tensor):
        return change(result)
    return tuple(change(part) if isinstance(part, Tensor) else part for part in result)


def _versions(result: Any) -> tuple[int, ...]:
    parts = (result,) if isinstance(result, Tensor) else result
    return tuple(part._version for part in parts if isinstance(part, Tensor))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with each value in them changed; anything else is a value."""
    kind = type(value)
    if kind in (tuple, list):
        return kind([_mapped(part, change) for part in value])
    if kind is dict:
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_mapped(part, change) for part in value))
    return change(value)


def _inputs(value: Any) -> list[_Input]:
    found: list[_Input] = []
    _mapped(value, lambda one: found.append(one) if isinstance(one, _Input) else None)
    return found


def _is_of_weights(x: Tensor) -> bool:
    """Whether it was made from a parameter alone, such as a cast of it."""
    node: Any = x.grad_fn
    for _ in range(3):
        if node is None or len(node.next_functions) != 1:
            break
        node = node.next_functions[0][0]
    return hasattr(node, "variable")


def _kinds(args: Any, kwargs: Any) -> set[str]:
    """Kinds of device whose autocast may matter."""
    found = {"cpu"}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.add(value.device.type)

    _mapped((args, kwargs), look)
    return {kind for kind in found if torch.amp.is_autocast_available(kind)}


def _autocast(kind: str) -> tuple[bool, torch.dtype, bool]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two states of a generator are one: bytes of the host, read past torch's dispatch, which may know shapes alone."""
    return ctypes.string_at(a.data_ptr(), a.nbytes) == ctypes.string_at(b.data_ptr(), b.nbytes)


@contextmanager
def _drawing(states: list[tuple[torch.Generator, Tensor]]) -> Iterator[None]:
    """Inside, generators draw from where they stood; afterwards they are where they are now."""
    now = [(generator, generator.get_state()) for generator, _ in states]
    for generator, state in states:
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in now:
            generator.set_state(state)
