"""Element-wise rules: against their transcriptions, against the implementations that they name, and against theory."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles_element import CASES, ORACLES, sophia
from tests.rulekit import trajectory
from thalweg.rules import RULES
from thalweg.rules.schedule_free import evaluation_weights

ALL = [(name, {}) for name in ORACLES] + CASES
SHAPES = ((5,), (3, 4), ())


def starts(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def gradients(num: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[list[Tensor]]:
    return [[torch.randn(shape, dtype=dtype) * scale for shape in SHAPES] for _ in range(num)]


def gap(got: Iterable[Tensor], wanted: Iterable[Any]) -> float:
    """Largest difference, relative where the wanted value is above 1."""
    pairs = [(np.asarray(a.detach()), np.asarray(b)) for a, b in zip(got, wanted, strict=True)]
    return max(float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)))) for a, b in pairs)


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_agrees_with_its_float64_transcription(name: str, options: dict[str, Any]) -> None:
    ps, gs = starts(), gradients(20)
    arrays = [p.numpy() for p in ps], [[g.numpy() for g in step] for step in gs]
    got = trajectory(name, ps, gs, lr=0.01, **options)
    assert gap(got, ORACLES[name](*arrays, lr=0.01, **options)) < 1e-12


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_float32_stays_float32_and_near(name: str, options: dict[str, Any]) -> None:
    ps, gs = starts(), gradients(20)
    for g in (g for step in gs for g in step):  # no sign may hang on the last bit
        g.copy_(g.sign() * (g.abs() + 0.1))
    exact = trajectory(name, ps, gs, lr=0.01, **options)
    rough = trajectory(name, [p.float() for p in ps], [[g.float() for g in step] for step in gs], lr=0.01, **options)
    assert all(p.dtype == torch.float32 for p in rough)
    assert gap(rough, exact) < 2e-5


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_tiles_do_not_matter(name: str, options: dict[str, Any]) -> None:
    p, gs = torch.randn(700), [torch.randn(700) for _ in range(4)]
    whole = trajectory(name, [p], [[g] for g in gs], tile=0, **options)
    assert torch.equal(trajectory(name, [p], [[g] for g in gs], tile=256, **options)[0], whole[0])


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_no_rate_and_no_gradient_move_nothing(name: str, options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.float64):
        ps = starts(dtype)
        zeros = [[torch.zeros_like(p) for p in ps] for _ in range(4)]
        assert gap(trajectory(name, ps, gradients(4, dtype), lr=0.0, **options), ps) == 0
        assert gap(trajectory(name, ps, zeros, lr=0.1, **options), ps) == 0
        mixed = trajectory(name, ps, [*zeros, *gradients(4, dtype), *zeros], lr=0.01, **options)
        assert all(p.isfinite().all() for p in mixed)


@pytest.mark.parametrize("name", [name for name in ORACLES if RULES[name].scale_free])
def test_scale_free_rules_start_with_the_rate_and_ignore_the_scale(name: str) -> None:
    ps, gs = starts(), gradients(6)
    first = trajectory(name, ps, gs[:1], lr=0.01)
    assert gap(first, [p - 0.01 * g.sign() for p, g in zip(ps, gs[0])]) < 1e-7
    base = trajectory(name, ps, gs, lr=0.01, **({} if name in ("lion", "signum") else {"eps": 0.0}))
    for scale in (1e-6, 1e3):
        scaled = [[g * scale for g in step] for step in gs]
        got = trajectory(name, ps, scaled, lr=0.01, **({} if name in ("lion", "signum") else {"eps": 0.0}))
        assert gap(got, base) < 1e-10


# Rules that become each other.


@pytest.mark.parametrize(
    ("name", "options", "other", "others"),
    [
        ("lion", {"b1": 0.9, "b2": 0.9}, "signum", {"momentum": 0.9}),
        ("ademamix", {"alpha": 0.0}, "adam", {}),
        ("ademamix", {"alpha": 0.0, "warmup": 5}, "adam", {}),
        ("nadam", {"b1": 0.0, "variant": "dozat"}, "adam", {"b1": 0.0}),
        ("nadam", {"b1": 0.0}, "adam", {"b1": 0.0}),
        ("laprop", {"b1": 0.0}, "adam", {"b1": 0.0, "eps": 1e-15}),
        ("adan", {"b1": 0.9, "b2": 0.0, "b3": 0.999}, "adam", {}),
        ("gpa_adamw", {"mu_x": 0.0}, "adam", {}),
        ("radam", {"least": 1e9, "b1": 0.0}, "sgd", {}),
        ("schedule_free_sgd", {"b1": 0.0}, "sgd", {}),
    ],
    ids=str,
)
def test_limits(name: str, options: dict[str, Any], other: str, others: dict[str, Any]) -> None:
    ps, gs = starts(), gradients(12)
    assert gap(trajectory(name, ps, gs, **options), trajectory(other, ps, gs, **others)) < 1e-12


def test_nadam_forms_differ() -> None:
    ps, gs = starts(), gradients(12)
    forms = [trajectory("nadam", ps, gs, variant=variant) for variant in ("torch", "dozat", "algoperf")]
    assert gap(forms[0], forms[1]) > 1e-3 and gap(forms[1], forms[2]) > 1e-3


def test_adopt_keeps_its_first_gradient_back_and_its_steps_bounded() -> None:
    kept: list[list[Tensor]] = []
    ps, gs = starts(), gradients(10)
    gs[0] = [g * 1e-4 for g in gs[0]]  # a tiny first divisor is what the bound is there for
    trajectory("adopt", ps, gs, lr=0.01, keep=kept)
    assert gap(kept[0], ps) == 0
    for t, (old, new) in enumerate(zip(kept, kept[1:]), start=1):
        assert max(float((b - a).abs().max()) for a, b in zip(old, new)) <= 0.01 * t**0.25 + 1e-12
    loose = trajectory("adopt", ps, gs, lr=0.01, variant="plain")
    assert gap(loose, ps) > 1


def test_ademamix_slow_mean_has_the_half_life_in_a_line() -> None:
    # At t of warmup the decay b has log(1/2)/log(b) half way between those of b1 and b3.
    options = {"b1": 0.9, "b3": 0.999, "warmup": 8}
    p, slow = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    zero, number = torch.zeros_like(p), lambda value: torch.tensor(value, dtype=torch.float64)
    for t in (2, 4, 6, 8, 20):
        b = RULES["ademamix"].update(p, zero, zero, slow, zero, lr=number(0.1), t=number(float(t)), **options)[2]
        half_lives = [math.log(0.5) / math.log(x) for x in (0.9, 0.999)]
        part = min(t / 8, 1)
        wanted = (1 - part) * half_lives[0] + part * half_lives[1]
        assert math.log(0.5) / math.log(float(b)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
@pytest.mark.parametrize("options", [{}, {"warmup": 5, "b1": 0.6}], ids=str)
def test_evaluation_weights_are_the_average(name: str, options: dict[str, Any]) -> None:
    ps, gs = starts(), gradients(15)
    arrays = [p.numpy() for p in ps], [[g.numpy() for g in step] for step in gs]
    live = trajectory(name, ps, gs, lr=0.01, **options)
    fast = ORACLES[name](*arrays, lr=0.01, **{**options, "b1": 1e-30, "weight_lr_power": 0.0})  # y is z there
    got = [
        evaluation_weights(y, torch.from_numpy(z), options.get("b1", 0.9)) for y, z in zip(live, map(np.asarray, fast))
    ]
    assert gap(got, ORACLES[name](*arrays, lr=0.01, averages=True, **options)) < 1e-12


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw", "gpa_adamw"])
def test_averaging_stands_still_at_rate_zero(name: str) -> None:
    ps, gs, kept = starts(), gradients(10), []
    trajectory(name, ps, gs, lr=[0.0] * 2 + [0.01] * 4 + [0.0] * 4, keep=kept)
    assert gap(kept[1], ps) == 0
    assert gap(kept[5], ps) > 0 and gap(kept[9], kept[5]) == 0


def sophia_run(
    ps: list[Tensor], gs: list[list[Tensor]], curvatures: list[list[Tensor]], *, lr: float, **options: Any
) -> list[Tensor]:
    """The rule by hand: the engine gives no ``curvature`` yet."""
    rule, ends = RULES["sophia"], []
    full = rule.options(options)
    for i, p in enumerate(ps):
        m, h = torch.zeros_like(p), torch.zeros_like(p)
        for t, (g, curvature) in enumerate(zip(gs, curvatures), start=1):
            rate, number = (torch.tensor(x, dtype=torch.float64) for x in (lr, float(t)))
            due = (t - 1) % full["frequency"] == 0
            change, m, new = rule.update(p, g[i], m, h, lr=rate, t=number, due=due, curvature=curvature[i], **full)
            assert due or new is h
            assert float(change.abs().max()) <= lr
            p, h = p + change, new
        ends.append(p)
    return ends


@pytest.mark.parametrize("options", [{}, {"b1": 0.8, "b2": 0.5, "gamma": 1.0, "eps": 0.1, "frequency": 3}], ids=str)
def test_sophia_agrees_with_its_transcription(options: dict[str, Any]) -> None:
    ps, gs = starts(), gradients(25)
    curvatures = [[100 * g.square() for g in step] for step in gradients(25)]
    arrays = [[[x.numpy() for x in step] for step in steps] for steps in (gs, curvatures)]
    wanted = sophia([p.numpy() for p in ps], arrays[0], lr=0.01, curvatures=arrays[1], **options)
    assert gap(sophia_run(ps, gs, curvatures, lr=0.01, **options), wanted) < 1e-12
    zeros = [[torch.zeros_like(p) for p in ps]] * 3
    assert gap(sophia_run(ps, zeros, zeros, lr=0.01, **options), ps) == 0


# Named implementations.


def peer(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def timm(module: str) -> Any:
    """A module of timm.optim alone: the package asks for torchvision on import."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    alias = types.ModuleType("timm_optim_alone")
    alias.__path__ = [f"{folder}/optim" for folder in found.submodule_search_locations]
    sys.modules.setdefault(alias.__name__, alias)
    return importlib.import_module(f"{alias.__name__}.{module}")


def stepped(make: Callable[[list[Tensor]], Any], ps: list[Tensor], gs: list[list[Tensor]], rates: Any = None) -> Any:
    """(parameters, optimizer) after the gradients, through a torch-like optimizer."""
    qs = [torch.nn.Parameter(p.clone()) for p in ps]
    optimizer = make(qs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for t, step in enumerate(gs):
        for q, g in zip(qs, step):
            q.grad = g.clone()
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[t]
        optimizer.step()
    return [q.detach().clone() for q in qs], optimizer


T = torch.optim
#: (rule, options, the implementation, decay, form).
TORCH: list[tuple[str, dict[str, Any], Callable[[list[Tensor]], Any], float, str]] = [
    ("rmsprop", {}, lambda q: T.RMSprop(q, 0.01), 0.0, ""),
    ("rmsprop", {}, lambda q: T.RMSprop(q, 0.01, weight_decay=0.1), 0.1, "coupled"),
    (
        "rmsprop",
        {"momentum": 0.9, "centered": True},
        lambda q: T.RMSprop(q, 0.01, momentum=0.9, centered=True),
        0.0,
        "",
    ),
    ("adagrad", {}, lambda q: T.Adagrad(q, 0.01), 0.0, ""),
    (
        "adagrad",
        {"start": 0.1},
        lambda q: T.Adagrad(q, 0.01, initial_accumulator_value=0.1, weight_decay=0.1),
        0.1,
        "coupled",
    ),
    ("adadelta", {}, lambda q: T.Adadelta(q, 0.01, rho=0.95), 0.0, ""),
    ("adadelta", {"b2": 0.9}, lambda q: T.Adadelta(q, 0.01, weight_decay=0.1), 0.1, "coupled"),
    ("nadam", {}, lambda q: T.NAdam(q, 0.01), 0.0, ""),
    ("nadam", {}, lambda q: T.NAdam(q, 0.01, weight_decay=0.1), 0.1, "coupled"),
    ("nadamw", {}, lambda q: T.NAdam(q, 0.01, weight_decay=0.1, decoupled_weight_decay=True), 0.1, "decoupled"),
    ("radam", {}, lambda q: T.RAdam(q, 0.01), 0.0, ""),
    ("radam", {}, lambda q: T.RAdam(q, 0.01, weight_decay=0.1, decoupled_weight_decay=True), 0.1, "decoupled"),
    ("radam", {}, lambda q: T.RAdam(q, 0.01, weight_decay=0.1), 0.1, "coupled"),
]
TIMM: list[tuple[str, dict[str, Any], str, str, dict[str, Any], float, str]] = [
    ("lion", {}, "lion", "Lion", {}, 0.0, ""),
    ("lion", {}, "lion", "Lion", {"weight_decay": 0.1}, 0.1, "decoupled"),
    ("rmsprop", {"variant": "tf", "b2": 0.9, "eps": 1e-10}, "rmsprop_tf", "RMSpropTF", {}, 0.0, ""),
    (
        "rmsprop",
        {"variant": "tf", "b2": 0.9, "eps": 1e-3, "momentum": 0.9, "centered": True},
        "rmsprop_tf",
        "RMSpropTF",
        {"eps": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        0.1,
        "coupled",
    ),
    ("nadamw", {"variant": "algoperf"}, "nadamw", "NAdamW", {"weight_decay": 0.0}, 0.0, ""),
    ("nadamw", {"variant": "algoperf"}, "nadamw", "NAdamW", {"weight_decay": 0.1}, 0.1, "decoupled"),
    ("laprop", {}, "laprop", "LaProp", {}, 0.0, ""),
    ("adabelief", {}, "adabelief", "AdaBelief", {"rectify": False}, 0.0, ""),
    ("adabelief", {}, "adabelief", "AdaBelief", {"rectify": False, "weight_decay": 0.1}, 0.1, "decoupled"),
    ("adan", {}, "adan", "Adan", {}, 0.0, ""),
    ("adan", {}, "adan", "Adan", {"no_prox": True, "weight_decay": 0.1}, 0.1, "decoupled"),
    ("adopt", {"power": 0.333}, "adopt", "Adopt", {}, 0.0, ""),
]
PYTORCH_OPTIMIZER: list[tuple[str, dict[str, Any], str, dict[str, Any], float, str]] = [
    ("lion", {}, "Lion", {}, 0.0, ""),
    ("signum", {}, "SignSGD", {"momentum": 0.9}, 0.0, ""),
    ("signum", {"momentum": 0.0}, "SignSGD", {"momentum": 0.0}, 0.0, ""),
    ("radam", {}, "RAdam", {"degenerated_to_sgd": True}, 0.0, ""),
    ("laprop", {}, "LaProp", {"betas": (0.9, 0.999), "eps": 1e-15}, 0.0, ""),
    ("adabelief", {}, "AdaBelief", {}, 0.0, ""),
    ("adan", {}, "Adan", {"weight_decay": 0.1, "weight_decouple": True}, 0.1, "decoupled"),
    ("adopt", {"variant": "late"}, "ADOPT", {}, 0.0, ""),
    ("ademamix", {}, "AdEMAMix", {"weight_decay": 0.1, "weight_decouple": True}, 0.1, "decoupled"),
    ("ademamix", {"warmup": 12, "alpha": 8.0}, "AdEMAMix", {"alpha": 8.0, "t_alpha_beta3": 12}, 0.0, ""),
    ("schedule_free_adamw", {}, "ScheduleFreeAdamW", {}, 0.0, ""),
]
OPTAX: list[tuple[str, dict[str, Any], Callable[[Any], Any]]] = [
    ("lion", {}, lambda x: x.lion(0.01, weight_decay=0.0)),
    ("signum", {}, lambda x: x.signum(0.01)),
    ("adadelta", {"b2": 0.9}, lambda x: x.adadelta(0.01)),
    ("nadam", {"variant": "dozat"}, lambda x: x.nadam(0.01)),
    ("adabelief", {}, lambda x: x.adabelief(0.01)),
    ("adopt", {}, lambda x: x.contrib.adopt(0.01)),
    ("ademamix", {}, lambda x: x.contrib.ademamix(0.01)),
    ("schedule_free_sgd", {}, lambda x: x.contrib.schedule_free_sgd(0.01, weight_decay=None)),
]


def against(made: Any, name: str, options: dict[str, Any], decay: float, form: str) -> float:
    ps, gs = starts(), gradients(20)
    wanted, _ = stepped(made, ps, gs)
    return gap(trajectory(name, ps, gs, lr=0.01, decay=decay, form=form or None, **options), wanted)


@pytest.mark.parametrize(("name", "options", "make", "decay", "form"), TORCH)
def test_equals_torch(name: str, options: dict[str, Any], make: Any, decay: float, form: str) -> None:
    assert against(make, name, options, decay, form) < 1e-9  # torch keeps the product of mu in float32


@pytest.mark.parametrize(("name", "options", "module", "theirs", "given", "decay", "form"), TIMM)
def test_equals_timm(
    name: str, options: dict[str, Any], module: str, theirs: str, given: dict[str, Any], decay: float, form: str
) -> None:
    made = getattr(timm(module), theirs)
    assert against(lambda q: made(q, lr=0.01, **given), name, options, decay, form) < 1e-6


@pytest.mark.parametrize(("name", "options", "theirs", "given", "decay", "form"), PYTORCH_OPTIMIZER)
def test_equals_pytorch_optimizer(
    name: str, options: dict[str, Any], theirs: str, given: dict[str, Any], decay: float, form: str
) -> None:
    made = getattr(peer("pytorch_optimizer"), theirs)
    assert against(lambda q: made(q, lr=0.01, **given), name, options, decay, form) < 1e-6


@pytest.mark.parametrize(("name", "options", "make"), OPTAX)
def test_equals_optax(name: str, options: dict[str, Any], make: Callable[[Any], Any]) -> None:
    jax, optax = peer("jax"), peer("optax")
    ps, gs = starts(), gradients(20)
    with warnings.catch_warnings(), jax.enable_x64(True):
        warnings.simplefilter("ignore")
        chain = make(optax)
        params = [jax.numpy.asarray(p.numpy()) for p in ps]
        state = chain.init(params)
        for step in gs:
            updates, state = chain.update([jax.numpy.asarray(g.numpy()) for g in step], state, params)
            params = optax.apply_updates(params, updates)
        wanted = [np.asarray(p) for p in params]
    assert gap(trajectory(name, ps, gs, lr=0.01, **options), wanted) < 1e-6


@pytest.mark.parametrize(
    ("name", "theirs", "options", "given", "decay"),
    [
        ("schedule_free_sgd", "SGDScheduleFree", {}, {}, 0.0),
        ("schedule_free_sgd", "SGDScheduleFree", {"warmup": 8}, {"warmup_steps": 8, "weight_decay": 0.1}, 0.1),
        ("schedule_free_adamw", "AdamWScheduleFree", {}, {}, 0.0),
        (
            "schedule_free_adamw",
            "AdamWScheduleFree",
            {"warmup": 8, "r": 1.0, "weight_lr_power": 1.0},
            {"warmup_steps": 8, "r": 1.0, "weight_lr_power": 1.0},
            0.0,
        ),
    ],
)
def test_equals_schedulefree(
    name: str, theirs: str, options: dict[str, Any], given: dict[str, Any], decay: float
) -> None:
    made = getattr(peer("schedulefree"), theirs)
    ps, gs = starts(), gradients(20)
    wanted, optimizer = stepped(lambda q: made(q, lr=0.01, **given), ps, gs)
    live = trajectory(name, ps, gs, lr=0.01, decay=decay, **options)
    assert gap(live, wanted) < 1e-12
    optimizer.eval()
    qs = optimizer.param_groups[0]["params"]
    assert (
        gap([evaluation_weights(y, optimizer.state[q]["z"], 0.9) for y, q in zip(live, qs)], [q.detach() for q in qs])
        < 1e-12
    )


def test_tf_momentum_under_a_schedule_is_timms_with_the_rate_outside() -> None:
    made = timm("rmsprop_tf").RMSpropTF
    ps, gs, rates = starts(), gradients(20), [0.01 * (1 - t / 20) for t in range(20)]
    wanted, _ = stepped(lambda q: made(q, momentum=0.9, lr_in_momentum=False), ps, gs, rates)
    got = trajectory("rmsprop", ps, gs, lr=rates, variant="tf", b2=0.9, eps=1e-10, momentum=0.9)
    assert gap(got, wanted) < 1e-12


def test_sophia_equals_pytorch_optimizer_up_to_its_scale() -> None:
    made = peer("pytorch_optimizer").SophiaH
    ps, gs = starts(), gradients(20)
    curvatures = [[100 * g.square() for g in step] for step in gradients(20)]
    qs = [torch.nn.Parameter(p.clone()) for p in ps]
    optimizer = made(qs, lr=1.0, p=0.01, eps=1e-10)
    for t, step in enumerate(gs):
        for q, g in zip(qs, step):
            q.grad = g.clone()
        optimizer.step(hessian=[c.clone() for c in curvatures[t]] if t % 10 == 0 else None)
    got = sophia_run(ps, gs, curvatures, lr=0.01, gamma=0.01, eps=1e-12)
    assert gap(got, [q.detach() for q in qs]) < 1e-12
