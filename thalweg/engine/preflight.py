"""One forward and backward pass before step 0, on the first micro-batch, that leaves no trace.

It finds what would otherwise surface in the middle of a run: a loss that is not one, parameters without a gradient, labels
out of range. And it tells the plan the weight of a micro-batch and what half precision gains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thalweg.core import DataError, ModelError, ThalwegError, seed_for
from thalweg.data import Source, Tensors, tensors
from thalweg.device import Device, half_precision_gain
from thalweg.device.kept import restored, same_generators, same_modes
from thalweg.engine.losses import check_loss, sum_and_weight
from thalweg.optim import named_trainable
from thalweg.precision import POLICIES
from thalweg.regularize import checking, soft_target_error

ModelLoss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Probe:
    """What the first micro-batch told: its loss and its weight."""

    loss: float
    weight: float


@contextmanager
def untouched(model: nn.Module, device: Device, seed: int) -> Iterator[None]:
    """Buffers, such as running statistics, and torch's generators are afterwards as they were."""
    with restored(list(model.buffers())), same_generators(device):
        for generator in device.generators():
            generator.manual_seed(seed_for(seed, "preflight"))
        yield


def as_written() -> AbstractContextManager[Any]:
    """Inside, compiled models run as they were written; nothing of the compiler is imported where none is."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode; afterwards each in the mode that it was in."""
    with same_modes(model):
        model.eval()
        yield


def preflight(
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    source: Source | None,
    device: Device,
    seed: int,
    *,
    mixed: bool = False,
) -> Probe:
    """Try the model and the loss on one micro-batch.

    Args:
        mixed: whether its samples are mixed, and its targets soft.

    Raises:
        LossError, DataError, ModelError: each names what is wrong, with its numbers.
    """
    watch = _LabelWatch()
    if not model.training:  # as a whole; parts that were put in evaluation mode, to freeze them, stay there
        model.train()
    for p in model.parameters():  # the engine owns gradients from here on
        p.grad = None
    with untouched(model, device, seed), as_written():  # what watches cannot be traced
        with watch, checking():
            try:
                value = loss(model, batch)
            except (RuntimeError, TypeError, IndexError, ValueError) as err:
                if mixed and not isinstance(err, (ThalwegError, torch.OutOfMemoryError)):
                    raise soft_target_error(err) from err
                raise
        check_loss(value)
        total, weight = sum_and_weight(value, batch)
        named = named_trainable(model)
        grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    idle = [name for (name, _), grad in zip(named, grads) if grad is None]
    if idle:
        shown = ", ".join(idle[:8]) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
        raise ModelError(
            "Some parameters never get a gradient.",
            f"{len(idle)} of {len(named)}: {shown}.",
            "Use them in the forward pass, or set requires_grad=False on them.",
        )
    watch.check_all(source, batch)
    return Probe(float(total.detach()) / max(float(weight), 1e-30), float(weight))


def gain_of(
    name: str, model: nn.Module, loss: ModelLoss, batch: Any, device: Device, seed: int, worth: float
) -> tuple[float, int]:
    """How many times faster the forward and backward pass is in a precision than in fp32, and the pairs timed.

    Args:
        worth: how many times it must be, to be taken.
    """
    params = [p for _, p in named_trainable(model)]

    def work(name: str) -> Callable[[], object]:
        policy = POLICIES[name]

        def run() -> None:
            with policy.around(device):
                with policy.forward(device):
                    total, _ = sum_and_weight(loss(model, batch), batch)
                torch.autograd.grad(total, params, allow_unused=True)

        return run

    with untouched(model, device, seed):
        return half_precision_gain(work("fp32"), work(name), device, worth=worth)


class _LabelWatch(TorchFunctionMode):
    """Looks at the labels of every classification loss before it runs: out of range, a GPU would only say 'assert'."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            given = {**dict(zip(("input", "target"), args)), **kwargs}
            logits, target = given["input"], given["target"]
            if not target.is_floating_point():
                classes = logits.shape[1] if logits.ndim > 1 else logits.shape[0]
                ignored = int(given.get("ignore_index", -100))
                _check_labels(target, classes, ignored, "the first micro-batch")
                self.calls.append((target, classes, ignored))
        return func(*args, **kwargs)

    def check_all(self, source: Source | None, batch: Any) -> None:
        """In-memory data: the labels of the whole set are checked, not the first batch's alone."""
        if not isinstance(source, Tensors):
            return
        whole = dict(tensors(source.tree))
        for target, classes, ignored in self.calls:
            for name, part in tensors(batch):
                if part.shape == target.shape and part.dtype == target.dtype and torch.equal(part, target):
                    _check_labels(whole[name], classes, ignored, f"'{name}'")


def _check_labels(labels: Tensor, classes: int, ignored: int, where: str) -> None:
    wrong = (labels != ignored) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        low, high = int(labels[wrong].min()), int(labels[wrong].max())
        raise DataError(
            "Labels are out of range.",
            f"{int(wrong.sum())} of {labels.numel()} labels in {where} lie in [{low}, {high}]; "
            f"the model has {classes} classes, 0 to {classes - 1}.",
            "Give the model one output a class, or number the labels from 0.",
        )
