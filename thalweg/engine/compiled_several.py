"""Several small steps by one call: torch's guards look once, then the graph is run for one batch after another.

A call of a compiled function first checks what it was compiled for: the model, the loss, the settings of torch. That takes as long
as the products of matrices of a small model. Within a call of several steps nothing of a user's runs, so nothing of it can change:
only the batches are compared, one with another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thalweg.data import tensors
from thalweg.engine.compiled_backend import Ran

_PLAIN = (str, bytes, int, float, type(None))  # of what is no tensor in a batch: what can be compared, and stays


@dataclass(frozen=True)
class Known:
    """A graph and what it was given.

    Attributes:
        places: which argument is which tensor of the batch.
        row, ok: places of what a step wants of what it gives.
        kind: of the batch; ``due``: of the rule's periodic work.
        proven: whether two calls in a row were given the same tensors besides the batch: a model that replaces one of its own
            between two steps is given others.
        draws: whether it takes numbers from torch's generators.
        call: the graph, without what keeps torch from compiling what compiled it: nothing is compiled here.
    """

    ran: Ran
    places: tuple[tuple[int, int], ...]
    row: int
    ok: int
    kind: Any
    due: tuple[int, ...]
    proven: bool
    draws: bool
    call: Callable[..., Any]

    def again(self, batch: Any, due: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What the graph gives for a batch of the same kind; ``due`` is its own."""
        leaves, args = _leaves(batch), list(self.ran.args)
        for place, leaf in self.places:
            args[place] = leaves[leaf]
        found = self.call(*args)
        return found[self.row], found[self.ok]


class Repeated:
    """The graphs that have been called, as they may be called again."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}  # by graph
        self._looked: list[Known] = []  # within this call of several steps, the last one first

    def begin(self) -> None:
        """From here on torch has to look first."""
        self._looked.clear()

    def learn(
        self, ran: Ran | None, batch: Any, due: tuple[int, ...], found: tuple[Tensor, Tensor], draws: bool
    ) -> None:
        """Torch has just looked, and ``ran`` gave ``found``. A graph that gives more hands something to the model, and is not
        repeated: it would not come by it."""
        if ran is None or len(ran.found) != 2:
            return
        own = [id(t) for t in _leaves(batch)]
        leaves = {one: k for k, one in enumerate(own)}
        if len(leaves) != len(
            own
        ):  # one tensor under two names: the graph has one argument, and the next batch may have two
            return
        places = tuple((i, leaves[id(t)]) for i, t in enumerate(ran.args) if id(t) in leaves)
        row, ok = (next((i for i, t in enumerate(ran.found) if t is one), -1) for one in found)
        if -1 in (row, ok):
            return
        before = self._known.get(id(ran.run))
        proven = before is not None and before.places == places and _same_besides(before.ran, ran, dict(places))
        call = getattr(ran.run, "_torchdynamo_orig_callable", ran.run)
        known = Known(ran.without(places), places, row, ok, kind_of(batch), due, proven, draws, call)
        self._known[id(ran.run)] = known
        if proven:
            self._looked.insert(0, known)

    def fitting(self, batch: Any, due: tuple[int, ...]) -> Known | None:
        """The graph that a batch may be given without torch looking first."""
        kind = kind_of(batch) if self._looked else None
        for one in self._looked:
            if one.due == due and one.kind == kind:
                return one
        return None


def _same_besides(before: Ran, now: Ran, places: dict[int, int]) -> bool:
    if before.run is not now.run or len(before.args) != len(now.args):
        return False
    return all(a is b or i in places for i, (a, b) in enumerate(zip(before.args, now.args)))


def _leaves(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of ``tensors``."""
    if type(batch) is dict and all(type(value) is Tensor for value in batch.values()):
        return list(batch.values())
    return [t for _, t in tensors(batch)]


def kind_of(batch: Any) -> Any:
    """What two batches have in common that one graph may be given: all of them but the elements of tensors."""
    kind = type(batch)
    if kind is Tensor:
        return batch.dtype, batch.device, batch.shape, batch.stride(), batch.requires_grad
    if isinstance(batch, dict):
        return kind, *batch, *map(kind_of, batch.values())
    if isinstance(batch, (list, tuple)):
        return kind, *map(kind_of, batch)
    if isinstance(batch, Tensor):
        return kind, *kind_of(batch.as_subclass(Tensor))
    return kind, batch if isinstance(batch, _PLAIN) else object()  # others may change, or not be compared
