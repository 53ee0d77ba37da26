"""Precision policies: what a pass computes in, and what stands around passes."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from thalweg.core import DeviceError, MissingExtra
from thalweg.core.recipe import PRECISIONS
from thalweg.device import Device, attention, float32_products
from thalweg.precision.functions import FUNCTIONS, InFloat32

_NONE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@dataclass(frozen=True)
class Policy:
    """How passes compute. Slots and averages are not its business: they keep at least float32.

    Attributes:
        name: as in a recipe.
        autocast: the dtype that torch's autocast brings matrix products and convolutions to, or None.
        scaled: whether the loss is scaled, dynamically, because gradients would underflow.
        products: of what stays float32, "ieee" or "tf32".
        stored: dtype of the parameters, and of what goes through the model, or None: as the model has it.
        float8: whether linear layers multiply in 8 bits.
        islands: words of what computes in float32 though it is a function and no module: "softmax", "norm".
    """

    name: str
    autocast: torch.dtype | None = None
    scaled: bool = False
    products: str = "ieee"
    stored: torch.dtype | None = None
    float8: bool = False
    islands: frozenset[str] = frozenset()

    def context(self, device: Device) -> contextlib.AbstractContextManager[None]:
        """For passes that stand alone, such as evaluation: ``around`` and ``forward`` in one."""
        return self._both(device)

    @contextlib.contextmanager
    def _both(self, device: Device) -> Iterator[None]:
        with self.around(device), self.forward(device):
            yield

    def forward(self, device: Device) -> contextlib.AbstractContextManager[object]:
        """For a forward pass and its loss, inside ``around``; the backward pass does not belong in it."""
        return _NONE if self.autocast is None else torch.autocast(device.kind, dtype=self.autocast)

    def around(self, device: Device, passes: int = 1) -> contextlib.AbstractContextManager[object]:
        """For all forward and backward passes between which no weight changes.

        Args:
            passes: how many forward passes there are. From two on, the half-precision copies that autocast makes of weights
                are kept from the first to the last; alone they would be made anew for each. The same bits either way.
        """
        if device.is_host and (self.autocast or self.stored):
            attention.ready()
        products = float32_products(self.products, device.kind)
        if not self.islands and (self.autocast is None or passes == 1):
            return products
        return self._around(products, device, passes)

    @contextlib.contextmanager
    def _around(self, products: float32_products, device: Device, passes: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(products)
            if self.autocast is not None and passes > 1:
                stack.enter_context(torch.autocast(device.kind, dtype=self.autocast, enabled=False))
            if self.islands:
                stack.enter_context(InFloat32(self.islands, device.kind, back=self.stored is not None))
            yield


POLICIES = {
    "fp32": Policy("fp32"),
    "tf32": Policy("tf32", products="tf32"),
    "bf16": Policy("bf16", autocast=torch.bfloat16),
    "fp16": Policy("fp16", autocast=torch.float16, scaled=True),
    "bf16-pure": Policy("bf16-pure", stored=torch.bfloat16),
    "fp8": Policy("fp8", autocast=torch.bfloat16, float8=True),
}
assert tuple(POLICIES) == PRECISIONS


def policy_for(name: str, device: Device, islands: tuple[str, ...] | None = None) -> Policy:
    """The policy called ``name``, if ``device`` has it.

    Args:
        islands: as in a recipe; None: none beyond the policy's own.

    Raises:
        DeviceError: if the device cannot. MissingExtra: for fp8 without torchao.
    """
    here = device.precisions
    if name not in here:
        raise DeviceError(
            f"precision={name!r} is not possible on {device.torch_device}.",
            f"{device.why_not(name)}It has {', '.join(here)}.",
            "Use one of these, or precision='auto'.",
        )
    if name == "fp8":
        check_torchao()
    functions = frozenset(islands or ()) & FUNCTIONS.keys()
    return replace(POLICIES[name], islands=functions) if functions else POLICIES[name]


def check_torchao() -> None:
    """Refuse fp8 where its package is missing.

    Raises:
        MissingExtra: without torchao.
    """
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtra(
            "precision='fp8' needs the package torchao.",
            "It is not installed.",
            "Install it: pip install 'thalweg[fp8]'; or use precision='bf16'.",
        )
