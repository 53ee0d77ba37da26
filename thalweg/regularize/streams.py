"""Named random numbers for layers: a mask is a function of (seed, step, sample or micro-batch, layer, call, element).

Nothing is drawn and nothing is carried, so a resumed run, a recomputed block and another split of the same window see the
masks that they should. The numbers that change lie in small tensors on the device, written in place before each forward
pass: a compiled model sees the same tensors at every step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thalweg.core import ModelError, did_you_mean, seed_for
from thalweg.device.counters import hashed
from thalweg.regularize.keyed import Keyed

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_KEPT_SIZES = 8


def _signed(number: int) -> int:
    """The low 32 bits as a signed number."""
    return ((number + 2**31) & 0xFFFFFFFF) - 2**31


class Streams:
    """The random numbers of a model's dropout layers, named by where they are used.

    Without ``by_sample`` a mask is a function of (seed, step, micro-batch, layer, call, element). With it, the micro-batch
    gives way to the sample's place in the window: another split of the window into micro-batches gives the same masks.

    A backward pass that recomputes (activation checkpointing) must come before the next ``begin``. After the last step, ``release``
    the layers.

    Args:
        seed: of the run.
        device: where the model is.
        by_sample: needs the samples in the first dimension of what each layer is given: num, or a multiple of num with the
            rows of a sample next to each other, such as (samples * heads, ...).
    """

    def __init__(self, seed: int, device: torch.device | str, *, by_sample: bool) -> None:
        self.seed, self.device, self.by_sample = seed, torch.device(device), by_sample
        self._layers: list[Keyed] = []
        self._ids = torch.zeros(0, 1, dtype=torch.int32)
        self._tables: dict[int, _Table] = {}
        self._num = 0

    def attach(self, layers: Mapping[str, Keyed]) -> None:
        """Take layers under their names, in place of those from before, and from another ``Streams`` that has them.

        A layer's numbers hang on its own name, not on what else there is.
        """
        for release in [self.release, *(layer._release for layer in layers.values())]:
            if release is not None:
                release()
        self._layers = list(layers.values())
        for name, layer in layers.items():
            layer._name, layer._by_sample, layer._release = name, self.by_sample, self.release
        names = [_signed(seed_for(0, "layer", name)) for name in layers]
        self._ids = torch.tensor(names, dtype=torch.int32).view(-1, 1).to(self.device)

    def release(self) -> None:
        """Let the layers draw from torch's global generator again."""
        for layer in self._layers:
            layer._leave()
        self._layers = []
        self._tables.clear()
        self._num = 0

    def begin(self, step: int, index: int, first: int, num: int) -> None:
        """A forward pass is about to run. Until the first one, layers draw from torch's generator.

        Args:
            step: counts updates, from 0.
            index: of the micro-batch in its window.
            first, num: the samples of the window that it holds: ``first`` to ``first + num - 1``.

        Raises:
            ModelError: if there is no sample.
        """
        if num < 1 or first < 0:
            raise ModelError(
                f"A forward pass over {num} samples from sample {first} on has no masks.",
                f"step={step}, micro-batch {index}.",
                "Give first of at least 0 and num of at least 1.",
            )
        if not self._layers:
            return
        if num != self._num:
            self._resize(num)
        for layer in self._layers:
            layer.__dict__["_calls"] = 0  # past nn.Module's slow setter: this runs in every pass
        of_step = of_pass = _signed(seed_for(self.seed, "dropout", step))
        if not self.by_sample:
            first, of_pass = 0, _signed(seed_for(self.seed, "dropout", step, index))
        self._tables[num].fill(self._ids, of_pass, of_step, first)

    def _resize(self, num: int) -> None:
        if num not in self._tables:
            if len(self._tables) >= _KEPT_SIZES:
                self._tables.clear()
            self._tables[num] = _Table(len(self._layers), num, self.device)
        for layer, keys in zip(self._layers, self._tables[num].keys):
            layer._rows, layer._fixed = keys[:num].view(num, 1), keys[num:].view(1, 1)
        self._num = num


class _Table:
    """Keys for each layer: one for each of ``num`` samples, and the step's own."""

    def __init__(self, layers: int, num: int, device: torch.device) -> None:
        self.keys = torch.zeros(layers, num + 1, dtype=torch.int32, device=device)
        self.places = torch.arange(num, dtype=torch.int32, device=device)
        samples = torch.full((num + 1,), -1, dtype=torch.int32, device=device)  # the step's own is no sample
        bases = torch.zeros_like(samples)
        self.samples, self.bases = samples, bases
        self.of_samples, self.of_pass, self.of_step = samples[:num], bases[:num], bases[num]

    @torch.no_grad()
    def fill(self, ids: Tensor, of_pass: int, of_step: int, first: int) -> None:
        self.of_pass.fill_(of_pass)
        self.of_step.fill_(of_step)
        torch.add(self.places, first, out=self.of_samples)
        self.keys.copy_(hashed(self.samples, ids + self.bases, 3))


def connect(model: nn.Module, streams: Streams) -> list[str]:
    """Give every dropout layer of ours in ``model`` its random numbers from ``streams``.

    To be called once, when the model is on its device; wrappers such as torch.compile's do not change the names.

    Returns:
        The layers' names.
    """
    while isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        model = model.module
    layers = {_plain(name): module for name, module in model.named_modules() if isinstance(module, Keyed)}
    streams.attach(layers)
    return list(layers)


def set_factors(model: nn.Module, factors: Mapping[str, Tensor | None]) -> None:
    """Let one number on the device scale the rate of many layers.

    Args:
        model: its layers keep the tensors themselves: who writes into one changes the rate from then on.
        factors: 0-dim float tensors, or None for the full rate; "stochastic_depth" for StochasticDepth, "dropout" for all
            others. A name that is not given keeps what it has.

    Raises:
        ModelError: for another name, or a tensor that is not one number.
    """
    known = ("dropout", "stochastic_depth")
    for name, factor in factors.items():
        if name not in known:
            raise ModelError(
                f"There are no rates called '{name}'.", did_you_mean(name, known), "Use one of these names."
            )
        if factor is not None and (factor.ndim or not factor.is_floating_point()):
            raise ModelError(
                f"The factor of '{name}' is not one number.",
                f"It has shape {tuple(factor.shape)} and dtype {factor.dtype}.",
                "Give a 0-dim float tensor on the model's device.",
            )
    for module in model.modules():
        if isinstance(module, Keyed) and module.rate in factors:
            module.factor = factors[module.rate]


def _plain(name: str) -> str:
    """A module's name without the wrappers around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
