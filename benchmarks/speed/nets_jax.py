"""The nets as functions of a dict of weights, for jax.jit. Images have their channels last, as XLA's CPU kernels want them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.speed.workloads import HEADS, LAYERS, RESIDUAL, WIDTH, Workload, first_weights

Weights = dict[str, Array]
_MOVES, _EPS = 0.1, 1e-5


def weights(w: Workload) -> tuple[Weights, Weights]:
    """(what is trained, running statistics), from torch's first weights."""
    trained, running = {}, {}
    for name, value in first_weights(w).items():
        if name.endswith("num_batches_tracked"):
            continue
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        (running if "running_" in name else trained)[name] = jnp.asarray(value)
    return trained, running


class Pass:
    """One forward pass: layers by torch's names; ``running`` collects the statistics that have moved."""

    def __init__(self, p: Weights, running: Weights, dtype: Any) -> None:
        self.p, self.running, self.dtype = p, dict(running), dtype

    def dense(self, name: str, x: Array) -> Array:
        out = x.astype(self.dtype) @ self.p[name + ".weight"].astype(self.dtype).T
        bias = self.p.get(name + ".bias")
        return out if bias is None else out + bias.astype(self.dtype)

    def conv(self, name: str, x: Array, stride: int = 1) -> Array:
        """Convolution without bias, then batch normalization."""
        kernel = self.p[name + ".0.weight"]
        pad = [(kernel.shape[0] // 2,) * 2] * 2
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=layout)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        count = x.size // x.shape[-1]
        for kind, now in (("mean", mean), ("var", var * count / (count - 1))):
            key = f"{name}.1.running_{kind}"
            self.running[key] += _MOVES * (jax.lax.stop_gradient(now) - self.running[key])
        scale = self.p[name + ".1.weight"] * jax.lax.rsqrt(var + _EPS)
        return (x - mean) * scale + self.p[name + ".1.bias"]

    def norm(self, name: str, x: Array) -> Array:
        x = x.astype(jnp.float32)
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + _EPS)
        return x * self.p[name + ".weight"] + self.p[name + ".bias"]


def pooled(x: Array) -> Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def mlp(f: Pass, x: Array) -> Array:
    return f.dense("4", jax.nn.relu(f.dense("2", jax.nn.relu(f.dense("0", x)))))


def cnn(f: Pass, x: Array) -> Array:
    x = pooled(jax.nn.relu(f.conv("one", x)))
    x = pooled(jax.nn.relu(f.conv("two", x)))
    return f.dense("head", jax.nn.relu(f.conv("three", x)).mean((1, 2)))


def gpt(f: Pass, x: Array) -> Array:
    size, time = x.shape
    h = f.p["token.weight"][x] + f.p["place.weight"]
    for i in range(LAYERS):
        at = f"blocks.{i}."
        parts = f.dense(at + "qkv", f.norm(at + "norm1", h)).reshape(size, time, 3, HEADS, -1)
        q, k, v = (parts[:, :, j] for j in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(size, time, WIDTH)
        h = h + f.dense(at + "out", mixed)
        up = jax.nn.gelu(f.dense(at + "up", f.norm(at + "norm2", h)), approximate=False)
        h = h + f.dense(at + "down", up)
    return f.dense("head", f.norm("norm", h))


def resnet(f: Pass, x: Array) -> Array:
    x = jax.nn.relu(f.conv("stem", x))
    for i, (_, _, stride) in enumerate(RESIDUAL):
        at = f"blocks.{i}."
        past = f.conv(at + "past", x, stride) if stride > 1 else x
        inner = jax.nn.relu(f.conv(at + "one", x, stride))
        x = jax.nn.relu(f.conv(at + "two", inner) + past)
    return f.dense("head", x.mean((1, 2)))


NETS = {"mlp": mlp, "cnn": cnn, "gpt": gpt, "resnet": resnet}


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x
