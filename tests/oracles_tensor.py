"""Slow float64 transcriptions of rules and stages that read rows or whole tensors: plain numpy, a loop over steps and parameters.

A rule's oracle takes the parameters, a list of gradients for each step and the rate, and gives the final parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Steps = Sequence[Sequence[Array]]


def matrices(x: Array) -> list[Array]:
    """The matrices that a parameter is made of, as views: a vector is a row, a kernel is (out, all else)."""
    if x.ndim < 2:
        return [x.reshape(1, -1)]
    if x.ndim > 3:
        return [x.reshape(x.shape[0], -1)]
    return [x] if x.ndim == 2 else list(x)


def rms(x: Array) -> float:
    return math.sqrt(float(np.mean(x**2)))


def adafactor(
    ps,
    gs,
    *,
    lr,
    beta2_decay=-0.8,
    eps1=None,
    eps2=1e-3,
    most_rms=1.0,
    relative_step=True,
    scale_parameter=True,
    variant="torch",
):
    """Shazeer and Stern 2018, algorithms 4 and 5; torch's places of eps."""
    done = []
    for i, p0 in enumerate(ps):
        whole = p0.copy()
        for k, p in enumerate(matrices(whole)):
            rows, cols = np.zeros(p.shape[0]), np.zeros(p.shape[1])
            for t, grads in enumerate(gs, start=1):
                g = matrices(grads[i])[k]
                b2 = 1 - t**beta2_decay
                if variant == "torch":
                    e, g2 = (np.finfo(float).eps if eps1 is None else eps1), g**2
                else:
                    e, g2 = 0.0, g**2 + (1e-30 if eps1 is None else eps1)
                rows = b2 * rows + (1 - b2) * g2.mean(axis=1)
                cols = b2 * cols + (1 - b2) * g2.mean(axis=0)
                v = np.outer(rows, cols) / max(rows.mean(), e) if p0.ndim > 1 else cols[None]
                u = g / np.sqrt(np.maximum(v, e * e))
                u = u / max(1, rms(u) / most_rms)
                rho = min(lr, 1 / math.sqrt(t)) if relative_step else lr
                p -= rho * (max(eps2, rms(p)) if scale_parameter else 1) * u
        done.append(whole)
    return done


def came(ps, gs, *, lr, b1=0.9, b2=0.999, b3=0.9999, eps1=1e-30, eps2=1e-16, most_rms=1.0):
    """Luo et al. 2023, algorithm 2; vectors are not factored and have no confidence."""
    done = []
    for i, p0 in enumerate(ps):
        whole = p0.copy()
        for k, p in enumerate(matrices(whole)):
            m = np.zeros_like(p)
            r, c, big_r, big_c = np.zeros(p.shape[0]), np.zeros(p.shape[1]), np.zeros(p.shape[0]), np.zeros(p.shape[1])
            for grads in gs:
                g = matrices(grads[i])[k]
                square = g**2 + eps1
                r, c = b2 * r + (1 - b2) * square.mean(1), b2 * c + (1 - b2) * square.mean(0)
                u = g / np.sqrt(np.outer(r, c) / r.mean() if p0.ndim > 1 else c[None])
                u = u / max(1, rms(u) / most_rms)
                m = b1 * m + (1 - b1) * u
                if p0.ndim < 2:
                    p -= lr * m
                    continue
                left = (u - m) ** 2 + eps2
                big_r, big_c = b3 * big_r + (1 - b3) * left.mean(1), b3 * big_c + (1 - b3) * left.mean(0)
                p -= lr * m / np.sqrt(np.outer(big_r, big_c) / big_r.mean())
        done.append(whole)
    return done


def lamb(ps, gs, *, lr, b1=0.9, b2=0.999, eps=1e-6, inner_decay=0.0, most=math.inf):
    """You et al. 2019, algorithm 2, phi the identity."""
    done = []
    for i, p0 in enumerate(ps):
        p, m, v = p0.copy(), np.zeros_like(p0), np.zeros_like(p0)
        for t, grads in enumerate(gs, start=1):
            g = grads[i]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + inner_decay * p
            w, u = math.sqrt(np.sum(p**2)), math.sqrt(np.sum(r**2))
            p = p - lr * min(w / u if w and u else 1.0, most) * r
        done.append(p)
    return done


def lars(ps, gs, *, lr, momentum=0.9, nesterov=False, trust=1e-3, eps=1e-8, inner_decay=0.0):
    """You et al. 2017, algorithm 1, the rate outside of the momentum."""
    done = []
    for i, p0 in enumerate(ps):
        p, m = p0.copy(), np.zeros_like(p0)
        for grads in gs:
            g = grads[i]
            w, n = math.sqrt(np.sum(p**2)), math.sqrt(np.sum(g**2))
            local = trust * w / (n + inner_decay * w + eps) if w and n else 1.0
            g = local * (g + inner_decay * p)
            m = momentum * m + g
            p = p - lr * (g + momentum * m if nesterov else m)
        done.append(p)
    return done


def mars(ps, gs, *, lr, b1=0.95, b2=0.99, eps=1e-8, gamma=0.025, variant="adamw"):
    """Yuan et al. 2024, algorithms 2 (AdamW) and 3 (Lion), approximate form."""
    done = []
    for i, p0 in enumerate(ps):
        p, m, v, last = p0.copy(), np.zeros_like(p0), np.zeros_like(p0), gs[0][i]
        for t, grads in enumerate(gs, start=1):
            g = grads[i]
            c = g + gamma * b1 / (1 - b1) * (g - last)
            n = math.sqrt(np.sum(c**2))
            c = c / n if n > 1 else c
            m, v, last = b1 * m + (1 - b1) * c, b2 * v + (1 - b2) * c**2, g
            if variant == "lion":
                p = p - lr * np.sign(m)
            else:
                p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        done.append(p)
    return done


def stable_adamw(ps, gs, *, lr, b1=0.9, b2=0.99, eps=1e-6):
    """Wortsman et al. 2023, algorithm 2."""
    done = []
    for i, p0 in enumerate(ps):
        p, m, v = p0.copy(), np.zeros_like(p0), np.zeros_like(p0)
        for t, grads in enumerate(gs, start=1):
            g = grads[i]
            h1, h2 = b1 * (1 - b1 ** (t - 1)) / (1 - b1**t), b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
            m, v = h1 * m + (1 - h1) * g, h2 * v + (1 - h2) * g**2
            p = p - lr / max(1, math.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))) * m / (np.sqrt(v) + eps)
        done.append(p)
    return done


def adam_mini(ps, gs, *, lr, b1=0.9, b2=0.999, eps=1e-8, blocks="row"):
    """Zhang et al. 2024, algorithm 1: one v for each block."""
    done = []
    for i, p0 in enumerate(ps):
        whole = p0.copy()
        for k, p in enumerate(matrices(whole)):
            for row in [slice(j, j + 1) for j in range(len(p))] if blocks == "row" else [slice(None)]:
                m, v = np.zeros_like(p[row]), 0.0
                for t, grads in enumerate(gs, start=1):
                    g = matrices(grads[i])[k][row]
                    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * float(np.mean(g**2))
                    p[row] -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
        done.append(whole)
    return done


def prodigy(
    ps,
    gs,
    *,
    lr,
    b1=0.9,
    b2=0.999,
    b3=None,
    eps=1e-8,
    d0=1e-6,
    d_coef=1.0,
    growth_rate=math.inf,
    bias_correction=False,
    safeguard_warmup=False,
    inner_decay=0.0,
):
    """Mishchenko and Defazio 2023, algorithm 4, with the numbers of all parameters in one."""
    b3 = math.sqrt(b2) if b3 is None else b3
    x = np.concatenate([p.ravel() for p in ps])
    x0, m, v, s, r = x.copy(), np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), 0.0
    d = d_max = d0
    for t, grads in enumerate(gs, start=1):
        g = np.concatenate([g.ravel() for g in grads])
        k = d * lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if bias_correction else 1)
        m, v = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * d**2 * g**2
        r = b3 * r + d / d0 * k * float(g @ (x0 - x))
        s = b3 * s + d / d0 * (d if safeguard_warmup else k) * g
        found = d_coef * r / np.abs(s).sum()
        first = max(d, found) if d == d0 else d
        d_max = max(d_max, found)
        d_next = min(d_max, first * growth_rate)
        x = x - k * inner_decay * x - k * (m if b1 else d * g) / (np.sqrt(v) + d_next * eps)
        d = d_next
    return split(x, ps)


def d_adapt_adam(
    ps,
    gs,
    *,
    lr,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    d0=1e-6,
    growth_rate=math.inf,
    bias_correction=False,
    inner_decay=0.0,
):
    """Defazio and Mishchenko 2023, the authors' third version of algorithm 4."""
    b = math.sqrt(b2)
    x = np.concatenate([p.ravel() for p in ps])
    m, v, s, r, d = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), 0.0, d0
    for t, grads in enumerate(gs, start=1):
        g = np.concatenate([g.ravel() for g in grads])
        k = d * lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if bias_correction else 1)
        r = b * r + (1 - b) * k * float(np.sum(g * s / (np.sqrt(v) + eps)))
        m, v, s = b1 * m + (1 - b1) * k * g, b2 * v + (1 - b2) * g**2, b * s + (1 - b) * k * g
        x = x - k * inner_decay * x - m / (np.sqrt(v) + eps)
        d = max(d, min(r / ((1 - b) * np.abs(s).sum()), d * growth_rate))
    return split(x, ps)


def d_adapt_sgd(ps, gs, *, lr, momentum=0.9, d0=1e-6, growth_rate=math.inf, inner_decay=0.0):
    """Defazio and Mishchenko 2023, algorithm 3, the authors' third version."""
    x = np.concatenate([p.ravel() for p in ps])
    x0, s, r, d = x.copy(), np.zeros_like(x), 0.0, d0
    first = math.sqrt(sum(float(np.sum(g**2)) for g in gs[0]))
    for grads in gs:
        g = np.concatenate([g.ravel() for g in grads]) + inner_decay * x
        k = d * lr / first
        r += k * float(g @ s)
        s = s + k * g
        d = max(d, min(2 * r / math.sqrt(float(s @ s)), d * growth_rate))
        x = momentum * x + (1 - momentum) * (x0 - s)
    return split(x, ps)


def apollo(
    ps,
    gs,
    *,
    lr,
    noise,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    rank=256,
    refresh=200,
    scale=1.0,
    scaling="channel",
    growth=1.01,
):
    """Zhu et al. 2024, algorithm 1, on the matrix with its shorter side as rows; P from a corner of the noise."""
    done = []
    for i, p0 in enumerate(ps):
        whole = p0.copy()
        for k, p in enumerate(matrices(whole)):
            turn = p.shape[0] > p.shape[1]
            r = min(rank, *p.shape)
            m = v = np.zeros((r, max(p.shape)))
            before = 0.0
            for t, grads in enumerate(gs, start=1):
                g, z = matrices(grads[i])[k], matrices(noise[t - 1][i])[k]
                g, z = (g.T, z.T) if turn else (g, z)
                if (t - 1) % refresh == 0:
                    onto = z[:, :r].T / math.sqrt(r)
                x = onto @ g
                m, v = b1 * m + (1 - b1) * x, b2 * v + (1 - b2) * x**2
                adam = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
                axis = 0 if scaling == "channel" else None
                u = g * np.sqrt(np.sum(adam**2, axis=axis)) / np.sqrt(np.sum(x**2, axis=axis))
                n = math.sqrt(np.sum(u**2))
                if before and n > growth * before:
                    u, n = u / n * growth * before, growth * before
                before = n
                p -= lr * scale * (u.T if turn else u)
        done.append(whole)
    return done


def apollo_mini(ps, gs, **options):
    return apollo(ps, gs, **{"rank": 1, "scaling": "tensor", "scale": math.sqrt(128), **options})


def split(x: Array, ps: Sequence[Array]) -> list[Array]:
    ends = np.cumsum([p.size for p in ps])
    return [part.reshape(p.shape) for part, p in zip(np.split(x, ends[:-1]), ps)]


ORACLES: dict[str, Callable[..., list[Array]]] = {
    "adafactor": adafactor,
    "came": came,
    "lamb": lamb,
    "lars": lars,
    "mars": mars,
    "stable_adamw": stable_adamw,
    "adam_mini": adam_mini,
    "prodigy": prodigy,
    "d_adapt_adam": d_adapt_adam,
    "d_adapt_sgd": d_adapt_sgd,
    "apollo": apollo,
    "apollo_mini": apollo_mini,
}

#: Rules whose oracle takes ``noise``, shaped like the gradients, too.
NOISY = ("apollo", "apollo_mini")

#: Rates that show something in 20 steps, where the test's own would not.
RATES = {"prodigy": 1.0, "d_adapt_adam": 1.0, "d_adapt_sgd": 1.0, "lars": 1.0}

CASES: list[tuple[str, dict[str, object]]] = [
    ("adafactor", {"variant": "shazeer", "most_rms": 0.5}),
    ("adafactor", {"relative_step": False, "scale_parameter": False, "eps1": 1e-2}),
    ("adafactor", {"beta2_decay": -0.5, "eps2": 0.7}),
    ("came", {"b1": 0.5, "most_rms": 0.3, "eps2": 1e-2}),
    ("lamb", {"inner_decay": 0.1, "b1": 0.8}),
    ("lamb", {"most": 1.0, "eps": 1e-2}),
    ("lars", {"inner_decay": 0.1, "nesterov": True}),
    ("lars", {"momentum": 0.0, "trust": 0.02}),
    ("mars", {"variant": "lion"}),
    ("mars", {"gamma": 0.2, "b1": 0.9}),
    ("stable_adamw", {"b2": 0.999, "eps": 0.1}),
    ("adam_mini", {"blocks": "tensor"}),
    ("prodigy", {"bias_correction": True, "safeguard_warmup": True}),
    ("prodigy", {"growth_rate": 1.1, "d_coef": 0.5, "inner_decay": 0.1, "d0": 1e-3}),
    ("prodigy", {"b1": 0.0, "b3": 0.9, "d0": 1e-4}),
    ("d_adapt_adam", {"bias_correction": True, "d0": 1e-3}),
    ("d_adapt_adam", {"growth_rate": 1.2, "inner_decay": 0.1, "d0": 1e-3}),
    ("d_adapt_sgd", {"momentum": 0.0, "inner_decay": 0.1, "d0": 1e-3}),
    ("d_adapt_sgd", {"growth_rate": 1.2, "d0": 1e-3}),
    ("apollo", {"rank": 2, "refresh": 7}),
    ("apollo", {"rank": 3, "scaling": "tensor", "growth": 5.0, "scale": 2.0}),
]


# Stages of gradients and of changes: one call. Those with a memory: a list of calls.


def centralize(p, g):
    if p.ndim < 2:
        return g
    out = g.copy()
    for m in matrices(out):
        for row in m:
            row -= row.mean()
    return out


def clip_value(p, g, most=1.0):
    return np.array([min(max(x, -most), most) for x in g.ravel()]).reshape(g.shape)


def clip_tensor(p, g, most=1.0):
    n = math.sqrt(np.sum(g**2))
    return g * most / n if n > most else g


def agc(p, g, most=0.01, eps=1e-3):
    out = g.copy()
    for w, m in zip(matrices(p), matrices(out)):
        for unit, row in zip(w, m):
            limit, n = most * max(math.sqrt(unit @ unit), eps), math.sqrt(row @ row)
            if n > limit:
                row *= limit / n
    return out


def cautious(g, d, least=1e-3):
    keep = (d * g < 0).astype(float)
    return d * keep / max(keep.mean(), least)


def clip_update_rms(d, lr, most=1.0):
    return d / max(1.0, rms(d) / lr / most)


def trust_ratio(p, d, lr, coefficient=1.0, most=math.inf):
    w, u = math.sqrt(np.sum(p**2)), math.sqrt(np.sum((d / lr) ** 2))
    return d * min(coefficient * w / u if w and u else 1.0, most)
