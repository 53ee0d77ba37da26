"""What a trial leaves as it was: tensors, training modes, torch's generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from thalweg.device.backend import Device


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever is written to the tensors inside, afterwards they hold what they held before, to the bit.

    Cost: a copy of them.
    """
    kept = [x.detach().clone() for x in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, before in zip(tensors, kept):
                x.copy_(before)


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode, training or evaluation, that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def same_generators(device: Device) -> Iterator[None]:
    """Afterwards torch's generators stand where they stood."""
    states = [(generator, generator.get_state()) for generator in device.generators()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
