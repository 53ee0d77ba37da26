"""Where samples lie: in memory, behind a ``Dataset``, or in a stream. Each says how its micro-batches come to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from thalweg.core import DataError, Gather
from thalweg.data.standing import Standing, standing_of
from thalweg.data.trees import tensors, tree_map
from thalweg.device import check_float64


class Tensors:
    """A dict, tuple or list of tensors of one length, or one tensor: a batch is one gather a tensor."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree_map(lambda t: t, _as_tensors(tree))
        lengths = {name: t.shape[0] for name, t in tensors(self.tree) if t.ndim}
        if not lengths or min(lengths.values()) == 0:
            raise DataError(
                "The data holds no sample.",
                f"Lengths: {lengths or 'no tensor'}.",
                "Give at least one sample to train on.",
            )
        if len(set(lengths.values())) > 1:
            raise DataError(
                "The tensors of the data differ in length.",
                ", ".join(f"{name}: {n}" for name, n in lengths.items()) + ".",
                "Give each tensor one row a sample.",
            )
        self.num = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.num

    def gather(self, indices: Tensor) -> Any:
        return tree_map(lambda t: _rows(t, indices), self.tree)

    def to(self, device: torch.device) -> Tensors:
        check_float64(tensors(self.tree), device, "The data")
        return Tensors(tree_map(lambda t: t.to(device), self.tree))

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in tensors(self.tree))


class TokenWindows:
    """Fixed windows over one long run of tokens, for language models: sample ``i`` is tokens [i*length, (i+1)*length].

    Args:
        tokens: 1-D integers; uint8 and uint16 stay so in memory.
        length: tokens in a window; each window carries one more, the last target.

    >>> windows = TokenWindows(torch.arange(10, dtype=torch.uint8), 4)
    >>> len(windows), windows.gather(torch.tensor([1]))["targets"].tolist()
    (2, [[5, 6, 7, 8]])
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        if length < 1:
            raise DataError(
                f"Windows of {length} tokens hold nothing.", "A window has 1 or more.", "Give a length of 1 or more."
            )
        self.tokens, self.length = tokens, length
        self.num = (tokens.numel() - 1) // length
        if self.num < 1:
            raise DataError(
                f"{tokens.numel()} tokens hold no window of {length}.",
                f"A window needs {length + 1}.",
                "Give more text, or a shorter window.",
            )
        self._inside = torch.arange(length + 1)

    def __len__(self) -> int:
        return self.num

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        window = self.tokens[indices[:, None] * self.length + self._inside].long()
        return {"tokens": window[:, :-1], "targets": window[:, 1:]}


class Items:
    """A map-style ``Dataset`` or a list of samples: samples are read one by one and collated."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] = default_collate) -> None:
        if len(dataset) == 0:
            raise DataError("The data holds no sample.", f"len({type(dataset).__name__}) is 0.", "Give at least one.")
        self.dataset, self.collate, self.num = dataset, collate, len(dataset)

    def __len__(self) -> int:
        return self.num


class Stream:
    """An iterable of samples that cannot be asked for one by place; each epoch asks it for a new iterator.

    Attributes:
        stateful: whether it has ``state_dict()``, where its newest iterator stands, and ``load_state_dict(state)``, after
            which the next iterator goes on from there.
        standing: of the iterable, where it has a state.
    """

    def __init__(self, iterable: Any, collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.iterable, self.collate = iterable, collate
        counted = iterable.dataset if isinstance(iterable, DataLoader) else iterable
        self.num = len(counted) if isinstance(counted, Sized) else 0
        self.stateful = _is_stateful(iterable)
        self.standing = standing_of(iterable) if self.stateful else Standing()


Source = Gather | Items | Stream


def as_source(data: Any) -> Source:
    """The source that ``data`` is.

    Args:
        data: a tensor or array, a dict or tuple of them; an object with ``__len__`` and ``gather``; a map-style or
            iterable ``Dataset``; a ``DataLoader`` (its data set and collate function are used; batch size and order come
            from the recipe; one with a state of its own over an iterable is read as it is, sample by sample); a list of
            samples; any other iterable.

    Raises:
        DataError: for empty data, or for what is none of these.
    """
    if isinstance(data, (Tensors, TokenWindows, Items, Stream)):
        return data
    if isinstance(data, DataLoader):
        collate = data.collate_fn if data.batch_sampler is not None else default_collate
        if isinstance(data.dataset, IterableDataset):
            return Stream(data, default_collate) if _gives_samples(data) else Stream(data.dataset, collate)
        if own := _own_order(data):
            raise DataError(
                "The DataLoader has a sampler of its own, and the order of the data is the run's.",
                f"Its {own}.",
                "Give the data set itself; weigh samples in the loss: Loss(total, weight).",
            )
        return Items(data.dataset, collate)
    if _is_tensor_tree(data):
        return Tensors(data)
    if isinstance(data, Gather):
        if len(data) == 0:
            raise DataError("The data holds no sample.", f"len({type(data).__name__}) is 0.", "Give at least one.")
        return data
    if isinstance(data, (str, bytes)):
        raise DataError(
            "The data is a text, not samples.",
            f"Got {data[:60]!r}.",
            "Read the file first: thalweg takes its contents.",
        )
    if isinstance(data, IterableDataset):
        return Stream(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        return Items(data)
    if isinstance(data, Iterable) and not isinstance(data, Mapping):
        if hasattr(data, "__next__") and iter(data) is data:  # iter() alone may move one that has a state
            raise DataError(
                "The training data is an iterator that can be read once.",
                f"Got a {type(data).__name__}; a run may need several epochs, and a resumed one starts anew.",
                "Give an iterable that can be asked again, such as a class with __iter__, a list or a Dataset.",
            )
        return Stream(data)
    raise DataError(
        "The data is nothing that samples can be taken from.",
        f"Got {type(data).__name__}.",
        "Give a dict of tensors, a torch Dataset or DataLoader, or an iterable of samples.",
    )


def _own_order(loader: DataLoader[Any]) -> str:
    """What of a loader over a map-style data set says which samples are taken; "" where each is taken once an epoch."""
    sampler, batches = loader.sampler, loader.batch_sampler
    if batches is not None and not _is_of(batches, BatchSampler):
        return f"batch_sampler is a {type(batches).__name__}"
    if loader.batch_size is None and isinstance(batches, BatchSampler):
        sampler = batches.sampler
    if not _is_of(sampler, SequentialSampler, RandomSampler):
        return f"sampler is a {type(sampler).__name__}"
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(loader.dataset)):  # type: ignore[arg-type]
        drawn = "with" if sampler.replacement else "without"
        return f"sampler draws {sampler.num_samples} samples {drawn} replacement"
    return ""


def _is_of(sampler: Any, *kinds: type) -> bool:
    """Whether it is one of these as torch or torchdata has it, and no class of the user's over it."""
    return isinstance(sampler, kinds) and type(sampler).__module__.split(".")[0] in ("torch", "torchdata")


def told_of_loader(loader: DataLoader[Any], batch: int, workers: int) -> str:
    """What of a ``DataLoader`` is used, and what the recipe says instead.

    Args:
        batch, workers: the recipe's.
    """
    not_used = []
    if loader.batch_size not in (None, batch):
        not_used.append(f"its batch_size={loader.batch_size} (train.batch={batch})")
    if loader.num_workers != workers:
        not_used.append(f"its num_workers={loader.num_workers} (data.workers={workers})")
    if loader.worker_init_fn is not None:
        not_used.append("its worker_init_fn (samples draw from streams named by seed, epoch and sample)")
    rest = f"; not used: {', '.join(not_used)}" if not_used else ""
    return f"its data set and collate function are used; batch, order and workers are the recipe's{rest}"


def _is_stateful(data: Any) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def _gives_samples(loader: DataLoader[Any]) -> bool:
    """Whether a loader over an iterable is read itself, because it knows where its workers stand in their shards."""
    if not _is_stateful(loader):
        return False
    if loader.batch_size is not None:
        raise DataError(
            "The DataLoader with a state makes batches, and the recipe says what a batch is.",
            f"{type(loader).__name__}(batch_size={loader.batch_size}) over a {type(loader.dataset).__name__}.",
            "Give it batch_size=None, so that it gives samples; to collate them otherwise than torch does, give "
            "thalweg.data.Stream(loader, collate).",
        )
    return True


def _is_tensor_tree(data: Any) -> bool:
    if isinstance(data, (Tensor, np.ndarray)):
        return True
    if isinstance(data, Mapping):
        return bool(data) and all(_is_tensor_tree(value) for value in data.values())
    if isinstance(data, tuple):
        return bool(data) and all(_is_tensor_tree(value) for value in data)
    return False


def _as_tensors(tree: Any) -> Any:
    """Arrays become tensors; what no tensor can hold is refused."""
    if isinstance(tree, np.ndarray):
        if tree.dtype.kind not in "biufc":
            raise DataError(
                "An array of the data holds no numbers.", f"Its dtype is {tree.dtype}.", "Encode it as numbers first."
            )
        whole = np.ascontiguousarray(tree)
        return torch.from_numpy(whole if whole.flags.writeable else whole.copy())
    if isinstance(tree, Mapping):
        return {key: _as_tensors(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_as_tensors(value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(_as_tensors(value) for value in tree)
    return tree


#: Torch cannot index these; their bits can be.
_SAME_BITS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _rows(t: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor; a 0-dim one belongs to all samples and is passed on."""
    if not t.ndim:
        return t
    bits = t.view(_SAME_BITS[t.dtype]) if t.dtype in _SAME_BITS else t
    return bits.index_select(0, indices.to(t.device)).view(t.dtype)
