"""Slow float64 transcriptions of the papers' formulas in numpy, parameter by parameter: the oracles of element-wise rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Starts, Gradients = Sequence[Array], Sequence[Sequence[Array]]


def _each(ps: Starts, gs: Gradients) -> Iterator[tuple[Array, list[Array]]]:
    """(parameter, its gradients), one parameter after another."""
    for i, p in enumerate(ps):
        yield np.array(p, dtype=np.float64), [np.array(step[i], dtype=np.float64) for step in gs]


def lion(ps: Starts, gs: Gradients, *, lr: float, b1: float = 0.9, b2: float = 0.99) -> list[Array]:
    """Chen et al. 2023, algorithm 2."""
    ends = []
    for x, mine in _each(ps, gs):
        m = np.zeros_like(x)
        for g in mine:
            c = b1 * m + (1 - b1) * g
            x = x - lr * np.sign(c)
            m = b2 * m + (1 - b2) * g
        ends.append(x)
    return ends


def signum(ps: Starts, gs: Gradients, *, lr: float, momentum: float = 0.9) -> list[Array]:
    """Bernstein et al. 2018, algorithm 2."""
    ends = []
    for x, mine in _each(ps, gs):
        m = np.zeros_like(x)
        for g in mine:
            m = momentum * m + (1 - momentum) * g
            x = x - lr * np.sign(m)
        ends.append(x)
    return ends


def rmsprop(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b2: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    variant: str = "torch",
) -> list[Array]:
    """Tieleman and Hinton 2012; Graves 2013, equations 38 to 42 without their own step form."""
    ends = []
    for x, mine in _each(ps, gs):
        mean_square = np.ones_like(x) if variant == "tf" else np.zeros_like(x)
        mean, buffer = np.zeros_like(x), np.zeros_like(x)
        for g in mine:
            mean_square = b2 * mean_square + (1 - b2) * g**2
            mean = b2 * mean + (1 - b2) * g
            variance = mean_square - mean**2 if centered else mean_square
            divisor = np.sqrt(variance + eps) if variant == "tf" else np.sqrt(variance) + eps
            buffer = momentum * buffer + g / divisor
            x = x - lr * buffer
        ends.append(x)
    return ends


def adagrad(ps: Starts, gs: Gradients, *, lr: float, eps: float = 1e-10, start: float = 0.0) -> list[Array]:
    """Duchi et al. 2011, the diagonal form."""
    ends = []
    for x, mine in _each(ps, gs):
        for t in range(1, len(mine) + 1):
            total = start + sum(g**2 for g in mine[:t])
            x = x - lr * mine[t - 1] / (np.sqrt(total) + eps)
        ends.append(x)
    return ends


def adadelta(ps: Starts, gs: Gradients, *, lr: float, b2: float = 0.95, eps: float = 1e-6) -> list[Array]:
    """Zeiler 2012, algorithm 1, its step times lr."""
    ends = []
    for x, mine in _each(ps, gs):
        e_g, e_x = np.zeros_like(x), np.zeros_like(x)
        for g in mine:
            e_g = b2 * e_g + (1 - b2) * g**2
            dx = -np.sqrt(e_x + eps) / np.sqrt(e_g + eps) * g
            e_x = b2 * e_x + (1 - b2) * dx**2
            x = x + lr * dx
        ends.append(x)
    return ends


def nadam(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum_decay: float = 0.004,
    variant: str = "torch",
) -> list[Array]:
    """Dozat 2016, algorithm 2 with its schedule of mu (torch) or a constant one; AlgoPerf's baseline."""

    def mu(t: int) -> float:
        return b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) if variant == "torch" else b1

    ends = []
    for x, mine in _each(ps, gs):
        m, n = np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            m = b1 * m + (1 - b1) * g
            n = b2 * n + (1 - b2) * g**2
            n_hat = n / (1 - b2**t)
            if variant == "algoperf":
                m_bar = (b1 * m + (1 - b1) * g) / (1 - b1**t)
            else:
                so_far = math.prod(mu(i) for i in range(1, t + 1))
                m_bar = (1 - mu(t)) * g / (1 - so_far) + mu(t + 1) * m / (1 - so_far * mu(t + 1))
            x = x - lr * m_bar / (np.sqrt(n_hat) + eps)
        ends.append(x)
    return ends


def radam(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    least: float = 5.0,
) -> list[Array]:
    """Liu et al. 2019, algorithm 2; eps beside the root of v."""
    rho_inf = 2 / (1 - b2) - 1
    ends = []
    for x, mine in _each(ps, gs):
        m, v = np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            m_hat = m / (1 - b1**t)
            rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
            if rho > least:
                factor = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
                x = x - lr * factor * m_hat * math.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
            else:
                x = x - lr * m_hat
        ends.append(x)
    return ends


def laprop(
    ps: Starts, gs: Gradients, *, lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-15
) -> list[Array]:
    """Ziyin et al. 2020, algorithm 1."""
    ends = []
    for x, mine in _each(ps, gs):
        m, n = np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            n = b2 * n + (1 - b2) * g**2
            m = b1 * m + (1 - b1) * g / (np.sqrt(n / (1 - b2**t)) + eps)
            x = x - lr * m / (1 - b1**t)
        ends.append(x)
    return ends


def adabelief(
    ps: Starts, gs: Gradients, *, lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-16
) -> list[Array]:
    """Zhuang et al. 2020, algorithm 2."""
    ends = []
    for x, mine in _each(ps, gs):
        m, s = np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            m = b1 * m + (1 - b1) * g
            s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
            m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
            x = x - lr * m_hat / (np.sqrt(s_hat) + eps)
        ends.append(x)
    return ends


def adan(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.98,
    b2: float = 0.92,
    b3: float = 0.99,
    eps: float = 1e-8,
) -> list[Array]:
    """Xie et al. 2022, algorithm 1 with its authors' bias corrections; their 1 - beta is our b."""
    ends = []
    for x, mine in _each(ps, gs):
        m, v, n = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            diff = g - mine[t - 2] if t > 1 else np.zeros_like(g)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * diff
            n = b3 * n + (1 - b3) * (g + b2 * diff) ** 2
            m_hat, v_hat, n_hat = m / (1 - b1**t), v / (1 - b2**t), n / (1 - b3**t)
            x = x - lr / (np.sqrt(n_hat) + eps) * (m_hat + b2 * v_hat)
        ends.append(x)
    return ends


def adopt(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.9999,
    eps: float = 1e-6,
    power: float = 0.25,
    variant: str = "paper",
) -> list[Array]:
    """Taniguchi et al. 2024, second version, clipped ADOPT: the first gradient is the paper's g_0."""
    ends = []
    for x, mine in _each(ps, gs):
        m, v = np.zeros_like(x), mine[0] ** 2
        for t, g in enumerate(mine[1:], start=1):
            ratio = g / np.maximum(np.sqrt(v), eps)
            if variant != "plain":
                bound = (t if variant == "paper" else t + 1) ** power
                ratio = np.clip(ratio, -bound, bound)
            m = b1 * m + (1 - b1) * ratio
            x = x - lr * m
            v = b2 * v + (1 - b2) * g**2
        ends.append(x)
    return ends


def ademamix(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    warmup: int = 0,
    eps: float = 1e-8,
) -> list[Array]:
    """Pagliardini et al. 2024, algorithm 1, with the two schedules of its section 3."""
    ends = []
    for x, mine in _each(ps, gs):
        m1, m2, nu = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            a, b = alpha, b3
            if warmup:
                a = min(t * alpha / warmup, alpha)
                low, high, part = math.log(b1), math.log(b3), t / warmup
                b = min(math.exp(low * high / ((1 - part) * high + part * low)), b3) if part < 1 else b3
            m1 = b1 * m1 + (1 - b1) * g
            m2 = b * m2 + (1 - b) * g
            nu = b2 * nu + (1 - b2) * g**2
            m1_hat, nu_hat = m1 / (1 - b1**t), nu / (1 - b2**t)
            x = x - lr * (m1_hat + a * m2) / (np.sqrt(nu_hat) + eps)
        ends.append(x)
    return ends


def _schedule_free(
    x0: Array,
    directions: Callable[[int], Array],
    *,
    lr: float,
    b1: float,
    warmup: int,
    power: float,
    r: float,
    num: int,
) -> tuple[Array, Array, Array]:
    """Defazio et al. 2024, algorithm 1 with all three sequences kept: (x, y, z) after ``num`` updates."""
    x, y, z = x0.copy(), x0.copy(), x0.copy()
    total, largest = 0.0, 0.0
    for t in range(1, num + 1):
        rate = lr * min(1.0, t / warmup) if warmup else lr
        z = z - rate * directions(t)
        largest = max(largest, rate)
        weight = t**r * largest**power
        total += weight
        c = weight / total
        x = (1 - c) * x + c * z
        y = (1 - b1) * z + b1 * x
    return x, y, z


def schedule_free_sgd(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    warmup: int = 0,
    weight_lr_power: float = 2.0,
    r: float = 0.0,
    averages: bool = False,
) -> list[Array]:
    """The live parameters y, or with ``averages`` x."""
    ends = []
    for x0, mine in _each(ps, gs):
        x, y, _ = _schedule_free(
            x0,
            lambda t, mine=mine: mine[t - 1],
            lr=lr,
            b1=b1,
            warmup=warmup,
            power=weight_lr_power,
            r=r,
            num=len(mine),
        )
        ends.append(x if averages else y)
    return ends


def schedule_free_adamw(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    warmup: int = 0,
    weight_lr_power: float = 2.0,
    r: float = 0.0,
    averages: bool = False,
) -> list[Array]:
    """The live parameters y, or with ``averages`` x."""
    ends = []
    for x0, mine in _each(ps, gs):
        v, pushes = np.zeros_like(x0), []
        for t, g in enumerate(mine, start=1):
            v = b2 * v + (1 - b2) * g**2
            pushes.append(g / (np.sqrt(v / (1 - b2**t)) + eps))
        x, y, _ = _schedule_free(
            x0,
            lambda t, pushes=pushes: pushes[t - 1],
            lr=lr,
            b1=b1,
            warmup=warmup,
            power=weight_lr_power,
            r=r,
            num=len(mine),
        )
        ends.append(x if averages else y)
    return ends


def gpa_adamw(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_x: float = 0.9967,
    mu_y: float = 0.7,
) -> list[Array]:
    """Defazio et al. 2025, GPA with AdamW as its base, all three sequences kept; the live parameters y."""
    ends = []
    for x0, mine in _each(ps, gs):
        x, y, z = x0.copy(), x0.copy(), x0.copy()
        m, v = np.zeros_like(x0), np.zeros_like(x0)
        for t, g in enumerate(mine, start=1):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            z = z - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            x = mu_x * x + (1 - mu_x) * z
            y = mu_y * x + (1 - mu_y) * z
        ends.append(y)
    return ends


def sophia(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    curvatures: Gradients,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float = 0.05,
    eps: float = 1e-12,
    frequency: int = 10,
) -> list[Array]:
    """Liu et al. 2023, algorithm 3 with the estimates given. Not in ``ORACLES``: the engine has no estimates yet."""
    ends = []
    for (x, mine), (_, estimates) in zip(_each(ps, gs), _each(ps, curvatures)):
        m, h = np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            m = b1 * m + (1 - b1) * g
            if t % frequency == 1 % frequency:
                h = b2 * h + (1 - b2) * estimates[t - 1]
            x = x - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
        ends.append(x)
    return ends


ORACLES: dict[str, Callable[..., list[Array]]] = {
    "lion": lion,
    "signum": signum,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "nadam": nadam,
    "nadamw": nadam,
    "radam": radam,
    "laprop": laprop,
    "adabelief": adabelief,
    "adan": adan,
    "adopt": adopt,
    "ademamix": ademamix,
    "schedule_free_sgd": schedule_free_sgd,
    "schedule_free_adamw": schedule_free_adamw,
    "gpa_adamw": gpa_adamw,
}

#: Option sets that change the maths.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lion", {"b1": 0.95, "b2": 0.98}),
    ("signum", {"momentum": 0.0}),
    ("rmsprop", {"momentum": 0.9}),
    ("rmsprop", {"centered": True}),
    ("rmsprop", {"centered": True, "momentum": 0.9, "b2": 0.9}),
    ("rmsprop", {"variant": "tf", "b2": 0.9, "eps": 1e-10}),
    ("rmsprop", {"variant": "tf", "b2": 0.9, "momentum": 0.9}),
    ("rmsprop", {"variant": "tf", "centered": True, "eps": 1e-3}),
    ("adagrad", {"start": 0.1, "eps": 1e-3}),
    ("adadelta", {"b2": 0.9, "eps": 1e-3}),
    ("nadam", {"variant": "dozat"}),
    ("nadam", {"variant": "algoperf"}),
    ("nadamw", {"momentum_decay": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    ("radam", {"least": 4.0}),
    ("radam", {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    ("radam", {"b2": 0.5}),
    ("laprop", {"b1": 0.95, "b2": 0.9, "eps": 1e-3}),
    ("adabelief", {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    ("adan", {"b1": 0.9, "b2": 0.8, "b3": 0.95, "eps": 1e-3}),
    ("adopt", {"variant": "late"}),
    ("adopt", {"variant": "plain"}),
    ("adopt", {"power": 0.333, "b1": 0.8, "b2": 0.99, "eps": 1e-1}),
    ("ademamix", {"warmup": 12}),
    ("ademamix", {"warmup": 100, "alpha": 8.0, "b1": 0.8, "b2": 0.95, "b3": 0.999, "eps": 1e-3}),
    ("schedule_free_sgd", {"warmup": 7}),
    ("schedule_free_sgd", {"b1": 0.5, "weight_lr_power": 0.0, "r": 1.5}),
    ("schedule_free_adamw", {"warmup": 7}),
    ("schedule_free_adamw", {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "weight_lr_power": 1.0, "r": 1.0, "warmup": 30}),
    ("gpa_adamw", {"mu_x": 0.9, "mu_y": 0.9, "b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    ("gpa_adamw", {"mu_y": 1.0}),
]
