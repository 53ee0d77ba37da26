"""Every storage's birth and death in one forward and backward pass: what is alive when, and what is kept in between.

The pass runs once, on real tensors or on fake ones (shapes without memory), under a mode that sees every operation. From two
traces at different numbers of samples that make the same allocations in the same order, each allocation's size is a line in
the number of samples, so that the trace at any other number follows exactly.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.core import ModelError, ModuleBytes
from thalweg.data import batch_size, split, tensors, tree_map
from thalweg.device import Device
from thalweg.device.scratch import scratch_bytes
from thalweg.engine.backward import backward
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.preflight import ModelLoss, as_written, untouched
from thalweg.optim import named_trainable
from thalweg.precision import Policy


class CannotFake(ModelError):
    """The model or its loss looks at values, which fake tensors do not have."""


@dataclass(frozen=True)
class Block:
    """One allocation.

    Attributes:
        nbytes: of the storage, as torch asked for it.
        module: name of the innermost module in whose forward pass it was made, or whose activations a backward operation
            used; "" in none.
        backward: whether it was made in the backward pass.
        kept: whether it was alive when the forward pass was over.
    """

    nbytes: int
    module: str
    backward: bool
    kept: bool


@dataclass(frozen=True)
class Trace:
    """The allocations of one forward and backward pass, in order.

    Attributes:
        samples: of the micro-batch.
        inputs: bytes of the micro-batch itself, which are not among the blocks.
        blocks: every allocation, in the order of birth.
        events: births and deaths in order: k where block k was born, ~k where it died.
        flops: floating-point operations of the forward pass's products and convolutions.
    """

    samples: int
    inputs: int
    blocks: tuple[Block, ...]
    events: tuple[int, ...]
    flops: int = 0

    @property
    def kept(self) -> int:
        """Bytes alive when the forward pass is over: the activations."""
        return sum(block.nbytes for block in self.blocks if block.kept)

    @property
    def modules(self) -> tuple[ModuleBytes, ...]:
        """``kept`` by module, inner modules included, the largest first; "" is what belongs to none inside the model."""
        found: dict[str, int] = {}
        for block in self.blocks:
            if block.kept:
                parts = block.module.split(".") if block.module else []
                for name in [".".join(parts[: k + 1]) for k in range(len(parts))] or [""]:
                    found[name] = found.get(name, 0) + block.nbytes
        rows = sorted(found.items(), key=lambda row: (-row[1], row[0]))
        return tuple(ModuleBytes(name, nbytes) for name, nbytes in rows if nbytes)

    @property
    def peak(self) -> int:
        """The most bytes alive at once, beyond weights, gradients and the micro-batch."""
        return max((live for live, _ in self._alive()), default=0)

    def peak_of(self, counts: Callable[[int], bool]) -> int:
        """The most bytes alive at once in blocks whose size ``counts``."""
        sizes = [block.nbytes if counts(block.nbytes) else 0 for block in self.blocks]
        live = itertools.accumulate(sizes[event] if event >= 0 else -sizes[~event] for event in self.events)
        return max(live, default=0)

    @property
    def peak_at(self) -> str:
        """Where that is, for people."""
        best = max(self._alive(), default=None, key=lambda pair: pair[0])
        return "" if best is None else place_of(self.blocks[best[1]])

    def _alive(self) -> Iterator[tuple[int, int]]:
        """(bytes alive, newest block) after each birth."""
        live = 0
        for event in self.events:
            if event >= 0:
                live += self.blocks[event].nbytes
                yield live, event
            else:
                live -= self.blocks[~event].nbytes


def place_of(block: Block) -> str:
    """ "forward pass of blocks.3", for people."""
    return f"{'backward' if block.backward else 'forward'} pass of {block.module or 'the model and its loss'}"


@dataclass(frozen=True)
class Line:
    """Two traces of the same passes at different numbers of samples, and what follows from them at any other number."""

    first: Trace
    second: Trace

    @property
    def exact(self) -> bool:
        """Whether both made the same allocations in the same order; else totals alone are on a line."""
        return self.first.events == self.second.events

    def at(self, samples: int) -> Trace:
        """The trace of a micro-batch of so many samples.

        Where the two are not alike, it is the larger one's, with every block that grew as a whole does.
        """
        one, two = self.first, self.second
        if samples in (one.samples, two.samples):
            return one if samples == one.samples else two

        def on_line(a: int, b: int) -> int:
            return max(0, math.ceil(a + (b - a) * (samples - one.samples) / (two.samples - one.samples)))

        inputs = on_line(one.inputs, two.inputs)
        if self.exact:
            pairs = zip(one.blocks, two.blocks)
            blocks = tuple(replace(a, nbytes=on_line(a.nbytes, b.nbytes)) for a, b in pairs)
        else:
            factor = on_line(one.peak, two.peak) / max(two.peak, 1)
            blocks = tuple(replace(b, nbytes=math.ceil(b.nbytes * factor)) for b in two.blocks)
        return Trace(samples, inputs, blocks, two.events, on_line(one.flops, two.flops))


def trace(
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    device: Device,
    policy: Policy,
    *,
    fake: bool = False,
    seed: int = 0,
    also: AbstractContextManager[Any] | None = None,
) -> Trace:
    """Follow one forward and backward pass of a micro-batch.

    Weights, gradients, buffers and generators are afterwards as they were. Gradients are freed as they come, as in a run, where
    they are added to a buffer that the pass does not own.

    Args:
        batch: the micro-batch: real tensors; with ``fake`` they may be meta or fake ones too.
        fake: run on shapes alone, on a copy of the model that takes no memory; the model may be on the meta device.
        also: another mode that sees every operation.

    Raises:
        CannotFake: where ``fake`` is asked for, and the model or its loss needs values.

    Cost: a forward and a backward pass, and 30 to 100 microseconds an operation.
    """
    if not fake:
        with untouched(model, device, seed), as_written():
            return _follow([model], loss, batch, device, policy, also)
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    try:
        with as_written(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            with FakeCopyMode(mode):
                shapes, batch = copy.deepcopy((model, batch))
            return _follow([shapes, model], loss, batch, device, policy, also)
    except Exception as err:
        raise CannotFake(
            "The model cannot be tried on shapes alone.",
            f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else 'no message'}",
            "Leave values out of the control flow of its forward pass and loss, or plan on the device itself.",
        ) from err


def trace_line(
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    device: Device,
    policy: Policy,
    *,
    seed: int = 0,
    fake: bool | None = None,
) -> Line:
    """Traces at two numbers of samples.

    Args:
        fake: on shapes alone, at the batch's size and twice that; False: on real tensors, at 2 and 4 samples; None: on shapes
            where that works.

    Raises:
        CannotFake: where ``fake`` is True and the model or its loss needs values.
    """

    def line(fake: bool, *sizes: int) -> Line:
        return Line(*(trace(model, loss, of_size(batch, n), device, policy, fake=fake, seed=seed) for n in sizes))

    if fake is not False:
        try:
            return line(True, batch_size(batch), 2 * batch_size(batch))
        except CannotFake:
            if fake:
                raise
    return line(False, 2, 4)


def of_size(batch: Any, samples: int) -> Any:
    """The batch's first samples; where it has fewer, again from the first."""
    num = batch_size(batch)
    if samples <= num:
        return split(batch, samples)[0]
    return tree_map(lambda x: torch.cat([x] * -(-samples // num))[:samples], batch)


def _follow(
    models: Sequence[nn.Module],
    loss: ModelLoss,
    batch: Any,
    device: Device,
    policy: Policy,
    also: AbstractContextManager[Any] | None,
) -> Trace:
    """The trace of the first model; the others are those whose modules a forward function of it may hold on to."""
    model = models[0]
    params = [p for one in models for _, p in named_trainable(one)]
    held = [(p, p.grad) for p in params]
    inputs = [x for _, x in tensors(batch)]
    old = [x for one in models for x in (*one.parameters(), *one.buffers())]
    follow = _Follow(device.kind, [*old, *inputs])
    removable = [p.register_post_accumulate_grad_hook(_forget) for p in params]
    try:
        for p in params:
            p.grad = None
        with _names(models, follow), also or nullcontext(), follow:
            with policy.context(device):
                total, _ = sum_and_weight(loss(model, batch), batch)
            follow.forward_done(total)
            backward(total, torch.ones_like(total))
            del total
    finally:
        for handle in removable:
            handle.remove()
        for p, grad in held:
            p.grad = grad
        follow.alive.clear()  # its callbacks hold it: nothing would go before Python looks for cycles
        follow.old.clear()
    return Trace(batch_size(batch), sum(x.nbytes for x in inputs), *follow.result(), follow.flops)


def _forget(p: Tensor) -> None:
    p.grad = None


@contextmanager
def _names(models: Sequence[nn.Module], follow: _Follow) -> Iterator[None]:
    """Inside, ``follow`` knows in which module's forward pass it is."""
    with ExitStack() as stack:
        for one in models:
            for (
                name,
                module,
            ) in one.named_modules():  # hooks of their own: torch warns of global ones on compiled models
                enter = module.register_forward_pre_hook(lambda *_, name=name: follow.inside.append(name))
                leave = module.register_forward_hook(lambda *_: _leave(follow), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        yield


def _leave(follow: _Follow) -> None:
    follow.inside.pop()


class _Follow(TorchDispatchMode):
    """Notes every storage that operations make, when it is born and when it dies."""

    def __init__(self, kind: str, old: Sequence[Tensor]) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()  # type: ignore[no-untyped-call]
        self.kind, self.counts = kind, flop_registry
        self.inside: list[str] = []
        self.old = {
            x.untyped_storage()._cdata: x.untyped_storage() for x in old
        }  # held, so that no address comes again
        self.alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}  # by address: reference, number
        self.sizes: list[int] = []
        self.places: list[tuple[str, bool]] = []
        self.kept: set[int] = set()
        self.events: list[int] = []
        self.backward = False
        self.flops = 0
        self.used = ""  # module of the activation that a backward operation used last

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first operation, which takes seconds and 75 MB

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.backward and (count := self.counts.get(func.overloadpacket)) is not None:
            with suppress(Exception):  # an operator that torch's table does not read is not counted
                self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        given, made = _tensors_in(args), _tensors_in((result,))
        if kwargs:
            given += _tensors_in(tuple(kwargs.values()))
        for x in given:
            self._see(x)
        scratch = scratch_bytes(self.kind, func.name(), given)
        if scratch:
            self._born(scratch)
            number = len(self.sizes) - 1
        for x in made:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.alive and key not in self.old:
                self._born(storage.nbytes())
                self.alive[key] = (weakref.ref(storage, self._dies(key, len(self.sizes) - 1)), len(self.sizes) - 1)
        if scratch:
            self.events.append(~number)
        return result

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            name, backward = self.places[self.alive[key][1]]
            if self.backward and not backward:
                self.used = name
        elif key not in self.old:
            self.old[key] = storage  # made before, or where nothing could see it

    def _born(self, nbytes: int) -> None:
        name = self.inside[-1] if self.inside else self.used if self.backward else ""
        self.events.append(len(self.sizes))
        self.sizes.append(nbytes)
        self.places.append((name, self.backward))

    def _dies(self, key: int, number: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            self.alive.pop(key, None)
            self.events.append(~number)

        return died

    def forward_done(self, total: Tensor) -> None:
        """From here on it is the backward pass; what is alive, but for the loss itself, was kept for it."""
        self.kept = {number for _, number in self.alive.values()}
        self.backward = True

    def result(self) -> tuple[tuple[Block, ...], tuple[int, ...]]:
        pairs = enumerate(zip(self.sizes, self.places))
        return tuple(Block(size, *place, k in self.kept) for k, (size, place) in pairs), tuple(self.events)


def _tensors_in(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_in(value)
    return found
