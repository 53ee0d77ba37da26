"""Weights outside of a run: tensors by name, each once, and the other names that some of them have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.core import CheckpointError

SHOWN = 4  # names that an error lists


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file or folder holds of a model.

    Attributes:
        tensors: by name, on the CPU, no two of which share memory.
        tied: further names of the same tensors: name to the one in ``tensors``.
        kind: what they were read from, in words.
        files: what was read; of a checkpoint of ours its manifest, which holds the digests of the rest.
        told: what was chosen or left out on the way, a sentence each.
        step: of the run that they are from, where that is known.
        folder: the Hugging Face folder that they are from, with its config.
    """

    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    kind: str
    files: tuple[Path, ...]
    told: tuple[str, ...] = ()
    step: int = 0
    folder: Path | None = None

    def named(self) -> dict[str, Tensor]:
        """All names; tied ones are the same tensor."""
        return {**self.tensors, **{name: self.tensors[kept] for name, kept in self.tied.items()}}

    def telling(self, *told: str) -> Weights:
        return replace(self, told=(*self.told, *(text for text in told if text)))


def listed(names: Iterable[Any], most: int = SHOWN) -> str:
    """A few names, and how many there are besides.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    named = [printable(str(name)[:120]) for name in names]
    more = len(named) - most
    return ", ".join(named[:most]) + (f" and {more} more" if more > 0 else "") if named else "none"


def printable(text: str) -> str:
    """What a terminal would act on, as an escape; the rest as it is.

    >>> printable("größe\\x1b[2J")
    'größe\\\\x1b[2J'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def refused(path: Path, why: str, remedy: str) -> CheckpointError:
    """The error for a file that weights cannot be taken from."""
    return CheckpointError(f"The weights in {path} cannot be read.", printable(why), remedy)


def separated(named: Mapping[Any, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """(tensors, tied names, names of what is no tensor) of a state dict that a file held.

    Raises:
        CheckpointError: for a name that is no text, a tensor that is not plain or larger than what the file holds of it,
            and two that overlap without being one; it is named.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    others: list[str] = []
    views: dict[tuple[Any, ...], str] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, value in named.items():
        if not isinstance(name, str):
            raise refused(
                path, f"A key is no text: {str(name)[:80]} ({type(name).__name__}).", "Name tensors by texts."
            )
        if not isinstance(value, Tensor):
            others.append(name)
            continue
        tensor = _plain(name, value, path)
        if not tensor.numel():
            tensors[name] = tensor
            continue
        start = tensor.data_ptr()
        view = (start, tensor.shape, tensor.stride(), tensor.dtype)
        if view in views:
            tied[name] = views[view]
            continue
        views[view] = name
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        storage = tensor.untyped_storage().data_ptr()
        spans.setdefault(storage, []).append((start, start + reach * tensor.element_size(), name))
        tensors[name] = tensor
    for places in spans.values():
        places.sort()
        for (_, end, one), (begin, _, other) in zip(places, places[1:]):
            if begin < end:
                raise refused(
                    path,
                    f"{one} and {other} overlap in memory, and are not the same tensor.",
                    "Save one of them as a copy: tensor.clone().",
                )
    return tensors, tied, others


def _plain(name: str, value: Tensor, path: Path) -> Tensor:
    tensor = value.detach()
    if type(value) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        what = f"{name} is no plain tensor: {type(value).__name__}, {tensor.layout}, {tensor.dtype}."
        raise refused(path, what, "Save it as a dense tensor: tensor.to_dense(), or tensor.dequantize().")
    if tensor.device.type != "cpu":
        raise refused(path, f"{name} has no bytes: it is on {tensor.device}.", "Save it from a device that holds it.")
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise refused(
            path,
            f"{name} claims to be of shape {tuple(tensor.shape)} {tensor.dtype}, and the file holds {held} bytes of it.",
            "Save it whole: tensor.clone(memory_format=torch.contiguous_format).",
        )
    return tensor.resolve_conj().resolve_neg()
