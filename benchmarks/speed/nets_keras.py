"""The nets in Keras, by its functional API, with torch's names for layers (- for .) and torch's first weights."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.speed.workloads import CONTEXT, HEADS, LAYERS, RESIDUAL, VOCAB, WIDTH, Workload, first_weights

TORCH = keras.backend.backend() == "torch"
keras.config.set_image_data_format("channels_first" if TORCH else "channels_last")


def dense(name: str, x: Any, units: int, bias: bool = True) -> Any:
    return layers.Dense(units, use_bias=bias, name=name)(x)


def conv(name: str, x: Any, channels: int, size: int = 3, stride: int = 1) -> Any:
    """Padded as torch pads: Keras's own "same" shifts where the stride is 2."""
    if size == 3 and stride == 2:
        x = layers.ZeroPadding2D(1)(x)
    padding = "same" if stride == 1 else "valid"
    x = layers.Conv2D(channels, size, stride, padding, use_bias=False, name=name + "-0")(x)
    return layers.BatchNormalization(1 if TORCH else -1, momentum=0.9, epsilon=1e-5, name=name + "-1")(x)


def norm(name: str, x: Any) -> Any:
    return layers.LayerNormalization(epsilon=1e-5, name=name)(x)


class Places(layers.Layer):
    """A learned vector a place, added."""

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=(CONTEXT, WIDTH), name="embeddings")

    def call(self, x: Any) -> Any:
        return x + self.table


def mlp(x: Any) -> Any:
    x = ops.relu(dense("0", x, 128))
    return dense("4", ops.relu(dense("2", x, 128)), 10)


def cnn(x: Any) -> Any:
    x = layers.MaxPooling2D(2)(ops.relu(conv("one", x, 32)))
    x = layers.MaxPooling2D(2)(ops.relu(conv("two", x, 64)))
    return dense("head", layers.GlobalAveragePooling2D()(ops.relu(conv("three", x, 128))), 10)


def gpt(x: Any) -> Any:
    h = Places(name="place")(layers.Embedding(VOCAB, WIDTH, name="token")(x))
    for i in range(LAYERS):
        at = f"blocks-{i}-"
        parts = ops.reshape(
            dense(at + "qkv", norm(at + "norm1", h), 3 * WIDTH), (-1, CONTEXT, 3, HEADS, WIDTH // HEADS)
        )
        mixed = ops.dot_product_attention(parts[:, :, 0], parts[:, :, 1], parts[:, :, 2], is_causal=True)
        h = h + dense(at + "out", ops.reshape(mixed, (-1, CONTEXT, WIDTH)), WIDTH)
        up = ops.gelu(dense(at + "up", norm(at + "norm2", h), 4 * WIDTH), approximate=False)
        h = h + dense(at + "down", up, WIDTH)
    return dense("head", norm("norm", h), VOCAB, bias=False)


def resnet(x: Any) -> Any:
    x = ops.relu(conv("stem", x, 32))
    for i, (_, channels, stride) in enumerate(RESIDUAL):
        at = f"blocks-{i}-"
        past = conv(at + "past", x, channels, 1, stride) if stride > 1 else x
        x = ops.relu(conv(at + "two", ops.relu(conv(at + "one", x, channels, 3, stride)), channels) + past)
    return dense("head", layers.GlobalAveragePooling2D()(x), 10)


NETS = {"mlp": mlp, "cnn": cnn, "gpt": gpt, "resnet": resnet}
_NAMES = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}


def net(w: Workload, x: np.ndarray) -> Any:
    """The model for batches such as ``x``."""
    given = keras.Input(x.shape[1:], dtype=str(x.dtype))
    model = keras.Model(given, NETS[w.net](given))
    kept = first_weights(w)
    for variable in model.trainable_variables:
        layer, kind = variable.path.rsplit("/", 1)
        value = kept[f"{layer.replace('-', '.')}.{_NAMES[kind]}"]
        if kind == "kernel":
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        variable.assign(value)
    return model
