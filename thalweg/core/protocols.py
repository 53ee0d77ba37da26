"""The protocols where rooms meet: what a task is made of, where samples come from, where records go.

Tensors appear as ``Any``: this room does not know torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from thalweg.core.plan import Plan
from thalweg.core.record import Evaluation, Event, Record, StopReason


class Loss(NamedTuple):
    """A sum of losses and how many tokens or examples it covers; the gradient of a step is sum(total) / sum(weight).

    Attributes:
        total: a scalar tensor, the *sum* over what it covers.
        weight: a number or scalar tensor, 0 or more.
    """

    total: Any
    weight: Any


#: ``loss(model, batch)`` or ``loss(model, batch, **recipe.loss)``: a Loss, or a scalar mean, weighted by the batch size.
LossFn = Callable[..., Any]
#: ``metrics(model, batch)``: names to Loss-like pairs (sum, weight).
MetricsFn = Callable[[Any, Any], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and held-out data: each a dict or tuple of tensors, a ``Dataset``, a ``DataLoader``, or an iterable.

    Args:
        train: what is trained on.
        test: what is held out; None: the run is not evaluated.
        augment: ``augment(batch, draw)`` for in-memory data; ``draw(num)`` gives ``num`` uniform numbers in [0, 1) for
            each sample, a function of (seed, epoch, sample) alone.
        facts: what a reader of the plan should know of the data, such as its size.
    """

    train: Any
    test: Any = None
    augment: Callable[[Any, Callable[[int], Any]], Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Model + loss + data + metrics: what ``thalweg train`` trains. All are plain functions.

    Args:
        model: ``model(**recipe.model)`` gives an ``nn.Module``; or the module itself.
        loss: ``loss(model, batch, **recipe.loss)``.
        data: ``data(**recipe.data.options)`` gives a ``Split``, or training data alone; or the data itself.
        metrics: ``metrics(model, batch)``: further figures for evaluation.
        sample: ``sample(model)`` gives a text to show at the end of a run.
        unit: what a weight of 1 is, for people: "tokens" or "samples".
        recipe: what differs from the default recipe, by dotted path.
        inputs, targets: where a batch has what augmentation and mixing change: a key, or a place in a tuple.
        classes: number of classes; 0: counted in the labels of in-memory data, where it is asked for.
        about: one line for ``thalweg tasks``.
    """

    model: Any
    loss: LossFn
    data: Any
    metrics: MetricsFn | None = None
    sample: Callable[[Any], str] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    unit: str = "samples"
    inputs: str | int = "images"
    targets: str | int = "labels"
    classes: int = 0
    name: str = "task"


@runtime_checkable
class Gather(Protocol):
    """In-memory samples that come as whole batches: one gather, no per-item collation, no workers."""

    def __len__(self) -> int: ...

    def gather(self, indices: Any) -> Any:
        """The batch of these samples.

        Args:
            indices: int64 tensor of shape (batch,), each in [0, len(self)).
        """


@runtime_checkable
class LastingDraw(Protocol):
    """The ``draw`` of in-memory data: it knows the epoch, and has numbers that stay from epoch to epoch.

    Attributes:
        epoch: that the samples are of, from 0.
    """

    epoch: int

    def __call__(self, num: int) -> Any: ...

    def lasting(self, num: int) -> Any:
        """As a call, but a function of (seed, sample) alone; each call goes on."""


#: ``tell(name, text, detail)``: something that a person should know, as ``Event`` has it.
Tell = Callable[[str, str, dict[str, Any]], None]


@dataclass(frozen=True)
class FeedState:
    """Where a feed stands between two windows, for one that cannot be asked for any step.

    Attributes:
        facts: plain data that JSON holds.
        tensors: by name.
    """

    facts: dict[str, Any]
    tensors: dict[str, Any]


class Feed(Protocol):
    """Windows of micro-batches for the steps from ``start`` on; the same for the same seed, whoever asks.

    Attributes:
        tell: told what a person should know of the data, such as a worker that was started again.
        stop: asked while data is waited for: whether someone wants the run to end.
    """

    tell: Tell
    stop: Callable[[], bool]

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The windows of steps ``start`` to ``stop - 1``; fewer where ``self.stop()`` was true while data was waited for."""

    def epoch_of(self, step: int) -> int:
        """The epoch that step ``step`` (from 0) draws from; 0 where the length of an epoch is not known."""

    def samples(self, step: int) -> list[int] | None:
        """The data set's indices of the samples in the window of step ``step`` (from 0); None for a stream."""

    def state(self, step: int) -> FeedState | None:
        """Where this feed stands when ``step`` windows have been taken; asked just then. None: ``windows`` does without."""

    def restore(self, step: int, state: FeedState) -> None:
        """``windows(step, ...)`` is to go on from what ``self.state(step)`` gave, in another process maybe."""


class Sink(Protocol):
    """Where the values of a run go: a file, a terminal, a tracker."""

    def start(self, plan: Plan, step: int) -> None: ...

    def steps(self, records: list[Record]) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def event(self, event: Event) -> None: ...

    def stop(self, reason: StopReason) -> None: ...
