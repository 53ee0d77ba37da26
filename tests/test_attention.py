"""The backward pass of half-precision attention on the CPU: whose numbers it is, how near, and where it is left to torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.device import Device, attention
from thalweg.precision import POLICIES

_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@pytest.fixture(autouse=True)
def torchs_own_before_and_after() -> Iterator[None]:
    attention.undo()
    yield
    attention.undo()


def tensors(time: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result, 2 x 3 heads, as rows of one projection lie in a net."""
    draw = torch.Generator().manual_seed(0)
    joined = torch.randn(2, time, 4, 3, width, generator=draw).to(dtype)
    return list(joined.permute(2, 0, 3, 1, 4))


def gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return list(torch.autograd.grad(mixed, (q, k, v), grad))


def by_definition(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None, causal: bool) -> list[Tensor]:
    """In float64, from softmax(q k' / sqrt(width)) v (Vaswani et al., 2017)."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    if mask is not None:
        scores = scores + mask.double()
    return list(torch.autograd.grad(scores.softmax(-1) @ v, (q, k, v), grad.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (False, False), (False, True)])
def test_gradients_are_the_definitions_and_no_further_off_than_torchs(
    dtype: torch.dtype, causal: bool, masked: bool
) -> None:
    given = tensors(33, 16, dtype)
    mask = torch.randn(2, 1, 33, 33, generator=torch.Generator().manual_seed(1)).to(dtype) if masked else None
    exact = by_definition(*given, mask, causal)
    torchs = gradients(*given, mask, causal=causal)
    attention.ready()
    ours = gradients(*given, mask, causal=causal)
    for mine, theirs, right in zip(ours, torchs, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        off = (mine.double() - right).norm() / right.norm()
        assert off < 4 * torch.finfo(dtype).eps
        assert off <= 1.01 * (theirs.double() - right).norm() / right.norm()


def test_short_attention_alone_goes_to_float32_and_only_in_half_precision() -> None:
    long = tensors(257, 64, torch.bfloat16)
    wide = tensors(33, 16, torch.float32)
    torchs = [gradients(*given, causal=True) for given in (long, wide)]
    attention.ready()
    ours = [gradients(*given, causal=True) for given in (long, wide)]
    for mine, theirs in zip(ours, torchs, strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert 257 * 64 > attention.MOST >= 256 * 64


def test_short_attention_has_float32s_gradients_to_the_bit() -> None:
    q, k, v, grad = tensors(64, 32, torch.bfloat16)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    rounded = [x.float() for x in (grad, q, k, v, out)]
    exact = [x.bfloat16() for x in _BACKWARD(*rounded, sums, 0.0, True)]
    assert not all(map(torch.equal, gradients(q, k, v, grad, causal=True), exact))
    attention.ready()
    assert all(map(torch.equal, gradients(q, k, v, grad, causal=True), exact))
    attention.undo()
    assert not all(map(torch.equal, gradients(q, k, v, grad, causal=True), exact))


@pytest.mark.parametrize(("precision", "there"), [("bf16", True), ("bf16-pure", True), ("fp32", False)])
def test_a_policy_in_half_precision_brings_it(precision: str, there: bool) -> None:
    with POLICIES[precision].around(Device(torch.device("cpu"))):
        pass
    assert (attention._Held.library is not None) == there
