"""Softmax and normalization as functions, computed in float32 wherever a model calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward  # what torch.autograd.backward ends in; it would leave this mode
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)

#: Word of an island to torch's functions that it means. Attention is there because its softmax cannot be reached alone.
FUNCTIONS: dict[str, frozenset[Callable[..., Any]]] = {
    "softmax": frozenset(
        (
            F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax,
            F.scaled_dot_product_attention, F.multi_head_attention_forward,
        )
    ),
    "norm": frozenset(
        (
            F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.group_norm, torch.group_norm,
            F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm, F.normalize,
        )
    ),
}  # fmt: skip


def widened(value: Any) -> Any:
    """Half-precision tensors in float32, inside lists, tuples and dictionaries too; all else as it is."""
    return converted(value, HALVES, torch.float32)


def converted(value: Any, given: tuple[torch.dtype, ...], to: torch.dtype) -> Any:
    """``value`` with the tensors of the dtypes ``given`` in another, whatever tree they stand in."""
    if isinstance(value, Tensor):
        return value.to(to) if value.dtype in given else value
    if value is None or isinstance(value, (int, float, str)):
        return value
    if type(value) is tuple or type(value) is list:
        return type(value)(converted(part, given, to) for part in value)
    if type(value) is dict:
        return {key: converted(part, given, to) for key, part in value.items()}
    if isinstance(value, (list, tuple, dict)):  # named tuples and a library's own outputs
        from torch.utils._pytree import tree_map_only

        return tree_map_only(Tensor, lambda x: converted(x, given, to), value)
    return value


class InFloat32(TorchFunctionMode):
    """Inside, the functions of some words compute in float32, in backward passes that compute again too.

    Args:
        words: keys of ``FUNCTIONS``.
        kind: kind of device, whose autocast is switched off for them.
        back: whether results return to the dtype of what came in; else they stay float32, as autocast's do.

    Attributes:
        met: words that a function was met of.
    """

    def __init__(self, words: frozenset[str], kind: str, *, back: bool) -> None:
        super().__init__()
        self.kind, self.back = kind, back
        self.word_of = {function: word for word in words for function in FUNCTIONS[word]}
        self.met: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        word = self.word_of.get(func)
        if func is torch.autograd.backward:
            return self._backward(*args, **(kwargs or {}))
        if word is None:
            return func(*args, **(kwargs or {}))
        self.met.add(word)
        first = next((x for x in args if isinstance(x, Tensor)), None)
        with torch.autocast(self.kind, enabled=False):
            out = func(*widened(tuple(args)), **widened(dict(kwargs or {})))
        if self.back and first is not None and first.dtype in HALVES:
            return converted(out, (torch.float32,), first.dtype)
        return out

    def _backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: Any = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """``torch.autograd.backward``, which steps out of modes: what it computes again must be computed as it was before."""
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        seeds = (grad_tensors,) if isinstance(grad_tensors, Tensor) else grad_tensors
        seeds = tuple(map(torch.ones_like, roots)) if seeds is None else tuple(seeds)
        keep = create_graph if retain_graph is None else retain_graph
        with self:
            _engine_run_backward(
                roots, seeds, keep, create_graph, tuple(inputs or ()), allow_unreachable=True, accumulate_grad=True
            )
