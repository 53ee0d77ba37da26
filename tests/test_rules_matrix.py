"""The rules that see whole matrices: agreement with their papers, with other libraries, and with theory."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles_matrix import CASES, ORACLES
from tests.rulekit import trajectory
from thalweg.core import RecipeError
from thalweg.rules import RULES, STAGES
from thalweg.rules._newton_schulz import orthogonalize

F64 = torch.float64
ALL = [(name, {}) for name in ORACLES] + CASES


def normals(*shapes: tuple[int, ...], steps: int, dtype: torch.dtype = F64) -> list[list[Tensor]]:
    return [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(steps)]


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=F64))[0]


def run(rule: str, starts: list[Tensor], gs: list[list[Tensor]], **words: Any) -> list[Tensor]:
    if "noise" in RULES[rule].needs:
        words.setdefault("noise", [[torch.randn_like(g) for g in each] for each in gs])
    return trajectory(rule, starts, gs, **words)


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_agrees_with_its_float64_transcription(name: str, options: dict[str, Any], stack: bool) -> None:
    # squares for what starts from eigenvectors: those of a single gradient are not unique in a null space
    square = name in ("soap", "kl_shampoo")
    shapes = [(6, 6), (6, 6), (3, 4, 4)] if square else [(4, 9), (4, 9), (8, 3), (3, 6, 4), (4, 2, 2, 2)]
    starts, gs, noise = normals(*shapes, steps=1)[0], normals(*shapes, steps=20), normals(*shapes, steps=20)
    more: dict[str, Any] = {"noise": noise} if name == "kron" else {}
    got = trajectory(name, starts, gs, lr=0.01, stack=stack, **more, **options)
    plain = {k: [[x.numpy() for x in each] for each in v] for k, v in more.items()}
    wanted = ORACLES[name](
        [p.numpy() for p in starts], [[g.numpy() for g in each] for each in gs], lr=0.01, **plain, **options
    )
    for mine, other in zip(got, wanted):
        np.testing.assert_allclose(mine.numpy(), other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(ORACLES))
def test_a_zero_gradient_or_rate_moves_nothing_and_keeps_all_finite(name: str) -> None:
    start = [torch.randn(4, 6)]
    zeros, gs = [[torch.zeros(4, 6)] for _ in range(12)], normals((4, 6), steps=12, dtype=torch.float32)
    assert torch.equal(run(name, start, zeros, lr=1.0)[0], start[0])
    assert torch.equal(run(name, start, gs, lr=0.0)[0], start[0])
    assert run(name, start, zeros + gs)[0].isfinite().all()


@pytest.mark.parametrize("name", list(ORACLES))
def test_a_gradient_that_is_not_finite_raises_nothing(name: str) -> None:
    gs = normals((4, 6), steps=3, dtype=torch.float32)
    for bad in (math.inf, math.nan):
        gs[0][0][1, 2] = bad
        run(name, [torch.randn(4, 6)], gs)


@pytest.mark.parametrize("name", list(ORACLES))
def test_keeps_float32(name: str) -> None:
    rule = RULES[name]
    keep = trajectory(
        name, [torch.randn(4, 6)], normals((4, 6), steps=2, dtype=torch.float32), noise=[[torch.randn(4, 6)]] * 2
    )
    assert keep[0].dtype == torch.float32
    assert rule.reads == "matrix" and rule.least_ndim == 2


# --- other libraries


def against(optimizer: Any, name: str, gs: list[list[Tensor]], start: Tensor, **words: Any) -> float:
    """Largest difference between ``optimizer(params)`` and our rule after the same gradients."""
    p = torch.nn.Parameter(start.clone())
    other = optimizer([p])
    for (g,) in gs:
        p.grad = g.clone()
        other.step()
    return float((trajectory(name, [start], gs, **words)[0] - p.detach()).abs().max())


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (3, 8)])
def test_muon_is_torchs_but_for_rounding(adjust: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def other(ps: Any) -> torch.optim.Optimizer:
        return torch.optim.Muon(ps, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)

    start, gs = torch.randn(shape), normals(shape, steps=10, dtype=torch.float32)
    words: dict[str, Any] = {"lr": 0.02, "decay": 0.1, "scale": adjust}
    assert against(other, "muon", gs, start, **words) < 2e-2  # bf16: each of us rounds at another place
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())  # torch's iteration in float64
    gs64 = [[g.double() for g in each] for each in gs]
    assert against(other, "muon", gs64, start.double(), **words) < 1e-12


def test_muon_is_optaxs_without_nesterov() -> None:
    optax = pytest.importorskip("optax")
    contrib = pytest.importorskip("optax.contrib")
    start, gs = torch.randn(6, 4), normals((6, 4), steps=10, dtype=torch.float32)
    for options, theirs in (({}, {}), ({"coefficients": "newton-schulz", "steps": 3}, {"ns_steps": 3})):
        tx = contrib.scale_by_muon(nesterov=False, **theirs)
        p, state = start.numpy().copy(), tx.init(start.numpy())
        for (g,) in gs:
            change, state = tx.update(g.numpy(), state)
            p = optax.apply_updates(p, -0.02 * change)
        got = trajectory("muon", [start], gs, lr=0.02, nesterov=False, precision="fp32", scale="none", **options)[0]
        np.testing.assert_allclose(got.numpy(), np.asarray(p), atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (3, 8)])
@pytest.mark.parametrize(("name", "theirs"), [("muon", "Muon"), ("normuon", "NorMuon")])
def test_muon_and_normuon_are_pytorch_optimizers_but_for_rounding(
    name: str, theirs: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    module = importlib.import_module(f"pytorch_optimizer.optimizer.muon.{'base' if name == 'muon' else name}")
    iteration = "zero_power_via_newton_schulz_5"
    monkeypatch.setattr(module, iteration, functools.partial(getattr(module, iteration), dtype=F64))
    start, gs = torch.randn(shape, dtype=F64), normals(shape, steps=10)

    def other(ps: Any) -> torch.optim.Optimizer:
        return getattr(peers, theirs)([{"params": ps, "use_muon": True}], lr=0.02, weight_decay=0.1, foreach=False)

    assert against(other, name, gs, start, lr=0.02, decay=0.1) < 1e-10


def test_soap_is_pytorch_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    start, gs = torch.randn(6, 6, dtype=F64), normals((6, 6), steps=25)

    def other(decay: float) -> Any:
        return lambda ps: peers.SOAP(ps, lr=0.01, weight_decay=decay, precondition_frequency=5)

    rounded = against(other(0.0), "soap", gs, start, lr=0.01, frequency=5)
    assert rounded < 1e-5  # its QR runs in float32
    exact = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: exact(x.double()))
    monkeypatch.setattr(torch, "float32", torch.float64)  # as it asks for: power_iter.to(torch.float32)
    assert against(other(0.0), "soap", gs, start, lr=0.01, frequency=5) < 1e-10
    keep: list[list[Tensor]] = [[start]]
    trajectory("soap", [start], gs, lr=0.01, frequency=5, keep=keep)
    p, theirs = start, torch.nn.Parameter(start.clone())
    optimizer = other(0.1)([theirs])
    for t, (g,) in enumerate(gs):
        p = (p + keep[t + 1][0] - keep[t][0]) * (
            1 - 0.01 * 0.1 * (t > 0)
        )  # its decay: after the change, not at the first
        theirs.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(p, theirs.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 5), (6, 4)])
def test_shampoo_sum_is_pytorch_optimizers(shape: tuple[int, int]) -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    start, gs = torch.randn(shape, dtype=F64), normals(shape, steps=20)
    words: dict[str, Any] = {"variant": "sum", "graft": "none", "b1": 0.0, "frequency": 1, "eps": 1e-3}

    def other(ps: Any) -> torch.optim.Optimizer:
        return peers.Shampoo(ps, lr=0.01, matrix_eps=1e-3, weight_decay=0.0)

    assert against(other, "shampoo", gs, start, lr=0.01, **words) < 1e-6


def timms_kron() -> Any:
    """timm's file alone, since the whole of timm needs torchvision; nothing of it stays imported."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("could not import 'timm'")
    place = found.submodule_search_locations[0]
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "timm"}
    try:
        for name, path in (("timm", place), ("timm.optim", f"{place}/optim")):
            package = types.ModuleType(name)
            package.__path__ = [path]
            sys.modules[name] = package
        return importlib.import_module("timm.optim.kron")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.parametrize(("shape", "largest"), [((5, 5), 8192), ((4, 7), 8192), ((4, 7), 5), ((6, 3), 2)])
def test_kron_is_timms(shape: tuple[int, int], largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kron = timms_kron()
    monkeypatch.setattr(kron, "has_dynamo", False)
    monkeypatch.setattr(  # its triangular solve is in float32
        kron, "_solve_triangular_right", lambda x, a: torch.linalg.solve_triangular(a, x, upper=True, left=False)
    )
    start, gs = torch.randn(shape, dtype=F64), normals(shape, steps=20)

    def other(ps: Any) -> torch.optim.Optimizer:
        return kron.Kron(
            ps,
            lr=0.01,
            preconditioner_update_probability=1.0,
            max_size_triangular=largest,
            decoupled_decay=True,
            weight_decay=0.1,
        )

    torch.manual_seed(3)
    noise = [[torch.randn(shape, dtype=F64)] for _ in gs]
    torch.manual_seed(3)
    assert against(other, "kron", gs, start, lr=0.01, decay=0.1, noise=noise, max_dim=largest) < 1e-10


# --- theory


@pytest.mark.parametrize("coefficients", ["newton-schulz", "polar-express"])
@pytest.mark.parametrize("shape", [(5, 5), (4, 11), (11, 4)])
def test_muons_change_commutes_with_rotations(coefficients: str, shape: tuple[int, int]) -> None:
    u, v = orthogonal(shape[0]), orthogonal(shape[1])
    gs = normals(shape, steps=4)
    zero = [torch.zeros(shape, dtype=F64)]
    plain = trajectory("muon", zero, gs, coefficients=coefficients)[0]
    turned = trajectory("muon", zero, [[u @ g @ v] for (g,) in gs], coefficients=coefficients)[0]
    torch.testing.assert_close(turned, u @ plain @ v, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("coefficients", "least", "most"), [("newton-schulz", 0.65, 1.21), ("polar-express", 0.85, 1.13)]
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("gram", ["auto", "off"])
def test_singular_values_of_muons_change_lie_in_the_published_band(
    coefficients: str, least: float, most: float, precision: str, gram: str
) -> None:
    size = 32
    g = orthogonal(size) @ torch.diag(torch.logspace(0, -1.5, size, dtype=F64)) @ orthogonal(4 * size)[:size]
    zero = [torch.zeros(size, 4 * size)]
    words: dict[str, Any] = {"coefficients": coefficients, "precision": precision, "gram": gram}
    change = trajectory("muon", zero, [[g.float()]], lr=1.0, **words)[0]
    values = torch.linalg.svdvals(change.double())
    slack = 0.03 if precision == "bf16" else 0.005
    assert least - slack < float(values.min()) and float(values.max()) < most + slack


@pytest.mark.parametrize("coefficients", ["newton-schulz", "polar-express"])
@pytest.mark.parametrize("kind", ["normal", "positive", "rank one and noise", "decaying"])
def test_pairs_of_iterations_are_as_exact_as_single_ones_in_bf16(coefficients: str, kind: str) -> None:
    x = torch.randn(64, 256, dtype=F64)
    if kind == "positive":
        x = x.abs()
    if kind == "rank one and noise":
        x = 0.1 * x + torch.randn(64, 1, dtype=F64) * torch.randn(1, 256, dtype=F64)
    if kind == "decaying":
        x = x * torch.logspace(0, -2, 64, dtype=F64)[:, None]
    words: dict[str, Any] = {"steps": 5, "coefficients": coefficients}
    exact = orthogonalize(x, gram=False, **words)
    error = [
        float((orthogonalize(x.to(torch.bfloat16), gram=gram, **words).to(F64) - exact).norm() / exact.norm())
        for gram in (False, True)
    ]
    assert error[1] < max(3 * error[0], 0.08)
    torch.testing.assert_close(orthogonalize(x, gram=True, **words), exact, rtol=0, atol=1e-11)


def test_large_stacks_are_updated_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, gs = normals(*[(4, 6)] * 5, steps=1)[0], normals(*[(4, 6)] * 5, steps=3)
    wanted = trajectory("muon", starts, gs, stack=True)
    for most in (1, 50):
        monkeypatch.setattr("thalweg.optim.eager.STACK", most)
        for got, want in zip(trajectory("muon", starts, gs, stack=True), wanted):
            torch.testing.assert_close(got, want)


def test_muon_splits_rows_into_heads_or_says_why_not() -> None:
    start, gs = torch.zeros(6, 5, dtype=F64), normals((6, 5), steps=3)
    whole = trajectory("muon", [start], gs, heads=3)[0]
    parts = [trajectory("muon", [start[i : i + 2]], [[g[i : i + 2]] for (g,) in gs])[0] for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat(parts))
    with pytest.raises(RecipeError, match=r"heads=4.*6 rows"):
        trajectory("muon", [start], gs, heads=4)


def test_soap_on_rows_and_columns_that_never_mix_is_adam() -> None:
    """Diagonal gradients have diagonal Grams: the eigenbasis is a permutation, in which Adam is Adam."""
    start = torch.diag(torch.randn(5, dtype=F64))
    sizes = torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0], dtype=F64)  # far apart, so that their order stays
    gs = [[torch.diag(sizes * (1 + 0.1 * torch.randn(5, dtype=F64)))] for _ in range(12)]
    got = trajectory("soap", [start], gs, frequency=1, eps=1e-16)[0]
    # the first gradient only sets the bases
    wanted = trajectory("adam", [start], gs[1:], b1=0.95, b2=0.95, eps=1e-16)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_soap_with_fixed_eigenvectors_is_adam_in_their_basis() -> None:
    u, v = orthogonal(5), orthogonal(5)
    sizes = torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0], dtype=F64)
    flat = [[torch.diag(sizes * (1 + 0.1 * torch.randn(5, dtype=F64)))] for _ in range(12)]
    zero = [torch.zeros(5, 5, dtype=F64)]
    got = trajectory("soap", zero, [[u @ g @ v.T] for (g,) in flat], frequency=1)[0]
    wanted = trajectory("adam", zero, flat[1:], b1=0.95, b2=0.95)[0]
    torch.testing.assert_close(got, u @ wanted @ v.T, rtol=1e-6, atol=1e-6)  # zeros are noise over eps


def test_soap_starts_from_the_exact_basis_whenever_its_first_gradient_comes() -> None:
    """A matrix without gradients so far takes eigh at its first refresh with them, beside others in one stack."""
    shape = (4, 4)
    early = normals(shape, steps=8)
    late = [[torch.zeros(shape, dtype=F64)]] * 4 + normals(shape, steps=4)
    starts = normals(shape, shape, steps=1)[0]
    both = [[a, b] for (a,), (b,) in zip(early, late)]
    stacked = trajectory("soap", starts, both, frequency=2, stack=True)
    for start, gs, got in zip(starts, (early, late), stacked):
        torch.testing.assert_close(got, trajectory("soap", [start], gs, frequency=2)[0])


def test_shampoos_first_step_is_orthogonal() -> None:
    g = torch.randn(5, 5, dtype=F64)
    u, _, v = torch.linalg.svd(g)
    change = trajectory("shampoo", [torch.zeros(5, 5, dtype=F64)], [[g]], lr=0.1, frequency=1, graft="none", eps=0.0)[0]
    torch.testing.assert_close(change, -0.1 * u @ v, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("graft", ["adam", "sgd"])
def test_a_grafted_change_has_the_length_of_the_other_rules(graft: str) -> None:
    gs, zero = normals((5, 4), steps=1), [torch.zeros(5, 4, dtype=F64)]
    got = trajectory("shampoo", zero, gs, lr=0.1, frequency=1, graft=graft)[0]
    wanted = trajectory("adam", zero, gs, lr=0.1)[0] if graft == "adam" else 0.1 * gs[0][0]
    torch.testing.assert_close(got.norm(), wanted.norm(), rtol=1e-8, atol=0)


def test_kl_shampoo_whitens_gradients_of_kronecker_covariance() -> None:
    """With E[vec(g) vec(g)^T] = R (x) L fixed and b1=0, the preconditioned gradient tends to unit variance everywhere."""
    a = orthogonal(4) @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=F64))
    b = torch.diag(torch.tensor([3.0, 1.0, 0.6, 0.3], dtype=F64)) @ orthogonal(4)
    gs = [[a @ torch.randn(4, 4, dtype=F64) @ b] for _ in range(1000)]
    keep: list[list[Tensor]] = []
    trajectory("kl_shampoo", [torch.zeros(4, 4, dtype=F64)], gs, lr=1.0, b1=0.0, b2=0.99, frequency=5, keep=keep)
    changes = torch.stack([after[0] - before[0] for before, after in zip(keep[299:], keep[300:])])
    covariance = torch.einsum("nij,nkl->ijkl", changes, changes).reshape(16, 16) / len(changes)
    assert torch.linalg.cond(covariance) < 5  # of the gradients' own it is 6,400
    assert 0.7 < float(covariance.diagonal().mean()) < 1.4


def test_krons_change_is_no_different_for_a_rescaled_gradient_once_it_has_learnt() -> None:
    """Whitening: s has unit size whatever the gradient's, and the factors are upper triangular."""
    gs = normals((6, 4), steps=300)
    sizes = []
    for factor in (0.01, 1.0, 100.0):
        keep: list[list[Tensor]] = []
        run(
            "kron",
            [torch.zeros(6, 4, dtype=F64)],
            [[factor * g] for (g,) in gs],
            lr=1.0,
            b1=0.0,
            most_rms=1e9,
            keep=keep,
        )
        sizes.append(float((keep[-1][0] - keep[-51][0]).norm()))
    assert max(sizes) < 2 * min(sizes)


def test_kron_turns_with_its_matrix_only_by_signs() -> None:
    """Triangular factors prefer an order of rows: flipping signs commutes with the rule, a general rotation does not."""
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=F64))
    gs, noise, zero = normals((4, 5), steps=10), normals((4, 5), steps=10), [torch.zeros(4, 5, dtype=F64)]
    plain = trajectory("kron", zero, gs, noise=noise)[0]
    turned = trajectory("kron", zero, [[flip @ g] for (g,) in gs], noise=[[flip @ x] for (x,) in noise])[0]
    torch.testing.assert_close(turned, flip @ plain)
    u = orthogonal(4)
    turned = trajectory("kron", zero, [[u @ g] for (g,) in gs], noise=[[u @ x] for (x,) in noise])[0]
    assert not torch.allclose(turned, u @ plain)


def test_matrix_rules_serve_any_stage_of_decay() -> None:
    assert {RULES[name].decay_form for name in ORACLES} <= set(STAGES)
