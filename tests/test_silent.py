"""Operators without effect on a device: found by trying them, and what stands in their place. On a TPU itself: tests/tpu."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import run_cli
from thalweg.core import DeviceError
from thalweg.device import Device, aot, silent, simulated
from thalweg.device.products import _MatmulPrecision
from thalweg.engine.compiled_backend import FEW, Compiler


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_statistics_by_hand_are_torchs(name: str, weighted: bool) -> None:
    x = some(4, 3, 5, 2)
    weight, bias = (some(3), some(3, 1).view(3)) if weighted else (None, None)
    found = []
    for norm in (getattr(F, name), getattr(silent, f"_{name}")):
        mean, var, given = some(3), some(3).abs(), x.clone().requires_grad_()
        out = norm(given, mean, var, weight, bias, True, 0.3, 1e-5)
        out.pow(3).sum().backward()
        found.append((out, given.grad, mean, var))
    for theirs, ours in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[0][2], some(3))


@pytest.mark.parametrize("options", [(3,), ((2,), (1,), (1,)), (3, 2, 1, True, False)])
def test_pooling_of_flat_images_is_torchs(options: Any) -> None:
    x = some(2, 3, 8)
    torch.testing.assert_close(silent._avg_pool1d(x, *options), F.avg_pool1d(x, *options), rtol=1e-12, atol=1e-12)


@pytest.fixture
def untrusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU is a device that nobody knows, and what is replaced on it comes back."""
    monkeypatch.setattr(silent, "_TRUSTED", ())
    monkeypatch.setattr(silent, "_found", {})
    kept = {name: getattr(F, name) for name in silent._MENDED}
    yield
    for name, function in kept.items():
        setattr(F, name, function)


MODEL = nn.Sequential(nn.BatchNorm1d(2), nn.InstanceNorm1d(2))


def test_what_works_is_not_replaced(untrusted: None) -> None:
    before = F.batch_norm
    assert silent.mend(MODEL, torch.device("cpu")) == [] and F.batch_norm is before


def test_what_has_no_effect_is_replaced_on_that_device_alone(untrusted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def still(x: Tensor, mean: Any, var: Any, *rest: Any) -> Tensor:
        return F.layer_norm(x, x.shape[1:])

    monkeypatch.setitem(
        silent._MENDED, "batch_norm", (lambda device: silent._moves(still, device), *silent._MENDED["batch_norm"][1:])
    )
    ((name, what),) = silent.mend(MODEL, torch.device("cpu"))
    assert name == "batch_norm" and "did not move when it was tried" in what
    assert silent.mend(MODEL, torch.device("cpu")) == [(name, what)]  # once more: told again, and not wrapped twice
    assert F.batch_norm.replaced_on == ("cpu",)  # type: ignore[attr-defined]
    layer = nn.BatchNorm1d(2, momentum=0.5)
    layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert layer.running_mean is not None and layer.running_mean.tolist() == [1.0, 1.5]
    assert F.batch_norm(torch.ones(2, 2, device="meta"), None, None, training=True).shape == (2, 2)


def test_a_recurrent_model_is_tried_in_a_graph(untrusted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(silent, "_recurrent", lambda kind, backend, device: kind is not nn.GRU)
    assert silent.untrainable_in_graphs(nn.LSTM(2, 2), device, "eager") == ""
    assert "what GRU gives in a compiled graph has no gradient" in silent.untrainable_in_graphs(
        nn.Sequential(nn.GRU(2, 2)), device, "eager"
    )
    monkeypatch.setattr(Device, "against_graphs", lambda self, model: "it has no gradient there")
    from thalweg import train

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    recipe = {"train.steps": 1, "train.batch": 2, "device": "cpu", "precision": "fp32", "compile": "step"}
    with pytest.raises(
        Exception, match=r"compile='step' is not possible in this run.\s+The reason: it has no gradient there"
    ):
        train(nn.Linear(2, 1), loss, {"x": torch.ones(4, 2)}, recipe)


def test_the_switch_of_products_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.device import products

    monkeypatch.setattr(products, "_switches", lambda kind: (_MatmulPrecision(),))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with products.float32_products("ieee", "tpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_compilations_are_counted_and_too_many_are_warned_of() -> None:
    compiler = Compiler("eager")
    compiler.note("single", ({"x": torch.ones(4, 2)}, ()), 1.5)
    compiler.stepped = True
    for size in range(FEW + 1):
        compiler.note("single", ({"x": torch.ones(size, 2)}, ()), 0.5)
    assert compiler.news[0] == "The graph 'single' was compiled in 1.5 s."
    assert compiler.news[1].endswith("in 0.5 s, number 1 after the first step, for x 0x2 after x 4x2.")
    assert "time lost" not in compiler.news[FEW] and "More than 3 are time lost" in compiler.news[FEW + 1]


def test_what_is_missing_for_a_tpu_elsewhere_is_said(tmp_path: Path) -> None:
    if aot.library() is not None or not simulated.why_not():
        pytest.skip("libtpu is here: tests/tpu asks it")
    wanted = ("--set", "model.width=4", "--set", "train.micro_batch=64", "--set", "train.steps=2")
    done = run_cli("plan", "digits", "--on", "tpu-v5e", "--compile", *wanted, cwd=tmp_path)
    assert done.returncode == 0
    assert "not compiled for tpu-v5e: libtpu is not installed here: pip install libtpu" in " ".join(done.stdout.split())
    assert "'thalweg[tpu-test]'" in done.stdout
    assert aot.why_not("tpu-v7") == "libtpu is asked for tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e alone"
    with pytest.raises(DeviceError, match="Nothing can be compiled for tpu-v5e here"):
        aot.Compiler("tpu-v5e")
    with pytest.raises(DeviceError, match="A TPU cannot be simulated here"):
        simulated.begin()
