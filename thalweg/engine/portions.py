"""A window when memory runs out: the pass that failed is undone and gone through again, in smaller portions.

The global batch stays what it is, and so does the gradient: a sum over samples does not ask how they are cut (C1). Random
streams are named by the portion that they are drawn for, and by sample where dropout is keyed so (C2).

A failure in a forward pass has added nothing: the micro-batch alone is gone through again. In a backward pass it may have
added a part of the gradients: the window starts over, and for the rest of it what has been gathered is copied before each
micro-batch, so that another failure costs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from thalweg.core import OutOfMemoryError, Recipe, human_bytes
from thalweg.data import batch_size, tensors, tree_map
from thalweg.device import Device, memory, ran_out
from thalweg.engine.regularizers import what_follows_the_split
from thalweg.engine.undo import Undo

TRAINED, EVALUATED = "micro-batch", "batch of an evaluation"
TRIES = 3  # in a row, of what cannot be cut any more
_WORDS = 160  # of an error, that are told


@dataclass(frozen=True)
class Failure:
    """A pass that memory did not suffice for. The error itself is not kept: its traceback would hold all that the pass made."""

    where: str
    words: str

    @classmethod
    def of(cls, err: Exception, where: str) -> Failure:
        line = (str(err).strip() or type(err).__name__).splitlines()[0]
        return cls(where, line if len(line) <= _WORDS else f"{line[:_WORDS]}...")


@dataclass(frozen=True)
class News:
    """Something to tell of memory: a sentence, its numbers, and whether the split is another from here on."""

    text: str
    detail: dict[str, Any]
    smaller: bool


@dataclass
class Limit:
    """How many samples a pass may take, as memory has taught.

    A size that went through before and fails once is tried once more: others may have taken memory for a moment.

    Args:
        what: is limited, for people.
        device: whose memory it is.
        grain: portions are multiples of it, as long as they are larger, such as ghost batches.

    Attributes:
        most: samples in a pass; 0: as many as it is given. State of the run.
        proven: the most samples that went through in this process.
        news: what has not been told yet.
    """

    what: str
    device: Device
    grain: int = 1
    most: int = 0
    proven: int = 0
    news: list[News] = field(default_factory=list)
    _failures: int = 0  # in a row, at one place
    _again: int = 0  # tries at the same size, in this process

    def cut(self, window: Sequence[Any]) -> Sequence[Any]:
        """The window's micro-batches, each in portions of at most ``most`` samples and as even as can be."""
        if not self.most:
            return window
        return [part for batch in window for part in evenly(batch, self.most, self.grain)]

    def lower(self, most: int) -> None:
        """Another rank's passes may take ``most`` samples: this one's windows are cut as its own are."""
        if most and (not self.most or most < self.most):
            self.most = most
            text = f"Memory ran out on another rank. From here on a {self.what} has at most {most} samples."
            self.news.append(News(text, {"most": most}, True))

    @property
    def fresh(self) -> bool:
        """Whether it is news that a pass went through: the first, or one after a failure."""
        return not self.proven or self._failures > 0

    def passed(self, num: int) -> None:
        """A pass over ``num`` samples went through."""
        self._failures = 0
        self.proven = max(self.proven, num)

    def failed(self, batch: Any, failure: Failure, *, pieces: bool = True) -> None:
        """A pass over ``batch`` failed: what is tried next is as large, or smaller.

        Args:
            pieces: whether it may be cut.

        Raises:
            OutOfMemoryError: where there is nothing left to try.
        """
        num = batch_size(batch)
        self._failures += 1
        whole = "its gradients are used at once (optimizer.release_gradients)" if not pieces else uncuttable(batch)
        if num > 1 and not whole and (num > self.proven or self._failures > 1):
            self.most, self._failures = _half(num, self.grain), 0
            text = (
                f"Memory ran out in {failure.where} of {num} samples. From here on a {self.what} has at most {self.most}; "
                "the batch stays what it is."
            )
            self.news.append(News(text, {"failed": num, "most": self.most, "error": failure.words}, True))
            return
        if self._failures >= TRIES:
            raise self._nothing_left(batch, failure, whole)
        self._again += 1
        if self._again & (self._again - 1) == 0:  # the first, the second, the fourth: a run may have thousands
            text = f"Memory ran out in {failure.where} of {num} samples, and it is tried again at the same size."
            self.news.append(News(text, {"failed": num, "times": self._again, "error": failure.words}, False))

    def _nothing_left(self, batch: Any, failure: Failure, whole: str) -> OutOfMemoryError:
        num = batch_size(batch)
        size = sum(t.nbytes for _, t in tensors(batch))
        left = memory.available(self.device)
        free = "nobody knows how much is" if left is None else f"{human_bytes(left)}"
        held = "one sample, and no portion is smaller" if num == 1 else f"{num} samples, which cannot be cut: {whole}"
        return OutOfMemoryError(
            f"Memory ran out over {held}.",
            f"{TRIES} tries in a row in {failure.where}; {free} free on "
            f"{self.device.torch_device}; the data alone is {human_bytes(size)}. The allocator: {failure.words}",
            "Free what others hold, or let a pass take less: recompute='blocks', precision='bf16', shorter sequences, a "
            "smaller model"
            + (", optimizer.release_gradients='off', so that windows can be cut" if "release" in whole else "")
            + (", or a smaller train.batch." if num > 1 else "."),
        )


def spoken(limit: Limit, model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """(sentence, numbers) of what has not been told yet, and which layers follow another split."""
    for news in limit.news:
        follows = []
        if news.smaller and limit.what == TRAINED:
            follows = [f"{path}: {why}" for path, _, why in what_follows_the_split(model, recipe, limit.most)]
        told = f" What follows the split from here on: {'; '.join(follows)}." if follows else ""
        yield news.text + told, {**news.detail, **({"follows": follows} if follows else {})}
    limit.news.clear()


def evenly(batch: Any, most: int, grain: int = 1) -> list[Any]:
    """A batch in portions of at most ``most`` samples, whose sizes differ by at most ``grain``.

    >>> import torch
    >>> [len(part) for part in evenly(torch.zeros(13), 4)], [len(part) for part in evenly(torch.zeros(24), 17, 8)]
    ([4, 3, 3, 3], [16, 8])
    """
    size = batch_size(batch)
    if size <= most:
        return [batch]
    num = num_portions(size, most, grain)
    grain = 1 if grain > most else grain
    units = -(-size // grain)
    edges = [min(size, -(-units * i // num) * grain) for i in range(num + 1)]
    return [_between(batch, a, b) for a, b in zip(edges, edges[1:])]


def num_portions(size: int, most: int, grain: int = 1) -> int:
    """Into how many portions ``evenly`` cuts ``size`` samples; 1 where ``most`` is 0.

    >>> num_portions(13, 4), num_portions(24, 17, 8), num_portions(24, 0)
    (4, 2, 1)
    """
    if not most or size <= most:
        return 1
    grain = 1 if grain > most else grain
    units = -(-size // grain)
    return -(-units // (most // grain))


def _between(batch: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[start:stop] if t.ndim else t, batch)


def _half(num: int, grain: int) -> int:
    half = -(-num // 2)
    return -(-half // grain) * grain if half > grain else half


def uncuttable(batch: Any) -> str:
    """Why a batch cannot be cut along the first dimension of its tensors, or "".

    >>> import torch
    >>> (
    ...     uncuttable({"x": torch.zeros(4, 2), "y": torch.zeros(4), "scale": 2.0}),
    ...     uncuttable((torch.zeros(4), torch.zeros(9))),
    ... )
    ('', "'1' has 9 rows, and not one a sample")
    """
    size = batch_size(batch)
    for name, tensor in tensors(batch):
        if tensor.ndim and tensor.shape[0] != size:
            return f"'{name}' has {tensor.shape[0]} rows, and not one a sample"
    strange = next((kind for kind in _leaves(batch) if kind not in (Tensor, int, float, bool, str, type(None))), None)
    return f"it holds a {strange.__name__}" if strange is not None else ""


def _leaves(tree: Any) -> Iterator[type]:
    """The types of what is in a batch; numbers and texts that lie in a list may be one a sample, and count as the list."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _leaves(value) if isinstance(value, (Tensor, Mapping, tuple, list)) else [type(tree)]
    else:
        yield Tensor if isinstance(tree, Tensor) else type(tree)


#: ``one(index, first, batch, last)``: the passes of a micro-batch, of the samples from ``first`` on; how many they are.
OnePass = Callable[[int, int, Any, bool], int]


def go_through(
    parts: Sequence[Any],
    one: OnePass,
    limit: Limit,
    undo: Undo,
    *,
    counted: bool = True,
    moved: Callable[[], bool] | None = None,
) -> Sequence[Any]:
    """All micro-batches of a window, one after the other, in smaller portions from where memory runs out.

    Args:
        counted: as for ``Undo.start_over``.
        moved: where the backward pass moves weights, whether it has begun to: the window, one micro-batch, stays whole, and is
            not tried again from then on.

    Returns:
        The micro-batches as they went through.

    Raises:
        OutOfMemoryError: where smaller portions do not help.
    """
    undo.begin()
    first = index = 0
    last = len(parts) - 1
    try:
        for index, batch in enumerate(parts):
            first += one(index, first, batch, index == last)
    except Exception as err:
        if not ran_out(err):
            raise
        failure = Failure.of(err, _where(undo))
    else:
        if limit.fresh and parts:
            limit.passed(batch_size(parts[0]))
        return parts
    return _recovered(list(parts[:index]), list(parts[index:]), failure, one, limit, undo, counted=counted, moved=moved)


def _where(undo: Undo) -> str:
    return "the backward pass" if undo.touched else "the forward pass"


def _recovered(
    done: list[Any],
    todo: list[Any],
    failure: Failure,
    one: OnePass,
    limit: Limit,
    undo: Undo,
    *,
    counted: bool,
    moved: Callable[[], bool] | None,
) -> list[Any]:
    """The rest of a window whose micro-batch ``todo[0]`` failed; all of its micro-batches, as they went through."""
    given = batch_size(todo[0])
    limit.proven = max(limit.proven, *map(batch_size, done), 0)
    careful, kept, reached = False, None, 0  # reached: samples up to the furthest failure
    trouble: Failure | None = failure
    strange: OutOfMemoryError | None = None
    while trouble is not None:
        memory.release(limit.device, cycles=True)
        first = sum(map(batch_size, done))
        reached = max(reached, first)
        if moved is not None and moved():
            raise in_update(trouble, moved=True)
        limit.failed(todo[0], trouble, pieces=moved is None)
        if undo.touched or moved is not None or not undo.forward():
            if kept is not None:
                undo.put_back(kept)
            else:
                undo.start_over(counted=counted)
                done, todo, first, careful = [], [*done, *todo], 0, moved is None
        todo = list(limit.cut(todo))
        trouble = None
        try:
            while todo:
                kept = undo.keep(kept) if careful else None
                num = batch_size(todo[0])
                one(len(done), first, todo[0], len(todo) == 1)
                first += num
                done.append(todo.pop(0))
                if kept is not None or first > reached:
                    limit.passed(num)
        except Exception as err:
            if ran_out(err):
                trouble = Failure.of(err, _where(undo))
            elif batch_size(todo[0]) < given:
                strange = _too_small(batch_size(todo[0]), given, err)
            else:
                raise
        if strange is not None:
            raise strange
    return done


def in_update(failure: Failure, *, moved: bool) -> OutOfMemoryError:
    """The error for memory that ran out after the passes.

    Args:
        moved: whether some weights may have been written.
    """
    if moved:
        return OutOfMemoryError(
            f"Memory ran out in {failure.where}, in the update of the weights, and some of them may have moved.",
            f"This state is not saved. The allocator: {failure.words}",
            "Free memory and resume from the last checkpoint (--resume). optimizer.slots='int8' takes less.",
        )
    return OutOfMemoryError(
        f"Memory ran out in {failure.where}.",
        f"The allocator: {failure.words}",
        "Free memory and go on (--resume): nothing of this step has been applied. optimizer.slots='int8' takes less.",
    )


def _too_small(num: int, given: int, err: Exception) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"Memory ran out over {given} samples, and {num} do not go through by themselves.",
        f"{type(err).__name__}: {err}",
        "Let a pass take less (recompute='blocks', precision='bf16'), or give a train.micro_batch that fits.",
    )


def each(batch: Any, run: Callable[[Any], Any], limit: Limit) -> Iterator[Any]:
    """What ``run``, which changes nothing, gives for a batch; for its portions where memory runs out.

    Raises:
        OutOfMemoryError: where smaller portions do not help.
    """
    todo = list(limit.cut([batch]))
    while todo:
        failure = None
        try:
            found = run(todo[0])
        except Exception as err:
            if not ran_out(err):
                raise
            failure = Failure.of(err, "an evaluation")
        if failure is not None:
            memory.release(limit.device, cycles=True)
            limit.failed(todo[0], failure)
            todo = list(limit.cut(todo))
            continue
        limit.passed(batch_size(todo.pop(0)))
        yield found
