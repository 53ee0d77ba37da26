"""Slow float64 transcriptions of the matrix rules' papers, in numpy, one matrix after another: their oracles.

Each takes parameters, one list of gradients a step and the rate, and returns the last parameters. Three dimensions are a batch
of matrices, more are flattened behind the first, as the engine does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Arrays = Sequence[np.ndarray]


def _each_matrix(step: Callable[..., list[np.ndarray]]) -> Callable[..., list[np.ndarray]]:
    """The oracle of many parameters of any shape, from ``step(w, list of g, lr=, **options)`` of one matrix."""

    def oracle(
        ps: Arrays, gs: Sequence[Arrays], *, lr: float, noise: Sequence[Arrays] | None = None, **options: Any
    ) -> list[np.ndarray]:
        results = []
        for i, p in enumerate(ps):
            shape = p.shape if p.ndim == 3 else (1, p.shape[0], math.prod(p.shape[1:]))
            series = [g[i].reshape(shape) for g in gs]
            drawn = None if noise is None else [x[i].reshape(shape) for x in noise]
            out = np.empty(shape)
            for k in range(shape[0]):
                more = options if drawn is None else {**options, "noise": [x[k] for x in drawn]}
                out[k] = step(p.reshape(shape)[k].copy(), [g[k] for g in series], lr=lr, **more)
            results.append(out.reshape(p.shape))
        return results

    return oracle


def _polynomials(name: str) -> list[tuple[float, float, float]]:
    if name == "newton-schulz":
        return [(3.4445, -4.7750, 2.0315)] * 30
    table = """8.28721201814563 -23.595886519098837 17.300387312530933
    4.107059111542203 -2.9478499167379106 0.5448431082926601
    3.9486908534822946 -2.908902115962949 0.5518191394370137
    3.3184196573706015 -2.488488024314874 0.51004894012372
    2.300652019954817 -1.6689039845747493 0.4188073119525673
    1.891301407787398 -1.2679958271945868 0.37680408948524835
    1.8750014808534479 -1.2500016453999487 0.3750001645474248"""
    rows = [[float(x) for x in line.split()] for line in table.splitlines()]
    return [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in rows] + [(1.875, -1.25, 0.375)] * 30


def _orthogonal(u: np.ndarray, steps: int, coefficients: str) -> np.ndarray:
    """On the singular values, one by one: the matrix form is the rule's own business."""
    if not u.any():
        return u
    left, values, right = np.linalg.svd(u, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    if coefficients == "polar-express":
        values = values / 1.01
    for a, b, c in _polynomials(coefficients)[:steps]:
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def _muon(
    w: np.ndarray,
    gs: Arrays,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: str = "newton-schulz",
    scale: str = "original",
    heads: int = 0,
    normalize: bool = False,
    b2: float = 0.95,
    gram: str = "auto",
) -> np.ndarray:
    m = np.zeros_like(w)
    blocks = [slice(k * len(w) // heads, (k + 1) * len(w) // heads) for k in range(heads)] or [slice(None)]
    v = np.zeros(len(w))
    for g in gs:
        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g if nesterov else m
        for block in blocks:
            o = _orthogonal(u[block], steps, coefficients)
            rows, columns = o.shape
            if normalize:
                v[block] = b2 * v[block] + (1 - b2) * (o**2).mean(1)
                n = o / (np.sqrt(v[block]) + 1e-10)[:, None]
                o = n * (np.linalg.norm(o) / (np.linalg.norm(n) + 1e-10))
            factor = {
                "original": max(1, rows / columns) ** 0.5,
                "spectral": (rows / columns) ** 0.5,
                "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
                "none": 1.0,
            }[scale]
            w[block] = w[block] - lr * factor * o
    return w


def _soap(
    w: np.ndarray,
    gs: Arrays,
    *,
    lr: float,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    frequency: int = 10,
    max_dim: int = 10000,
) -> np.ndarray:
    """Algorithm 3 of arXiv:2409.11321 with the reference's order; m is in the parameter's basis here."""
    rows, columns = w.shape
    grams = [np.zeros((rows, rows)), np.zeros((columns, columns))]
    bases = [np.eye(rows), np.eye(columns)]
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gs):
        if t > 0:
            m = b1 * m + (1 - b1) * g
            h = bases[0].T @ g @ bases[1]
            v = b2 * v + (1 - b2) * h**2
            n = (bases[0].T @ m @ bases[1]) / (np.sqrt(v) + eps)
            w = w - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * bases[0] @ n @ bases[1].T
        grams = [b2 * a + (1 - b2) * b for a, b in zip(grams, (g @ g.T, g.T @ g))]
        for axis in (0, 1):
            if w.shape[axis] > max_dim or t % frequency:
                continue
            if t == 0:
                bases[axis] = np.linalg.eigh(grams[axis])[1][:, ::-1]
                continue
            guess = np.diag(bases[axis].T @ grams[axis] @ bases[axis])
            order = np.argsort(-guess)
            v = np.take(v, order, axis)
            bases[axis] = np.linalg.qr(grams[axis] @ bases[axis][:, order])[0]
    return w


def _power(gram: np.ndarray, eps: float, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(gram)
    return vectors @ np.diag((np.maximum(values, 0) + eps) ** -power) @ vectors.T


def _shampoo(
    w: np.ndarray,
    gs: Arrays,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-12,
    graft: str = "adam",
    graft_eps: float = 1e-8,
    exponent: float = 0.0,
    frequency: int = 10,
    max_dim: int = 8192,
    variant: str = "mean",
) -> np.ndarray:
    rows, columns = w.shape
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    m, v = np.zeros_like(w), np.zeros_like(w)
    roots = [np.eye(rows), np.eye(columns)]
    for t, g in enumerate(gs, start=1):
        if variant == "sum":
            left, right, correct = left + g @ g.T, right + g.T @ g, 1.0
        else:
            left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
            correct = 1 - b2**t
        if (t - 1) % frequency == 0:
            kept = [size <= max_dim for size in w.shape]
            power = exponent or 1 / (2 * max(sum(kept), 1))
            for axis, gram in enumerate((left, right)):
                if kept[axis]:
                    roots[axis] = _power(gram / correct, eps, power)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        mean = m / (1 - b1**t)
        s = roots[0] @ mean @ roots[1]
        a = mean / (np.sqrt(v / (1 - b2**t)) + graft_eps) if graft == "adam" else mean
        if graft != "none":
            s = s * np.linalg.norm(a) / np.linalg.norm(s)
        w = w - lr * (s if frequency == 1 or t > frequency else a)
    return w


def _kl_shampoo(
    w: np.ndarray,
    gs: Arrays,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    start: float = 0.1,
    limit: float = 4000,
    frequency: int = 10,
    max_dim: int = 10000,
) -> np.ndarray:
    """The authors' code, with 1/sqrt of the values kept, as there, and m in the parameter's basis."""
    rows, columns = w.shape
    kept = [size <= max_dim for size in w.shape]
    root = [np.full(size, start**-0.5 if keep else 1.0) for size, keep in zip(w.shape, kept)]
    grams = [np.zeros((rows, rows)), np.zeros((columns, columns))]
    bases = [np.eye(rows), np.eye(columns)]
    m = np.zeros_like(w)
    for t, g in enumerate(gs):
        if t == 0:
            grams = [(1 - b2) * g @ g.T / columns, (1 - b2) * g.T @ g / rows]
            bases = [np.linalg.eigh(a)[1][:, ::-1] if keep else q for a, q, keep in zip(grams, bases, kept)]
            continue
        m = b1 * m + (1 - b1) * g
        both = np.outer(root[0], root[1])
        n = (bases[0].T @ m @ bases[1]) * both / (1 + eps * both)
        w = w - lr * bases[0] @ n @ bases[1].T
        inverse = [q @ np.diag(r**2) @ q.T for q, r in zip(bases, root)]
        grams[0] = b2 * grams[0] + (1 - b2) / columns * g @ inverse[1] @ g.T
        grams[1] = b2 * grams[1] + (1 - b2) / rows * g.T @ inverse[0] @ g
        h = bases[0].T @ g @ bases[1]
        seen = [(h**2 * root[1] ** 2).mean(1), (h**2 * root[0][:, None] ** 2).mean(0)]
        for axis in (0, 1):
            if kept[axis]:
                value = b2 * root[axis] ** -2 + (1 - b2) * seen[axis]
                root[axis] = np.minimum(value**-0.5, max(10, min(w.shape[axis], limit)))
                if t % frequency == 0:
                    bases[axis] = np.linalg.qr(grams[axis] @ bases[axis])[0]
    return w


def _spectral_bound(x: np.ndarray) -> float:
    row = x[np.argmax((x**2).sum(1))]
    y = x @ row
    return float(np.linalg.norm(x @ (y / np.linalg.norm(y))))


def _kron(
    w: np.ndarray,
    gs: Arrays,
    *,
    lr: float,
    noise: Arrays,
    b1: float = 0.9,
    precond_lr: float = 0.1,
    most_rms: float = 1.1,
    frequency: int = 1,
    max_dim: int = 8192,
) -> np.ndarray:
    """kron_torch without its balancing; diagonal factors are kept as diagonal matrices."""
    rows, columns = w.shape
    q = [np.eye(rows), np.eye(columns)]
    m = np.zeros_like(w)
    for t, (g, drawn) in enumerate(zip(gs, noise), start=1):
        m = b1 * m + (1 - b1) * g
        mean = m / (1 - b1**t)
        if (t - 1) % frequency == 0 and mean.any():
            a = q[0] @ mean @ q[1].T
            b = np.linalg.inv(q[0]).T @ drawn @ np.linalg.inv(q[1])
            terms = [(a @ a.T, b @ b.T), (a.T @ a, b.T @ b)]
            for axis, (one, two) in enumerate(terms):
                if w.shape[axis] > max_dim:
                    one, two = np.diag(np.diag(one)), np.diag(np.diag(two))
                    size = np.abs(one + two).max()
                else:
                    size = _spectral_bound(one + two)
                q[axis] = q[axis] - precond_lr * np.triu(one - two) / size @ q[axis]
        s = q[0].T @ q[0] @ mean @ q[1].T @ q[1]
        w = w - lr * s * min(1, most_rms / (np.sqrt((s**2).mean()) + 1e-8))
    return w


def _normuon(w: np.ndarray, gs: Arrays, *, lr: float, **options: Any) -> np.ndarray:
    return _muon(w, gs, lr=lr, **{"normalize": True, **options})


ORACLES = {
    "muon": _each_matrix(_muon),
    "normuon": _each_matrix(_normuon),
    "soap": _each_matrix(_soap),
    "shampoo": _each_matrix(_shampoo),
    "kl_shampoo": _each_matrix(_kl_shampoo),
    "kron": _each_matrix(_kron),  # also takes noise=, a list for each step
}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("muon", {"momentum": 0.8, "nesterov": False, "steps": 3}),
    ("muon", {"coefficients": "polar-express", "steps": 10}),
    ("muon", {"coefficients": "polar-express", "gram": "off"}),
    ("muon", {"scale": "spectral", "gram": "off"}),
    ("muon", {"scale": "match_rms_adamw"}),
    ("muon", {"scale": "none", "heads": 2}),
    ("muon", {"normalize": True, "b2": 0.8, "heads": 2}),
    ("normuon", {"nesterov": False, "scale": "none"}),
    ("soap", {"frequency": 1}),
    ("soap", {"frequency": 3, "b1": 0.9, "b2": 0.99, "eps": 1e-4}),
    ("soap", {"frequency": 4, "max_dim": 5}),
    ("shampoo", {"frequency": 1}),
    ("shampoo", {"frequency": 1, "graft": "none", "variant": "sum", "b1": 0.0, "eps": 1e-4}),
    ("shampoo", {"frequency": 3, "graft": "sgd", "b2": 0.9}),
    ("shampoo", {"frequency": 3, "graft": "none", "exponent": 0.5, "eps": 1e-3}),
    ("shampoo", {"frequency": 2, "max_dim": 5}),
    ("kl_shampoo", {"frequency": 1}),
    ("kl_shampoo", {"frequency": 3, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "start": 0.5}),
    ("kl_shampoo", {"frequency": 3, "max_dim": 5}),
    ("kl_shampoo", {"limit": 11.0, "b2": 0.5}),
    ("kron", {"frequency": 3, "precond_lr": 0.5}),
    ("kron", {"b1": 0.0, "most_rms": 0.3}),
    ("kron", {"max_dim": 5}),
    ("kron", {"max_dim": 3}),
]
