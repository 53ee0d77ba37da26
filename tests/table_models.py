"""The table of regularizers and schedules: what each entry changes in a recipe, and two small models to try it on.

An entry says what it needs to be the same run however a window is split, or why it cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models import IGNORED
from thalweg.core import Loss, Recipe, Split, Task
from thalweg.regularize import (
    TRANSFORMS,
    AlphaDropout,
    DropBlock,
    Dropout,
    FeatureAlphaDropout,
    SpatialDropout,
    StochasticDepth,
    cross_entropy,
    drop_connect,
    r_drop,
)

BATCH, STEPS, CLASSES, WORDS = 8, 6, 3, 11

DROPS = {
    "none": lambda: nn.Identity(),
    "plain": lambda: nn.Dropout(0.3),
    "ours": lambda: Dropout(0.3),
    "spatial": lambda: SpatialDropout(0.3),
    "block": lambda: DropBlock(0.3, 3),
    "alpha": lambda: AlphaDropout(0.2),
    "feature_alpha": lambda: FeatureAlphaDropout(0.2),
    "depth": lambda: StochasticDepth(0.4),
    "depth_batch": lambda: StochasticDepth(0.4, "batch"),
    "connect": lambda: nn.Identity(),
}


class Block(nn.Module):
    """x + branch(x); the branch ends in a module, so that layers can be put behind it."""

    def __init__(self, width: int, norm: str, drop: str) -> None:
        super().__init__()
        first = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        if drop == "connect":
            drop_connect(conv, 0.3)
        self.branch = nn.Sequential(first, nn.ReLU(), DROPS[drop](), conv)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ImageNet(nn.Module):
    """Convolutions with residual branches; ``recompute``: its blocks are run again in the backward pass."""

    def __init__(self, norm: str = "group", drop: str = "none", recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.blocks = nn.ModuleList(Block(4, norm, drop) for _ in range(2))
        self.head = nn.Linear(4, CLASSES)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x.mean((2, 3)) / 4)  # small: a gradient that overflows in fp16 is another test's


class TokenBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class TokenNet(nn.Module):
    """Words of a sequence, each told from the running sum of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.blocks = nn.ModuleList(TokenBlock(8) for _ in range(2))
        self.head = nn.Linear(8, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).cumsum(1) / 4
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _image_loss(model: nn.Module, batch: Any, label_smoothing: Any = 0.0, z_loss: Any = 0.0, agree: Any = 0.0) -> Loss:
    """Cross-entropy; ``agree``: the strength of R-Drop. ``poison`` is 0, or what makes a gradient infinite."""
    smoothing = label_smoothing if model.training else 0.0
    images, labels, poison = batch["images"], batch["labels"], 1 + batch["poison"].sum()
    if model.training and (isinstance(agree, Tensor) or agree):
        total, weight = r_drop(lambda: model(images), labels, alpha=agree, label_smoothing=smoothing)
    else:
        total, weight = cross_entropy(model(images), labels, label_smoothing=smoothing, z_loss=z_loss)
    return Loss(total * poison, weight)


def _token_loss(model: nn.Module, batch: Any, label_smoothing: Any = 0.0) -> Loss:
    smoothing = label_smoothing if model.training else 0.0
    total, weight = cross_entropy(model(batch["tokens"]), batch["targets"], label_smoothing=smoothing)
    return Loss(total * (1 + batch["poison"].sum()), weight)


def image_data(num: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (num,), generator=draw)
    images = torch.rand(num, 3, 20, 20, generator=draw) * 0.5 + labels.view(-1, 1, 1, 1) * 0.2
    return {"images": images.to(dtype), "labels": labels, "poison": torch.zeros(num, dtype=dtype)}


def token_data(num: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Ragged: each sequence has a share of targets that do not count, one sample has none that does."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (num, 17), generator=draw)
    lengths = torch.randint(1, 17, (num,), generator=draw)
    lengths[0] = 0
    targets = torch.where(torch.arange(16) < lengths[:, None], words[:, 1:], IGNORED)
    return {"tokens": words[:, :-1].contiguous(), "targets": targets, "poison": torch.zeros(num, dtype=dtype)}


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        changes: of the base recipe.
        tokens: tried on the token model.
        small: samples of the smallest micro-batch.
        split: why another split is another run; empty: it is the same.
        steps: updates of the run.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    tokens: bool = False
    small: int = 1
    split: str = ""
    steps: int = STEPS


BASE: dict[str, Any] = {
    "train.steps": STEPS,
    "train.batch": BATCH,
    "train.clip": 1.0,
    "optimizer.lr": 0.02,
    "optimizer.options.eps": 1e-3,  # Adam's first steps are lr*sign(g): where g is rounding noise, so is its sign
    "optimizer.weight_decay": 0.1,
    "schedule.lr": "warmup(2) >> cosine(to=0.1)",
    "evaluate.every": 2,
    "checkpoint.keep_last": 20,
}

#: Everything that keeps a run the same under any split, in one: samples' own masks, and groups of 2 for normalization.
WHOLE = {"model.norm": "batch", "model.drop": "plain", "regularize.ghost": 2, "regularize.by_sample": True}

KEYED = "without by_sample, masks are named by the micro-batch"
NORMAL = "without ghost, batch normalization normalises a micro-batch by itself"

REGULARIZERS: dict[str, Entry] = {
    "nothing": Entry(),
    "all in one": Entry(WHOLE, small=2),
    "plain dropout": Entry({"model.drop": "plain"}, split=KEYED),
    "our dropout, by micro-batch": Entry({"model.drop": "ours"}, split=KEYED),
    "by_sample": Entry({"model.drop": "plain", "regularize.by_sample": True}),
    **{
        f"layer: {drop}": Entry({"model.drop": drop, "regularize.by_sample": True})
        for drop in DROPS
        if drop not in ("none", "plain")
    },
    "dropout behind branches": Entry({"regularize.dropout": 0.3, "regularize.by_sample": True}),
    "dropout before the head": Entry(
        {"regularize.dropout": 0.3, "regularize.dropout_at": ["head"], "regularize.by_sample": True}
    ),
    "dropout by pattern": Entry(
        {
            "regularize.dropout": 0.3,
            "regularize.dropout_at": ["stem", "blocks.*.branch.3"],
            "regularize.by_sample": True,
        }
    ),
    "dropout added, by micro-batch": Entry({"regularize.dropout": 0.3}, split=KEYED),
    "stochastic depth by row": Entry({"regularize.stochastic_depth": 0.5, "regularize.by_sample": True}),
    "stochastic depth by batch": Entry(
        {"regularize.stochastic_depth": 0.5, "regularize.stochastic_depth_mode": "batch"}
    ),
    "batchnorm pooled": Entry({"model.norm": "batch"}, small=2, split=NORMAL),
    "batchnorm frozen": Entry({"model.norm": "batch", "regularize.batchnorm": "frozen"}),
    "ghost": Entry({"model.norm": "batch", "regularize.ghost": 2}, small=2),
    "mixup": Entry({"regularize.mixup": 0.4}),
    "cutmix": Entry({"regularize.cutmix": 1.0}),
    "both mixed, now and then": Entry({"regularize.mixup": 0.4, "regularize.cutmix": 1.0, "regularize.mix_share": 0.5}),
    **{
        f"augment: {name}": Entry({"regularize.augment": [text]})
        for name, text in {
            "flip": "flip",
            "alternating flip": "flip(alternate=1)",
            "crop": "crop(1)",
            "random_resized_crop": "random_resized_crop(0.5)",
            "cutout": "cutout(3)",
            "erase": "erase",
            "rotate": "rotate(20)",
            "shear": "shear(0.2)",
            "translate": "translate(0.2)",
            "zoom": "zoom(0.8, 1.2)",
            "brightness": "brightness(0.3)",
            "contrast": "contrast(0.3)",
            "color": "color(0.3)",
            "sharpness": "sharpness(0.3)",
            "posterize": "posterize(3)",
            "solarize": "solarize(0.5)",
            "invert": "invert",
            "autocontrast": "autocontrast",
            "equalize": "equalize",
            "randaugment": "randaugment(2, 5)",
            "trivialaugment": "trivialaugment",
        }.items()
        if name in TRANSFORMS
    },
    "penalty: l1": Entry({"regularize.penalties.l1": 0.01}),
    "penalty: orthogonal": Entry({"regularize.penalties.orthogonal": 0.01}),
    "penalty: spectral": Entry({"regularize.penalties.spectral": 0.01}),
    "label smoothing": Entry({"loss.label_smoothing": 0.1}),
    "z-loss": Entry({"loss.z_loss": 0.01}),
    "r-drop": Entry({"loss.agree": 1.0, "model.drop": "plain", "regularize.by_sample": True}),
    "ignored targets": Entry({"regularize.by_sample": True, "loss.label_smoothing": 0.1}, tokens=True),
    **{
        f"decay: {form}": Entry({"optimizer.weight_decay": 0.2, "optimizer.decay_form": form})
        for form in ("decoupled", "coupled", "independent", "corrected", "cautious", "initial")
    },
    "ema": Entry({"model.norm": "batch", "regularize.ghost": 2, "regularize.average": 0.9}, small=2),
    "swa": Entry(
        {
            "model.norm": "batch",
            "regularize.ghost": 2,
            "regularize.average_form": "swa",
            "regularize.average_start": "2",
            "regularize.average_every": "1",
        },
        small=2,
    ),
    "window": Entry(
        {
            "model.norm": "batch",
            "regularize.ghost": 2,
            "regularize.average_form": "window",
            "regularize.average_start": "2",
            "regularize.average_every": "1",
            "regularize.average_window": 2,
        },
        small=2,
    ),
    "precise": Entry(
        {"model.norm": "batch", "regularize.ghost": 2, "regularize.average": 0.9, "regularize.precise": 2}, small=2
    ),
    "sam": Entry({**WHOLE, "regularize.sharpness": 0.05}, small=2),
    "asam": Entry({"regularize.sharpness": 0.5, "regularize.sharpness_scaled": True}),
    "clip by history": Entry(  # it learns from 25 norms; at a small rate they do not fall
        {"train.clip": 0, "train.clip_history": 0.01, "optimizer.lr": 1e-3, "evaluate.every": 16}, steps=32
    ),
}

#: Every shape of a schedule, each on the rate.
SHAPE_TEXTS: dict[str, str] = {
    "warmup": "warmup(3)",
    "hold": "warmup(2) >> hold()",
    "constant": "constant(value=0.5)",
    "linear": "linear(to=0.1)",
    "cosine": "warmup(1) >> cosine()",
    "polynomial": "polynomial(to=0.1, power=2.0)",
    "exponential": "exponential(to=0.1)",
    "decay": "decay(factor=0.8)",
    "step": "step(factor=0.5, every=2)",
    "multistep": "multistep(factor=0.5, at=[2, 4])",
    "inverse_sqrt": "warmup(2) >> inverse_sqrt()",
    "power": "power(power=0.5, timescale=2.0)",
    "cooldown": "warmup(1) >> hold() >> cooldown(3)",
    "rex": "warmup(1) >> rex(to=0.1)",
    "one_cycle": "one_cycle()",
    "cyclic": "cyclic(every=4)",
    "restarts": "restarts(times=2)",
    "plateau": "warmup(1) >> plateau(patience=1, factor=0.5, min_delta=10.0)",
    "loss_plateau": "warmup(1) >> loss_plateau(patience=1, factor=0.5, min_delta=10.0)",
}
COMPOSED: dict[str, str] = {
    "wsd": "wsd(warm=1, cool=2)",
    "repeat": "repeat(linear(to=0.2), times=2)",
    "first": "first(cosine(), 6, of=12)",
    "product": "0.5 * (warmup(2) >> linear()) * cosine(to=0.5)",
    "torch": "warmup(2) >> torch.StepLR(step_size=2, gamma=0.5)",
    "units": "warmup(8 examples) >> hold(1 epochs) >> cosine()",
}

SCHEDULES: dict[str, Entry] = {
    **{f"lr: {name}": Entry({"schedule.lr": text}) for name, text in (SHAPE_TEXTS | COMPOSED).items()},
    "weight decay": Entry({"schedule.weight_decay": "linear(to=0.5)"}),
    "clip": Entry({"train.clip": 0.1, "schedule.clip": "linear(to=0.2)"}),
    "average": Entry({"regularize.average": 0.9, "schedule.average": "linear(to=0.1)"}),
    "b1 and b2": Entry({"schedule.options.b1": "linear(to=0.7)", "schedule.options.b2": "warmup(4, start=0.9)"}),
    "momentum": Entry(
        {
            "optimizer.rule": "sgd",
            "optimizer.options": {"momentum": 0.9},
            "schedule.options.momentum": "linear(to=0.5)",
        }
    ),
    "groups": Entry(
        {
            "optimizer.groups": {
                "head.*": {"schedule": {"lr": "linear(to=0.1)", "b1": "linear(to=0.5)"}},
                "blocks.*.3.weight": {"weight_decay": 0.3, "schedule": {"weight_decay": "constant() * linear(to=0.2)"}},
            }
        }
    ),
    "batch": Entry({"schedule.batch": "linear(to=1.0) * warmup(3)"}),
    "image size": Entry({"schedule.image_size": "constant(2, value=0.5) >> constant(value=1)"}),
    "sequence": Entry({"schedule.sequence": "warmup(3)", "regularize.by_sample": True}, tokens=True),
    "dropout": Entry(
        {
            "model.drop": "plain",
            "regularize.dropout": 0.2,
            "regularize.by_sample": True,
            "schedule.dropout": "linear(to=0.2)",
        }
    ),
    "stochastic depth": Entry(
        {"regularize.stochastic_depth": 0.5, "regularize.by_sample": True, "schedule.stochastic_depth": "warmup(4)"}
    ),
    "loss: label smoothing": Entry({"loss.label_smoothing": 0.2, "schedule.loss.label_smoothing": "linear()"}),
    "loss: z-loss and r-drop": Entry(
        {
            "loss.z_loss": 0.01,
            "loss.agree": 1.0,
            "model.drop": "plain",
            "regularize.by_sample": True,
            "schedule.loss.agree": "linear()",
            "schedule.loss.z_loss": "warmup(3)",
        }
    ),
    "penalties": Entry(
        {
            "regularize.penalties": {"l1": 0.01, "orthogonal": 0.01, "spectral": 0.01},
            "schedule.penalties.l1": "warmup(3)",
            "schedule.penalties.spectral": "linear()",
        }
    ),
    "early stopping": Entry({"regularize.average": 0.9, "evaluate.patience": 2, "evaluate.goal": "max"}, steps=8),
}

TABLE: dict[str, Entry] = {
    **{f"{name}": entry for name, entry in REGULARIZERS.items()},
    **{f"schedule of {name}": entry for name, entry in SCHEDULES.items()},
}


def recipe_of(entry: Entry, precision: str, micro: int, **changes: Any) -> Recipe:
    given = {**BASE, "train.steps": entry.steps, "checkpoint.every": entry.steps // 2, **entry.changes, **changes}
    if given.get("optimizer.rule") == "sgd":
        del given["optimizer.options.eps"]
    return Recipe().override({**given, "precision": precision, "train.micro_batch": micro})


def task_of(entry: Entry, dtype: torch.dtype = torch.float32) -> Task:
    """A task whose model and data are of ``dtype``; float64 is what precision fp32 leaves as it is."""
    if entry.tokens:
        model: Any = lambda: TokenNet().to(dtype)
        data, loss, unit = token_data, _token_loss, "tokens"
    else:
        model = lambda **options: ImageNet(**options).to(dtype)
        data, loss, unit = image_data, _image_loss, "samples"
    return Task(model=model, loss=loss, data=Split(train=data(24, 0, dtype), test=data(8, 1, dtype)), unit=unit)
