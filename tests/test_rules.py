"""The contract of update rules: one test over the table for each promise, so that a new rule is tested by being registered."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import ORACLES
from thalweg.core import RecipeError
from thalweg.optim import lower
from thalweg.rules import RULES, Rule

CASES = [(name, {}) for name in RULES] + [
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adamw", {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
]
each_case = pytest.mark.parametrize(("name", "given_options"), CASES, ids=str)


def updates(
    rule: Rule,
    p0: torch.Tensor,
    gs: list[torch.Tensor],
    *,
    lr=0.01,
    decay=0.0,
    form="decoupled",
    fused=False,
    **options,
) -> torch.Tensor:
    """``p0`` after one update for each gradient, through the engine's lowering."""
    full = rule.options(options)
    run = lower(rule, full, weight_decay=decay, decay_form=form, dtype=p0.dtype, device="cpu", fused=fused).run
    p = p0.clone()
    slots = [[torch.zeros_like(p)] for _ in rule.slots_for(full)]
    for t, g in enumerate(gs, start=1):
        run([p], [g.clone()], slots, [torch.tensor(float(t))], torch.tensor(lr, dtype=p.dtype), None, None)
    return p


def gradients(num: int, size: int = 7, dtype=torch.float64, scale: float = 1.0) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=dtype) * scale for _ in range(num)]


def test_every_rule_has_an_oracle() -> None:
    assert set(ORACLES) == set(RULES)


@each_case
def test_agrees_with_its_float64_transcription(name: str, given_options: dict) -> None:
    p0, gs = torch.randn(7, dtype=torch.float64), gradients(20)
    got = updates(RULES[name], p0, gs, **given_options)
    for i in range(7):
        wanted = ORACLES[name](float(p0[i]), [float(g[i]) for g in gs], lr=0.01, **given_options)
        assert abs(float(got[i]) - wanted) <= 1e-12 * max(1, abs(wanted))


@each_case
def test_fused_operator_is_the_same_maths(name: str, given_options: dict) -> None:
    p0, gs = torch.randn(1000), gradients(20, 1000, torch.float32)
    for form in ("coupled", "decoupled"):
        eager = updates(RULES[name], p0, gs, decay=0.1, form=form, **given_options)
        fused = updates(RULES[name], p0, gs, decay=0.1, form=form, fused=None, **given_options)
        torch.testing.assert_close(fused, eager, rtol=2e-6, atol=2e-6)


def test_fused_is_really_chosen() -> None:
    for name in RULES:
        rule = RULES[name]
        for dtype, wanted in ((torch.float32, "fused"), (torch.float64, "eager")):
            update = lower(rule, rule.options({}), weight_decay=0, decay_form="coupled", dtype=dtype, device="cpu")
            assert update.how == wanted and update.why


@each_case
@pytest.mark.parametrize("fused", [False, None], ids=["eager", "chosen"])
def test_divisor_and_skip_are_tensors_that_act(name: str, given_options: dict, fused: bool | None) -> None:
    rule, p0, g = RULES[name], torch.randn(50), torch.randn(50)
    full = rule.options(given_options)
    run = lower(rule, full, weight_decay=0.1, decay_form="decoupled", dtype=p0.dtype, device="cpu", fused=fused).run
    results = []
    for gradient, divisor in ((g, None), (g * 8, torch.tensor(8.0))):
        p, slots = p0.clone(), [[torch.zeros(50)] for _ in rule.slots_for(full)]
        run([p], [gradient.clone()], slots, [torch.tensor(1.0)], torch.tensor(0.01), divisor, torch.tensor(0.0))
        results.append(p)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    p, slots = p0.clone(), [[torch.ones(50)] for _ in rule.slots_for(full)]
    bad = torch.full((50,), math.inf)
    run([p], [bad], slots, [torch.tensor(1.0)], torch.tensor(0.01), torch.tensor(1.0), torch.tensor(1.0))
    assert torch.equal(p, p0) and all(torch.equal(slot[0], torch.ones(50)) for slot in slots)


@each_case
def test_inputs_are_left_alone(name: str, given_options: dict) -> None:
    rule = RULES[name]
    full = rule.options(given_options)
    inputs = [torch.rand(5, dtype=torch.float64) for _ in range(2 + len(rule.slots_for(full)))]
    before = [t.clone() for t in inputs]
    lr, t = torch.tensor(0.1, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    results = rule.update(*inputs, lr=lr, t=t, **full)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert len(results) == 1 + len(rule.slots_for(full))
    assert not any(a.data_ptr() == b.data_ptr() for a in results for b in inputs[:1])


@each_case
@pytest.mark.parametrize("fused", [False, None], ids=["eager", "chosen"])
def test_zero_rate_and_zero_gradient_move_nothing(name: str, given_options: dict, fused: bool | None) -> None:
    p0 = torch.randn(9)
    still = updates(RULES[name], p0, gradients(5, 9, torch.float32), lr=0.0, decay=0.3, fused=fused, **given_options)
    assert torch.equal(still, p0)
    zeros = [torch.zeros(9) for _ in range(5)]
    assert torch.equal(updates(RULES[name], p0, zeros, fused=fused, **given_options), p0)


@each_case
@pytest.mark.parametrize("fused", [False, None], ids=["eager", "chosen"])
def test_decoupled_decay_alone_is_geometric(name: str, given_options: dict, fused: bool | None) -> None:
    p0, zeros = torch.randn(9), [torch.zeros(9) for _ in range(10)]
    got = updates(RULES[name], p0, zeros, lr=0.1, decay=0.2, fused=fused, **given_options)
    torch.testing.assert_close(got, p0 * (1 - 0.1 * 0.2) ** 10, rtol=1e-6, atol=0)


@each_case
def test_coupled_decay_is_a_gradient(name: str, given_options: dict) -> None:
    p0, gs = torch.randn(6, dtype=torch.float64), gradients(1, 6)
    coupled = updates(RULES[name], p0, gs, decay=0.3, form="coupled", **given_options)
    by_hand = updates(RULES[name], p0, [gs[0] + 0.3 * p0], **given_options)
    torch.testing.assert_close(coupled, by_hand, rtol=1e-14, atol=1e-14)


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_scale_free_rules_take_first_steps_of_size_lr(scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    g = (torch.rand(5, generator=draw, dtype=torch.float64) + 0.1) * scale
    for name in RULES:
        if RULES[name].scale_free:
            moved = updates(RULES[name], torch.zeros(5, dtype=torch.float64), [g], lr=0.01, eps=1e-30)
            torch.testing.assert_close(moved, torch.full_like(moved, -0.01), rtol=1e-12, atol=0)


@given(curvature=st.floats(0.1, 10), lr=st.floats(0.001, 0.19))
@settings(max_examples=30, deadline=None)
def test_sgd_contracts_a_quadratic_by_its_factor(curvature: float, lr: float) -> None:
    p = torch.ones(1, dtype=torch.float64)
    for _ in range(5):
        p = updates(RULES["sgd"], p, [curvature * p], lr=lr)
    torch.testing.assert_close(p, torch.ones_like(p) * (1 - lr * curvature) ** 5, rtol=1e-10, atol=1e-300)


@each_case
def test_agrees_with_torch(name: str, given_options: dict) -> None:
    options = dict(given_options)
    p = torch.nn.Parameter(torch.randn(30, dtype=torch.float64))
    p0, gs = p.detach().clone(), gradients(15, 30)
    if name == "sgd":
        theirs: torch.optim.Optimizer = torch.optim.SGD([p], lr=0.01, weight_decay=0.1, **options)
    else:
        betas = (options.pop("b1", 0.9), options.pop("b2", 0.999))
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        theirs = kind([p], lr=0.01, weight_decay=0.1, betas=betas, **options)
    for g in gs:
        p.grad = g.clone()
        theirs.step()
    rule = RULES[name]
    ours = updates(rule, p0, gs, decay=0.1, form=rule.decay_form, **given_options)
    torch.testing.assert_close(ours, p.detach(), rtol=1e-10, atol=1e-12)


def test_options_are_checked() -> None:
    for options, wanted in (({"beta1": 0.9}, "b1"), ({"b1": 1.0}, "[0, 1)"), ({"eps": "small"}, "same kind")):
        with pytest.raises(RecipeError) as caught:
            RULES["adamw"].options(options)
        assert wanted in str(caught.value)
    with pytest.raises(RecipeError, match="Did you mean sgd"):
        RULES["sdg"]
