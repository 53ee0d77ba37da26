"""Rules and stages that read rows, whole tensors or all parameters: against numpy transcriptions, peers and theory."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests import oracles_tensor as oracles
from tests.oracles_tensor import CASES, NOISY, ORACLES, RATES
from tests.rulekit import trajectory
from thalweg.rules import RULES, STAGES

SHAPES = ((5,), (4, 6), (7, 3), (), (2, 3, 4), (4, 3, 2, 2))
LR = 0.01
each_case = pytest.mark.parametrize(("name", "given"), [(name, {}) for name in ORACLES] + CASES, ids=str)


def draws(num=20, shapes=SHAPES, dtype=torch.float64):
    """Starts, gradients with a common direction (so that estimates of distance grow) and noise."""
    starts = [torch.randn(s, dtype=dtype) for s in shapes]
    lean = [torch.randn(s, dtype=dtype) for s in shapes]
    gs = [[way + 0.5 * torch.randn_like(way) for way in lean] for _ in range(num)]
    noise = [[torch.randn(s, dtype=dtype) for s in shapes] for _ in range(num)]
    return starts, gs, noise


def shapes_of(name):
    return tuple(s for s in SHAPES if len(s) >= RULES[name].least_ndim)


def run(name, starts, gs, noise, lr=None, **given):
    """The rule, with noise where it needs some."""
    found = noise if name in NOISY else None
    return trajectory(name, starts, gs, lr=RATES.get(name, LR) if lr is None else lr, noise=found, **given)


def arrays(nested):
    return [[x.numpy() for x in inner] for inner in nested]


def close(got, wanted, tolerance):
    for a, b in zip(got, wanted):
        b = b.detach().numpy() if isinstance(b, torch.Tensor) else np.asarray(b)
        assert np.abs(a.numpy() - b).max() <= tolerance * max(1.0, float(np.abs(b).max()))


@each_case
@pytest.mark.parametrize("stack", [False, True], ids=["alone", "stacked"])
def test_agrees_with_its_transcription(name, given, stack) -> None:
    if stack and RULES[name].reads != "matrix":
        return
    shapes = shapes_of(name)
    starts, gs, noise = draws(shapes=shapes + shapes if stack else shapes)
    words = {"noise": arrays(noise)} if name in NOISY else {}
    wanted = ORACLES[name]([p.numpy() for p in starts], arrays(gs), lr=RATES.get(name, LR), **words, **given)
    got = run(name, starts, gs, noise, stack=stack, **given)
    moved = max(float((a - b).abs().max()) for a, b in zip(got, starts))
    assert moved > 1e-9
    close(got, wanted, 1e-12)


@each_case
def test_stands_still_without_gradient_or_rate(name, given) -> None:
    starts, gs, noise = draws(6, shapes_of(name), torch.float32)
    starts[0] = torch.zeros_like(starts[0])  # norms of 0 too
    zeros = [[torch.zeros_like(g) for g in step] for step in gs]
    given = {**given, "inner_decay": 0.0} if "inner_decay" in given else given
    for moved in (run(name, starts, zeros, noise, **given), run(name, starts, gs, noise, lr=0.0, **given)):
        assert all(torch.equal(a, b) for a, b in zip(moved, starts))
    mixed = zeros[:2] + gs[:2] + zeros[:2]  # and never NaN when gradients come and go
    assert all(bool(x.isfinite().all()) for x in run(name, starts, mixed, noise, **given))


@each_case
def test_single_precision_survives_extreme_gradients(name, given) -> None:
    starts, gs, noise = draws(5, shapes_of(name), torch.float32)
    given = {**given, "inner_decay": 0.0} if "inner_decay" in given else given  # would be 1e15 times the gradient
    for scale in (1e-15, 1e15):
        scaled = [[g * scale for g in step] for step in gs]
        assert all(bool(x.isfinite().all()) for x in run(name, starts, scaled, noise, **given))


# What follows from the maths alone.


def test_scale_free_first_step() -> None:
    starts, gs, noise = draws(1)
    for name in ORACLES:
        if RULES[name].scale_free:
            for scale in (1e-5, 1e5):
                moved = run(name, starts, [[g * scale for g in gs[0]]], noise, eps=1e-30)
                close([a - b for a, b in zip(moved, starts)], [-LR * g.sign() for g in gs[0]], 1e-12)


@pytest.mark.parametrize(("name", "share"), [("lamb", LR), ("lars", 1e-3)])
def test_a_trust_ratio_moves_a_share_of_the_norm(name, share) -> None:
    starts, gs, noise = draws(1)
    for p, q in zip(starts, run(name, starts, gs, noise)):
        assert float((q - p).norm() / p.norm()) == pytest.approx(share, rel=1e-6)


def test_adafactor_is_exact_for_squares_of_rank_one() -> None:
    p, g = torch.randn(5, 1, dtype=torch.float64) @ torch.randn(1, 4, dtype=torch.float64), None
    g = torch.randn(5, 1, dtype=torch.float64) @ torch.randn(1, 4, dtype=torch.float64)
    moved = trajectory("adafactor", [p], [[g]], lr=0.1, scale_parameter=False)[0]
    torch.testing.assert_close(moved - p, -0.1 * g.sign(), rtol=1e-9, atol=0)


def test_adam_mini_is_adam_where_rows_are_single_numbers() -> None:
    starts, gs, _ = draws(10, ((6, 1),))
    close(trajectory("adam_mini", starts, gs), trajectory("adam", starts, gs), 1e-13)


def test_mars_without_correction_and_with_small_gradients_is_adamw() -> None:
    starts, gs, _ = draws(10)
    small = [[g * 1e-3 for g in step] for step in gs]
    close(trajectory("mars", starts, small, gamma=0.0), trajectory("adamw", starts, small, b1=0.95, b2=0.99), 1e-13)


def test_apollo_with_one_row_is_adams_scale_and_its_growth_is_held() -> None:
    starts, gs, noise = draws(1, ((1, 6),))
    moved = trajectory("apollo", starts, gs, noise=noise, lr=LR, eps=1e-30)
    onto = noise[0][0][0, 0].abs()  # a 1x1 projection: its size is in the norm that is divided by
    close([(moved[0] - starts[0]) * onto], [-LR * gs[0][0].sign()], 1e-12)
    starts, gs, noise = draws(5, ((4, 6),))
    grown = [[g * 10.0**t for g in step] for t, step in enumerate(gs)]
    kept: list[list[torch.Tensor]] = []
    trajectory("apollo", starts, grown, noise=noise, lr=LR, rank=2, keep=kept)
    steps = [float((b[0] - a[0]).norm()) for a, b in zip([starts, *kept], kept)]
    assert all(b <= 1.01 * a * (1 + 1e-9) for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("name", ["prodigy", "d_adapt_adam", "d_adapt_sgd"])
def test_estimated_rates_do_not_hang_on_gradient_scale_or_on_the_split(name) -> None:
    starts, gs, _ = draws(15, ((8,),))
    one = trajectory(name, starts, gs, lr=1.0, d0=1e-3)
    cut = trajectory(name, list(starts[0].split(3)), [list(step[0].split(3)) for step in gs], lr=1.0, d0=1e-3)
    close([torch.cat(cut)], one, 1e-12)
    # a power of two scales without rounding; eps alone tells the scales apart
    eps = {"eps": 1e-30} if name != "d_adapt_sgd" else {}
    large = [[g * 1024 for g in step] for step in gs]
    close(
        trajectory(name, starts, large, lr=1.0, d0=1e-3, **eps),
        trajectory(name, starts, gs, lr=1.0, d0=1e-3, **eps),
        1e-9,
    )


@pytest.mark.parametrize(
    ("name", "given", "bound"), [("prodigy", {}, 10.0), ("d_adapt_sgd", {"momentum": 0.0}, 40.0)], ids=str
)
def test_estimated_distance_grows_to_the_true_one_from_below(name, given, bound) -> None:
    """On a convex function d is at most the distance (largest element), or twice it (2-norm, the third version)."""
    p, target = torch.zeros(4, dtype=torch.float64), torch.full((4,), 10.0, dtype=torch.float64)
    seen: list[float] = []

    def watched(*sums, **words):
        shared = RULES[name].settle(*sums, **words)
        seen.append(float(shared["d"]))
        return shared

    rule = dataclasses.replace(RULES[name], settle=watched)
    gs: list[list[torch.Tensor]] = []
    here = p
    for _ in range(50):  # gradients depend on where we are, so the steps are replayed from the start
        gs.append([(here - target).sign()])
        here = trajectory(rule, [p], gs, lr=1.0, d0=1e-3, **given)[0]
    assert seen[0] == 1e-3 and 0.2 * bound < max(seen) <= bound


# Against the named implementations.


def against(make, name, *, shapes, dtype=torch.float64, num=15, lr=None, tolerance=1e-6, decay=0.0, **options):
    starts, gs, noise = draws(num, shapes, dtype)
    theirs = [torch.nn.Parameter(p.clone()) for p in starts]
    peer = make(theirs)
    for step in gs:
        for k, (p, g) in enumerate(zip(theirs, step)):
            if RULES[name].is_global:  # a bowl, as gradients that never turn let the estimate run away
                step[k] = g = p.detach() - starts[k] - 3 + 0.1 * g
            p.grad = g.clone()
        peer.step()
    close(run(name, starts, gs, noise, lr, decay=decay, **options), theirs, tolerance)


FLAT = ((5,), (4, 6), (7, 3))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_adafactor(decay) -> None:
    for lr in (1e-2, 0.5):
        make = lambda ps, lr=lr: torch.optim.Adafactor(ps, lr=lr, weight_decay=decay)
        against(make, "adafactor", shapes=(*FLAT, (1, 5), (1,)), lr=lr, decay=decay, tolerance=1e-12)
        against(make, "adafactor", shapes=FLAT, lr=lr, decay=decay, dtype=torch.float32)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_pytorch_optimizer_came(decay) -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    make = lambda ps: peer.CAME(ps, lr=LR, weight_decay=decay, foreach=False)
    against(make, "came", shapes=FLAT, decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_timm_lamb_lars_mars(decay) -> None:
    timm = pytest.importorskip("timm.optim")
    make = lambda ps: timm.Lamb(ps, lr=LR, weight_decay=decay, max_grad_norm=None, always_adapt=True)
    against(make, "lamb", shapes=FLAT, inner_decay=decay)
    for nesterov in (False, True):
        make = lambda ps, n=nesterov: timm.Lars(
            ps, lr=0.5, momentum=0.9, nesterov=n, weight_decay=decay, always_adapt=True
        )
        against(make, "lars", shapes=FLAT, lr=0.5, inner_decay=decay, nesterov=nesterov)
    for variant in ("adamw", "lion"):
        make = lambda ps, v=variant: timm.Mars(
            ps, lr=LR, betas=(0.95, 0.99), weight_decay=decay, optimize_1d=True, mars_type=v
        )
        against(make, "mars", shapes=FLAT, decay=decay, variant=variant)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_optax_lamb_and_lars(decay) -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    starts, gs, noise = draws(15, FLAT, torch.float32)

    def theirs(chain):
        ps = [jax.numpy.asarray(p.numpy()) for p in starts]
        state = chain.init(ps)
        for step in gs:
            change, state = chain.update([jax.numpy.asarray(g.numpy()) for g in step], state, ps)
            ps = optax.apply_updates(ps, change)
        return [np.asarray(p) for p in ps]

    close(run("lamb", starts, gs, noise, inner_decay=decay), theirs(optax.lamb(LR, weight_decay=decay)), 1e-5)
    wanted = theirs(optax.lars(0.5, weight_decay=decay, trust_coefficient=0.001, momentum=0.9))
    close(run("lars", starts, gs, noise, 0.5, decay=decay, form="coupled"), wanted, 1e-5)


def test_equals_optimi_stable_adamw() -> None:
    optimi = pytest.importorskip("optimi")
    make = lambda ps: optimi.StableAdamW(ps, lr=LR, weight_decay=0.0, foreach=False, triton=False)
    against(make, "stable_adamw", shapes=FLAT)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"safeguard_warmup": True}, {"safeguard_warmup": True}),
        ({"bias_correction": True}, {"use_bias_correction": True}),
        ({"growth_rate": 1.1, "d0": 1e-3, "d_coef": 0.5}, {"growth_rate": 1.1, "d0": 1e-3, "d_coef": 0.5}),
        ({"inner_decay": 0.1, "d0": 1e-3}, {"weight_decay": 0.1, "d0": 1e-3}),
    ],
    ids=str,
)
def test_equals_prodigyopt(ours, theirs, capsys) -> None:
    peer = pytest.importorskip("prodigyopt")
    against(lambda ps: peer.Prodigy(ps, **theirs), "prodigy", shapes=FLAT, num=30, tolerance=1e-12, **ours)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("d0", [1e-6, 1e-3])
def test_equals_pytorch_optimizer_d_adaptation(d0, decay) -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    for corrected in (False, True):
        make = lambda ps, c=corrected: peer.DAdaptAdam(
            ps, d0=d0, bias_correction=c, weight_decay=decay, weight_decouple=True, foreach=False
        )
        options = {"bias_correction": corrected, "d0": d0}
        if not decay:
            against(make, "d_adapt_adam", shapes=FLAT, num=30, tolerance=5e-6, **options)  # its sums are float32
    make = lambda ps: peer.DAdaptSGD(ps, d0=d0, momentum=0.9, weight_decay=decay, weight_decouple=False, foreach=False)
    against(make, "d_adapt_sgd", shapes=FLAT, num=30, d0=d0, inner_decay=decay)


def test_equals_pytorch_optimizer_adam_mini_on_whole_tensors() -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    starts, gs, _ = draws(15, FLAT, torch.float32)
    model = torch.nn.ParameterDict({f"part{i}": torch.nn.Parameter(p.clone()) for i, p in enumerate(starts)})
    mini = peer.AdamMini(model, lr=LR, weight_decay=0.0, num_embeds=8, num_heads=2, foreach=False)
    for step in gs:
        for p, g in zip(model.values(), step):
            p.grad = g.clone()
        mini.step()
    close(trajectory("adam_mini", starts, gs, blocks="tensor"), list(model.values()), 1e-6)


# Stages.


def stepped(stage, options=None, rule="sgd", num=1, shapes=SHAPES, noise=None, **words):
    starts, gs, drawn = draws(num, shapes)
    got = trajectory(
        rule,
        starts,
        gs,
        lr=words.pop("lr", 1.0),
        stages={stage: options or {}},
        noise=drawn if noise else None,
        **words,
    )
    return starts, gs, drawn, got


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("centralize", {}),
        ("clip_value", {"most": 0.3}),
        ("clip_tensor", {}),
        ("clip_tensor", {"most": 100.0}),
        ("agc", {}),
        ("agc", {"most": 0.5, "eps": 3.0}),
    ],
    ids=str,
)
def test_gradient_stages_agree_with_numpy(stage, options) -> None:
    starts, gs, _, got = stepped(stage, options)
    wanted = [p.numpy() - getattr(oracles, stage)(p.numpy(), g.numpy(), **options) for p, g in zip(starts, gs[0])]
    close(got, wanted, 1e-13)


@pytest.mark.parametrize("options", [{}, {"least": 0.9}], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_cautious_agrees_with_numpy(options, rule) -> None:
    starts, gs, _ = draws(2)
    plain: list[list[torch.Tensor]] = []
    trajectory(rule, starts, gs, lr=0.1, keep=plain)
    # the second change of the free rule from the same place, masked
    free = trajectory(rule, starts, gs, lr=[0.0, 0.1])
    got = trajectory(rule, starts, gs, lr=[0.0, 0.1], stages={"cautious": options})
    wanted = [
        p.numpy() + oracles.cautious(g.numpy(), (q - p).numpy(), **options) for p, g, q in zip(starts, gs[1], free)
    ]
    close(got, wanted, 1e-13)


def test_cautious_leaves_sgd_alone_and_never_moves_against_the_gradient() -> None:
    starts, gs, _ = draws(1)
    close(trajectory("sgd", starts, gs, stages={"cautious": {}}), trajectory("sgd", starts, gs), 1e-15)
    gs = [gs[0], [-g * 0.01 for g in gs[0]]]
    kept: list[list[torch.Tensor]] = []
    trajectory("adamw", starts, gs, stages={"cautious": {}}, keep=kept)
    assert all(torch.equal(a, b) for a, b in zip(*kept))  # momentum still points the other way


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clip_update_rms_agrees_with_numpy(most) -> None:
    starts, gs, _, got = stepped("clip_update_rms", {"most": most}, lr=0.1)
    wanted = [p.numpy() + oracles.clip_update_rms(-0.1 * g.numpy(), 0.1, most) for p, g in zip(starts, gs[0])]
    close(got, wanted, 1e-13)
    for p, q in zip(starts, got):
        assert float((q - p).square().mean().sqrt()) <= 0.1 * most * (1 + 1e-12)


@pytest.mark.parametrize("options", [{}, {"coefficient": 0.02}, {"most": 0.3}], ids=str)
def test_trust_ratio_agrees_with_numpy_and_makes_lamb(options) -> None:
    starts, gs, _ = draws(1)
    starts[1].zero_()
    got = trajectory("sgd", starts, gs, lr=0.1, decay=0.2, form="decoupled", stages={"trust_ratio": options})
    wanted = [
        p.numpy() + oracles.trust_ratio(p.numpy(), -0.1 * (g.numpy() + 0.2 * p.numpy()), 0.1, **options)
        for p, g in zip(starts, gs[0])
    ]
    close(got, wanted, 1e-13)
    starts, gs, _ = draws(15)
    ours = trajectory("adamw", starts, gs, decay=0.3, eps=1e-6, stages={"trust_ratio": {}})
    close(ours, trajectory("lamb", starts, gs, inner_decay=0.3), 1e-12)


def test_agc_equals_timm() -> None:
    timm = pytest.importorskip("timm.utils.agc")
    shapes = ((5,), (4, 6), (4, 3, 2, 2))
    starts, gs, _, got = stepped("agc", shapes=shapes)
    for p, g, q in zip(starts, gs[0], got):
        held = torch.nn.Parameter(p.clone())
        held.grad = g.clone()
        timm.adaptive_clip_grad(held)
        close([q], [p - held.grad], 1e-12)


def test_centralized_steps_keep_row_means() -> None:
    starts, _, _, got = stepped("centralize", rule="sgd", num=5, shapes=((4, 6), (4, 3, 2, 2)))
    for p, q in zip(starts, got):
        close([q.reshape(4, -1).mean(1)], [p.reshape(4, -1).mean(1)], 1e-13)


def test_gradient_noise_has_its_variance() -> None:
    zeros = [[torch.zeros(40000, dtype=torch.float64)] for _ in range(3)]
    noise = [[torch.randn(40000, dtype=torch.float64)] for _ in range(3)]
    kept: list[list[torch.Tensor]] = []
    stages = {"gradient_noise": {"eta": 0.3}}
    trajectory("sgd", zeros[0], zeros, lr=1.0, stages=stages, noise=noise, keep=kept)
    before = zeros[0]
    for t, after in enumerate(kept, start=1):
        step = before[0] - after[0]
        close([step], [math.sqrt(0.3 / t**0.55) * noise[t - 1][0]], 1e-13)
        assert float(step.var()) == pytest.approx(0.3 / t**0.55, rel=0.05)
        before = after


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (2, 0.8), (3, 1.0)])
def test_lookahead_agrees_with_its_paper(k, alpha) -> None:
    starts, gs, _ = draws(11)
    got = trajectory("sgd", starts, gs, lr=0.1, stages={"lookahead": {"k": k, "alpha": alpha}})
    for i, p in enumerate(starts):
        fast = slow = p.numpy().copy()
        for t, step in enumerate(gs, start=1):
            fast = fast - 0.1 * step[i].numpy()
            if t % k == 0:
                fast = slow = slow + alpha * (fast - slow)
        close([got[i]], [fast], 1e-13)
    if alpha == 1.0:
        close(got, trajectory("sgd", starts, gs, lr=0.1), 1e-13)


def test_lookahead_equals_pytorch_optimizer() -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    starts, gs, _ = draws(12, FLAT)
    theirs = [torch.nn.Parameter(p.clone()) for p in starts]
    optimizer = peer.Lookahead(torch.optim.AdamW(theirs, lr=LR, weight_decay=0.0), k=5, alpha=0.5)
    for step in gs:
        for p, g in zip(theirs, step):
            p.grad = g.clone()
        optimizer.step()
    close(trajectory("adamw", starts, gs, stages={"lookahead": {}}), theirs, 1e-12)


def test_hyperball_keeps_norms_and_leaves_vectors_and_zeros() -> None:
    starts, gs, _ = draws(10)
    starts[2] = torch.zeros_like(starts[2])
    got = trajectory("adamw", starts, gs, stages={"hyperball": {}})
    free = trajectory("adamw", starts, gs)
    for i, p in enumerate(starts):
        if p.ndim >= 2 and i != 2:
            assert float(got[i].norm()) == pytest.approx(float(p.norm()), rel=1e-13)
        else:
            torch.testing.assert_close(got[i], free[i], rtol=1e-13, atol=1e-15)
    # by numpy: one step of sgd, then back to the sphere
    got = trajectory("sgd", starts[1:2], [gs[0][1:2], gs[1][1:2]], lr=0.1, stages={"hyperball": {}})
    x = starts[1].numpy()
    radius = np.linalg.norm(x)
    for step in gs[:2]:
        x = x - 0.1 * step[1].numpy()
        x = x / np.linalg.norm(x) * radius
    close(got, [x], 1e-13)


def test_hyperball_with_trust_ratio_is_adam_h() -> None:
    starts, gs, _ = draws(6, ((4, 6),))
    got = trajectory("adamw", starts, gs, lr=0.1, stages={"trust_ratio": {}, "hyperball": {}})
    x, m, v = starts[0].numpy(), 0.0, 0.0
    radius = np.linalg.norm(x)
    for t, step in enumerate(gs, start=1):
        g = step[0].numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = x - 0.1 * radius * u / np.linalg.norm(u)
        x = radius * x / np.linalg.norm(x)
    close(got, [x], 1e-12)


OURS = ("gradient_stages", "update_stages", "weight_stages")
STAGE_NAMES = [name for name in STAGES if STAGES[name].update.__module__.rsplit(".", 1)[-1] in OURS]


@pytest.mark.parametrize("name", STAGE_NAMES)
@pytest.mark.parametrize("rule", ["sgd", "adamw", "lamb", "adafactor"])
def test_stages_stand_still_and_stay_finite(name, rule) -> None:
    starts, gs, noise = draws(6, dtype=torch.float32)
    starts[0] = torch.zeros_like(starts[0])
    zeros = [[torch.zeros_like(g) for g in step] for step in gs]
    words = {"stages": {name: {}}, "noise": noise if "noise" in STAGES[name].needs else None}
    assert all(torch.equal(a, b) for a, b in zip(trajectory(rule, starts, gs, lr=0.0, **words), starts))
    if name != "gradient_noise":
        assert all(torch.equal(a, b) for a, b in zip(trajectory(rule, starts, zeros, **words), starts))
    for scale in (1e-15, 1e12):
        mixed = [[g * scale for g in step] for step in gs[:2]] + zeros[:2] + gs[:2]
        assert all(bool(x.isfinite().all()) for x in trajectory(rule, starts, mixed, **words))


def test_every_stage_has_a_paper_and_words() -> None:
    assert len(STAGE_NAMES) == 10
    for name in STAGE_NAMES:
        assert STAGES[name].paper and "Cost:" in (STAGES[name].update.__doc__ or ""), name
    for name in ORACLES:
        rule = RULES[name]
        assert rule.paper and rule.use and rule.avoid and rule.evidence and rule.year, name
        doc = rule.update.__doc__ or ""
        assert "Args:" in doc and "Cost:" in doc and "Departures:" in doc, name
