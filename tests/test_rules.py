"""The contract of update rules: every promise of ``thalweg.testing`` asked of every registered rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import three_parts
from tests.oracles import CASES, ORACLES
from tests.rulekit import trajectory
from thalweg.core import RecipeError
from thalweg.optim.face import face_of
from thalweg.rules import RULES, Slot, make_rule
from thalweg.testing import PROMISES, BrokenPromise, Case, HostRead, check_rule, no_reads

ALL: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in RULES] + CASES
F64 = torch.float64


def case_of(name: str, options: dict[str, Any]) -> Case:
    return Case(RULES[name], options, ORACLES[name])


ASKED = [
    pytest.param(promise, *one, id=f"{promise}-{one[0]}-{one[1]}")
    for one in ALL
    for promise in PROMISES
    if PROMISES[promise].applies(case_of(*one))
]


def test_every_rule_has_an_oracle() -> None:
    assert set(ORACLES) == set(RULES) and {name for name, _ in CASES} <= set(RULES)


@pytest.mark.parametrize(("promise", "name", "options"), ASKED)
def test_keeps_its_promises(promise: str, name: str, options: dict[str, Any]) -> None:
    PROMISES[promise].check(case_of(name, options))


def test_few_rules_are_let_off() -> None:
    """What is not asked, and of whom, is what the rules say of themselves."""
    let_off = {
        name: sorted(rule for rule in RULES if not PROMISES[name].applies(case_of(rule, {})))
        for name in PROMISES
        if name not in ("tiles_and_flat_are_the_same", "stacked_is_the_same")
    }
    together = sorted(name for name in RULES if RULES[name].shared)
    assert {name: rules for name, rules in let_off.items() if rules} == {
        "decay_alone_is_geometric": sorted(n for n in RULES if RULES[n].then or RULES[n].anchored),
        "groups_are_optimizers": together,
        "late_parameters_begin_anew": together,
    }
    assert len(together) <= 3


# --- what a rule must break for each promise to see it; all are rules that a user could write


def inplace(p, g, m, *, lr, t):
    return -lr * m.mul_(0.9).add_(g), m.clone()


def writes_gradient(p, g, *, lr, t):
    return (-lr * g.clamp_(-1, 1),)


def forgets_a_slot(p, g, m, *, lr, t):
    return (-lr * (m + g),)


def narrow(p, g, m, *, lr, t):
    return -lr * g, (m + g).float()


def keeps_the_parameter(p, g, last, *, lr, t):
    return -lr * (g + 0.1 * (p - last)), p


def keeps_the_gradient(p, g, last, *, lr, t):
    return -lr * (g + 0.1 * last), g


def no_rate(p, g, *, lr, t):
    return (-0.01 * g,)


def restless(p, g, *, lr, t):
    return (-lr * (g + 0.01),)


def divides_by_zero(p, g, v, *, lr, t):
    v = 0.9 * v + g * g
    return -lr * g / v.sqrt(), v


def decays_itself(p, g, *, lr, t):
    return (-lr * (g + 0.1 * p),)


def asleep(p, g, *, lr, t):
    return (0 * lr * g,)


CALLS = [0]


def counts_alone(p, g, *, lr, t):
    CALLS[0] += 1
    return (-lr * g / CALLS[0],)


def branches(p, g, *, lr, t):
    return (-lr * g if g.sum() != 0 else 0 * g,)


def whole_tensor(p, g, *, lr, t):
    return (-lr * g / (1 + g.norm()),)


def normal_once(p, g, m, *, lr, t):
    m = 0.9 * m + g + torch.rand_like(g) * 0.1 * (g != 0)
    return -lr * m, m


BROKEN: list[tuple[Callable[..., Any], str, str]] = [
    (inplace, "inputs_are_left", "slot 'm'"),
    (writes_gradient, "inputs_are_left", "gradient"),
    (writes_gradient, "gradients_are_left", "off by up to"),
    (forgets_a_slot, "results_fit", "gives 1, and with 1 slots there are 2"),
    (narrow, "results_fit", "torch.float32, not (4, 6), torch.float64"),
    (keeps_the_parameter, "results_are_their_own", "slot 'last' lies in the memory of the parameter"),
    (keeps_the_gradient, "results_are_their_own", "memory of the gradient"),
    (no_rate, "no_rate_moves_nothing", "lr=0"),
    (restless, "no_gradient_moves_nothing", "gradients of 0"),
    (divides_by_zero, "no_gradient_moves_nothing", "gradients of 0"),
    (decays_itself, "decay_alone_is_geometric", "Five updates"),
    (asleep, "gradients_move", "where it was"),
    (counts_alone, "late_parameters_begin_anew", "Unfrozen"),
    (counts_alone, "groups_are_optimizers", "Two groups"),
    (counts_alone, "state_goes_on", "state_dict"),
    (branches, "nothing_is_read_back", "was called"),
    (whole_tensor, "tiles_and_flat_are_the_same", "In tiles"),
    (normal_once, "state_goes_on", "state_dict"),
    (normal_once, "tensor_rate_is_a_number", "0-dim"),
]


@pytest.mark.parametrize(("rule", "promise", "seen"), BROKEN, ids=lambda x: getattr(x, "__name__", None))
def test_a_broken_promise_is_seen(rule: Callable[..., Any], promise: str, seen: str) -> None:
    slots = [name for name in ("m", "v", "last") if name in rule.__code__.co_varnames[: rule.__code__.co_argcount]]
    with pytest.raises(BrokenPromise) as caught:
        PROMISES[promise].check(Case(make_rule(rule, slots=tuple(slots))))
    asked, numbers, _ = three_parts(caught.value)
    assert asked == f"{rule.__name__} breaks a promise: {PROMISES[promise].says}" and seen in numbers
    assert isinstance(caught.value, AssertionError)


def test_a_batch_of_matrices_that_is_summed_whole_is_seen() -> None:
    def one_norm(p, g, *, lr, t):
        return (-lr * g / (1 + g.norm()),)

    with pytest.raises(BrokenPromise, match="Stacked"):
        PROMISES["stacked_is_the_same"].check(Case(make_rule(one_norm, reads="matrix")))


def test_a_transcription_that_differs_is_seen() -> None:
    def half(ps, gs, *, lr):
        return [p - lr / 2 * sum(g[i] for g in gs) for i, p in enumerate(ps)]

    with pytest.raises(BrokenPromise, match="agrees with the transcription"):
        check_rule("sgd", oracle=half)


def my_ball(p, g, m, *, lr, t, momentum=0.9):
    m = momentum * m + g
    return -lr * m, m


def test_check_rule_takes_functions_names_and_rules() -> None:
    check_rule(my_ball, oracle=ORACLES["sgd"], options={"momentum": 0.5})
    check_rule("adamw", options={"amsgrad": True}, oracle=ORACLES["adamw"])
    check_rule(make_rule(whole_tensor, reads="tensor"))
    check_rule(my_ball, slots=[Slot("m", compressible=False)])


def test_check_rule_refuses_what_is_no_rule() -> None:
    def adamw(p, g, *, lr, t):
        return (-lr * g,)

    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (adamw, {}, "registered already"),
        (lambda p, *, lr, t: p, {}, "takes 1 tensors"),
        (my_ball, {"options": {"momentun": 0.9}}, "Did you mean momentum"),
        (my_ball, {"slots": ["m", "n"]}, "gets 4 tensors"),
        ("lionn", {}, "Did you mean lion"),
    ]
    for rule, words, said in wrong:
        with pytest.raises(RecipeError) as caught:
            check_rule(rule, **words)
        assert said in " ".join(three_parts(caught.value))


def test_a_rule_that_is_not_registered_has_a_face_of_its_own() -> None:
    rule = make_rule(my_ball, slots=("m",), lr=0.5)
    face = face_of(rule)
    p = torch.nn.Parameter(torch.ones(2, dtype=F64))
    p.grad = torch.ones_like(p)
    face([p], momentum=0.0).step()
    assert face.__name__ == "MyBall" and p.tolist() == [0.5, 0.5] and face_of(RULES["lion"]) is face_of("lion")


def test_no_reads_refuses_and_gives_back() -> None:
    x = torch.ones(())
    reads: list[Callable[[Tensor], Any]] = [float, bool, int, Tensor.item, lambda y: y.tolist(), lambda y: y.nonzero()]
    reads += [
        lambda y: torch.full((2,), y),
        lambda y: y[None][y[None] > 0],
        lambda y: y.add(y, alpha=y),
        lambda y: [1][y],
    ]
    for read in reads:
        with pytest.raises(HostRead, match=r"Tensor\.|aten"), no_reads():
            read(x)
    assert float(x) == 1.0 and x.tolist() == 1.0


# --- what holds for all rules, and is no promise that a user's rule is asked for


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_coupled_decay_is_a_gradient(name: str, options: dict[str, Any]) -> None:
    shapes = ((4, 6), (6, 6))
    ps, gs = [torch.randn(s, dtype=F64) for s in shapes], [torch.randn(s, dtype=F64) for s in shapes]
    words: dict[str, Any] = {"lr": RULES[name].lr, **options}
    if "noise" in RULES[name].needs:
        words["noise"] = [[torch.randn_like(g) for g in gs]]
    elif "curvature" in RULES[name].needs:
        pytest.skip("its first update needs a curvature, which a gradient does not change")
    coupled = trajectory(name, ps, [gs], decay=0.3, form="coupled", **words)
    by_hand = trajectory(name, ps, [[g + 0.3 * p for p, g in zip(ps, gs)]], **words)
    torch.testing.assert_close(coupled, by_hand, rtol=1e-12, atol=1e-12)


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_scale_free_rules_do_not_see_the_scale(scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    p, g = (torch.rand(5, 5, generator=draw, dtype=F64) + 0.1 for _ in range(2))
    for name in RULES:
        rule = RULES[name]
        if rule.scale_free and not {"noise", "curvature"} & set(rule.needs):
            options = {"eps": 1e-30} if "eps" in rule.defaults else {}
            one = trajectory(name, [p], [[g], [g]], lr=rule.lr, **options)
            other = trajectory(name, [p], [[g * scale], [g * scale]], lr=rule.lr, **options)
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@given(curvature=st.floats(0.1, 10), lr=st.floats(0.001, 0.19))
@settings(max_examples=30, deadline=None)
def test_sgd_contracts_a_quadratic_by_its_factor(curvature: float, lr: float) -> None:
    p = torch.ones(1, dtype=F64)
    for _ in range(5):
        p = trajectory("sgd", [p], [[curvature * p]], lr=lr)[0]
    torch.testing.assert_close(p, torch.ones_like(p) * (1 - lr * curvature) ** 5, rtol=1e-10, atol=1e-300)


def test_options_are_checked() -> None:
    for options, wanted in (({"beta1": 0.9}, "b1"), ({"b1": 1.0}, "[0, 1)"), ({"eps": "small"}, "same kind")):
        with pytest.raises(RecipeError) as caught:
            RULES["adamw"].options(options)
        assert wanted in str(caught.value)
    with pytest.raises(RecipeError, match="Did you mean sgd"):
        RULES["sdg"]
