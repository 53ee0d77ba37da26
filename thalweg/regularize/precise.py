"""Running statistics by forward passes over given data, for weights as they are: after averaging, or before evaluation.

Running statistics lag behind the weights, and averaged weights have none of their own. Here they are measured: each layer's
are the mean and the unbiased variance of *all* values that reach it, over all batches and ranks, while every layer before it
normalises by its batch, as in training. Torch's ``update_bn`` gives the plain mean of the batches' variances instead, which
leaves out how far their means lie apart and counts a small last batch like a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.core import DataError, seed_for
from thalweg.device import Device
from thalweg.device.kept import restored, same_generators, same_modes
from thalweg.regularize.moments import moments_of, num_ranks, pooled
from thalweg.regularize.ordered import ordered_sum
from thalweg.regularize.tracking import FrozenBatchNorm

Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class Estimate:
    """Statistics by layer name: (mean, unbiased variance), each (channels,)."""

    moments: Mapping[str, tuple[Tensor, Tensor]]

    def put(self, model: nn.Module) -> list[str]:
        """Copy them into the model's buffers for good; the names of the layers."""
        with torch.no_grad():
            for live, wanted in self._pairs(model):
                live.copy_(wanted)
        return list(self.moments)

    @contextmanager
    def put_in(self, model: nn.Module) -> Iterator[None]:
        """The model's buffers hold them; afterwards what they held before, to the bit."""
        with restored([live for live, _ in self._pairs(model)]):
            self.put(model)
            yield

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for name, (mean, var) in self.moments.items():
            layer = model.get_submodule(name)
            yield layer.get_buffer("running_mean"), mean
            yield layer.get_buffer("running_var"), var


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    training: bool = False,
    seed: int = 0,
    group: Any = None,
    leave: Collection[str] = (),
    in_order: bool = False,
) -> Estimate:
    """Measure the statistics of every batch-normalization layer; the model, its buffers and torch's generators stay as they are.

    Layers that are frozen are left out: ``FrozenBatchNorm``, and those in evaluation mode inside a model in training mode.

    Args:
        batches: on the model's device, 2 or more values a channel each; none needed where the model has no such layer.
        forward: ``forward(model, batch)`` runs the model, under autocast if training does. None: ``model(batch)``, or
            ``model(batch[0])`` for a tuple or list.
        training: other modules train too, so that dropout drops. By default it does not: the statistics are used in
            evaluation, where the layers see values that nothing was dropped from (Li et al. 2018, arXiv:1801.05134).
        seed: names the random streams where ``training`` draws from torch's generators.
        group: process group; None: the default one, where there is one. Every rank gives batches of its own, and all get
            the statistics of all.
        leave: names of further layers to leave out.
        in_order: the same bits whichever rank gives which batch; all sums of batches are kept until the end.

    Raises:
        DataError: if there is no batch.
    """
    layers = {name: layer for name, layer in _layers(model) if name not in leave}
    if not layers:
        return Estimate({})
    first = next(iter(layers.values())).running_mean
    sums = (_SumsInOrder if in_order else _Sums)(layers, Device(first.device).exact, first.device)
    num = 0
    with _apart(model, layers, training), sums.listening(), torch.no_grad():
        device = Device(first.device)
        for generator in device.generators():
            generator.manual_seed(seed_for(seed, "precise"))
        for batch in batches:
            (forward or _plainly)(model, batch)
            sums.batch_done()
            num += 1
    if not num and num_ranks(group) == 1:
        raise DataError(
            "Batch statistics cannot be estimated from no batch.",
            f"0 batches, {len(layers)} layers.",
            "Give 50 to 200 training batches.",
        )
    return Estimate(sums.pooled(group))


def reestimate(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None, **options: Any) -> list[str]:
    """Replace the running statistics by those of ``batches``, exactly pooled, with the weights as they are.

    Args:
        model, batches, forward, options: as for ``estimate``.

    Returns:
        The names of the layers whose statistics are new; empty for a model without batch normalization.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])])
    ['0']
    >>> model[0].running_mean.item(), model[0].running_var.item()
    (3.0, 2.5)
    """
    return estimate(model, batches, forward, **options).put(model)


class PreciseStatistics:
    """Estimated statistics for whatever weights the model holds, kept until the weights change.

    Args:
        model: read at each estimate. Layers that are in evaluation mode now, while the model is in training mode, are left
            out, whatever the modes later.
        batches: gives the batches anew; the same ones each time, so that a resumed run finds the same figures.
        forward, options: as for ``estimate``.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> precise = PreciseStatistics(model, lambda: [torch.tensor([[1.0], [3.0]])])
    >>> with precise.put_in(version=0):
    ...     model[0].running_mean.item()
    2.0
    >>> model[0].running_mean.item()
    0.0
    """

    def __init__(
        self, model: nn.Module, batches: Callable[[], Iterable[Any]], forward: Forward | None = None, **options: Any
    ) -> None:
        self.model, self.batches, self.forward, self.options = model, batches, forward, options
        if model.training:
            held = [
                name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) and not layer.training
            ]
            self.options["leave"] = [*self.options.get("leave", ()), *held]
        self._version: object = None
        self._found: Estimate | None = None

    def estimate(self, version: object = None) -> Estimate:
        """The statistics of the weights that the model holds just now.

        Args:
            version: names these weights, such as the step and whether they are averaged; an estimate is kept as long as it
                is asked for under the same name. None: nothing is kept.
        """
        if self._found is None or version is None or version != self._version:
            self._found = estimate(self.model, self.batches(), self.forward, **self.options)
            self._version = version
        return self._found

    @contextmanager
    def put_in(self, version: object = None) -> Iterator[None]:
        """The model's buffers hold the estimate; afterwards what they held before, to the bit.

        Enter it inside the context that puts averaged weights into the model.
        """
        with self.estimate(version).put_in(self.model):
            yield


class _Sums:
    """Counts, sums and sums of squares of what reaches each layer, in one flat tensor."""

    def __init__(self, layers: Mapping[str, Any], exact: torch.dtype, device: torch.device) -> None:
        self.layers = layers
        widths = [layer.num_features for layer in layers.values()]
        self.flat = torch.zeros(3 * sum(widths), dtype=exact, device=device)
        self.parts = dict(zip(layers, self.flat.view(3, -1).split(widths, dim=1)))

    @contextmanager
    def listening(self) -> Iterator[None]:
        hooks = [
            layer.register_forward_pre_hook(self._adder(name), with_kwargs=True) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adder(self, name: str) -> Callable[..., None]:
        count, total, squares = self.parts[name]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            num, mean, var = moments_of(inputs[0] if inputs else named["input"], self.flat.dtype)
            count.add_(num)
            total.add_(num * mean)
            squares.add_(num * (var + mean * mean))

        return hook

    def batch_done(self) -> None:
        """All layers have seen a batch."""

    def over_ranks(self, group: Any) -> None:
        if num_ranks(group) > 1:
            dist.all_reduce(self.flat, group=group)

    def pooled(self, group: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """By name; a layer that nothing reached keeps what it has."""
        self.over_ranks(group)
        found = {}
        for name, (count, total, squares) in self.parts.items():
            live = self.layers[name].running_mean, self.layers[name].running_var
            found[name] = tuple(
                torch.where(count > 0, new.to(old.dtype), old) for new, old in zip(pooled(count, total, squares), live)
            )
        return found  # type: ignore[return-value]


class _SumsInOrder(_Sums):
    """The same, to the bit the same whichever rank has seen which batch."""

    def __init__(self, layers: Mapping[str, Any], exact: torch.dtype, device: torch.device) -> None:
        super().__init__(layers, exact, device)
        self._rows: list[Tensor] = []

    def batch_done(self) -> None:
        self._rows.append(self.flat.clone())
        self.flat.zero_()

    def over_ranks(self, group: Any) -> None:
        rows = torch.stack(self._rows) if self._rows else self.flat.new_zeros(0, len(self.flat))
        if num_ranks(group) == 1:
            self.flat.copy_(ordered_sum(rows))
            return

        def reduced(x: Tensor, how: Any) -> Tensor:
            dist.all_reduce(x, op=how, group=group)
            return x

        num = int(reduced(torch.tensor([len(rows)], device=rows.device), dist.ReduceOp.SUM))
        largest, added = (lambda x, how=how: reduced(x, how) for how in (dist.ReduceOp.MAX, dist.ReduceOp.SUM))
        self.flat.copy_(ordered_sum(rows, num, largest, added))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        tracks = isinstance(layer, _BatchNorm) and layer.running_mean is not None
        if tracks and not isinstance(layer, FrozenBatchNorm) and (layer.training or not model.training):
            yield name, layer


@contextmanager
def _apart(model: nn.Module, layers: Mapping[str, Any], training: bool) -> Iterator[None]:
    """The layers normalise by batches; modes, buffers and generators are afterwards as they were."""
    device = Device(next(iter(layers.values())).running_mean.device)
    with same_modes(model), restored(list(model.buffers())), same_generators(device):
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                module.training = training
        for layer in layers.values():
            layer.training = True
        yield


def _plainly(model: nn.Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
