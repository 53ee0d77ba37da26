"""What is trained: five workloads as numbers and numpy arrays, for frameworks of any kind."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np

LR, DECAY, CLIP, SEED, NUM_BATCHES = 1e-3, 0.01, 1.0, 0, 16
VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 96, 64, 128, 4, 4
#: (channels in, channels out, stride) of each residual block.
RESIDUAL = (
    (32, 32, 1),
    (32, 32, 1),
    (32, 64, 2),
    (64, 64, 1),
    (64, 128, 2),
    (128, 128, 1),
    (128, 256, 2),
    (256, 256, 1),
)
SHAPES = {"mlp": (64,), "cnn": (1, 28, 28), "resnet": (3, 32, 32)}


@dataclass(frozen=True)
class Workload:
    """One net at one batch.

    Attributes:
        batch: samples of a micro-batch; an update takes ``accumulate`` of them.
        steps: updates that a framework is told the run will have, where it asks: compiling has to pay within them.
        seconds: of a timed window.
        check: updates of the first run, whose loss all frameworks must agree on.
    """

    name: str
    title: str
    net: str
    batch: int
    accumulate: int
    bf16: bool
    steps: int
    seconds: float
    check: int


WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "MLP 64-128-128-10, batch 64", "mlp", 64, 1, False, 200_000, 1.0, 50),
        Workload("W2", "CNN 28x28, batch 128", "cnn", 128, 1, False, 5_000, 1.5, 10),
        Workload("W3", "GPT 4x128, context 64, batch 12", "gpt", 12, 1, False, 2_000, 1.0, 20),
        Workload("W4", "the same GPT, accumulation 4, bf16", "gpt", 12, 4, True, 2_000, 1.5, 5),
        Workload("W5", "ResNet-18 at 32x32, batch 32", "resnet", 32, 1, False, 5_000, 2.0, 3),
    )
}

Batch = tuple[np.ndarray, np.ndarray]


def batches(w: Workload) -> list[Batch]:
    """Micro-batches that go round. Something can be learned: labels come from a fixed random matrix, text from a rule."""
    draw = np.random.default_rng(SEED)
    if w.net == "gpt":
        tokens = draw.integers(0, VOCAB, (NUM_BATCHES, w.batch, CONTEXT))
        return [(x, (7 * x + 3) % VOCAB) for x in tokens]
    shape = SHAPES[w.net]
    teacher = draw.standard_normal((math.prod(shape), 10), dtype=np.float32)
    inputs = draw.standard_normal((NUM_BATCHES, w.batch, *shape), dtype=np.float32)
    return [(x, (x.reshape(w.batch, -1) @ teacher).argmax(1)) for x in inputs]


def first_weights(w: Workload) -> dict[str, np.ndarray]:
    """What the torch net begins with, by torch's names; the driver has written it for those without torch."""
    with np.load(os.path.join(os.environ["SPEED_WEIGHTS"], f"{w.net}.npz")) as kept:
        return {name: kept[name] for name in kept.files}
