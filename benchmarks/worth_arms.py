"""What ``benchmarks.worth`` compares: four tasks with everything switched off, and arms that each change one thing.

Strengths are the usual ones of the papers, or the middle of their range; none was tuned on these tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from benchmarks.shared_data import fashion_mnist
from thalweg.core import Loss, Split, Task
from thalweg.recipes import digits, find_task, pycode
from thalweg.recipes.models.convnet import ConvNet
from thalweg.regularize import cross_entropy, r_drop

IMAGES, TEXT = ("digits", "fashion"), ("pycode",)
BOTH = (*IMAGES, *TEXT)
OVERFIT = "fashion_few"  # so few images that the net learns them by heart: for what is meant against that
REGULARIZED, REGULARIZED_IMAGES = (*BOTH, OVERFIT), (*IMAGES, OVERFIT)
TRAIN_IMAGES, FEW_IMAGES, TEST_IMAGES = 2_000, 500, 4_000  # of Fashion-MNIST


@dataclass(frozen=True)
class Arm:
    """One run a seed.

    Attributes:
        against: the arm that it is compared with, and whose recipe it changes; "" for the first base.
        changes: of the recipe, by path; ``by_task`` has those that differ between tasks.
        cost: what it takes beside the steps of the base; "" for the same.
    """

    name: str
    against: str
    changes: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = BOTH
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: str = ""

    def on(self, task: str) -> dict[str, Any]:
        return {**self.changes, **self.by_task.get(task, {})}


CONSTANT, LINEAR, RESIDUAL = "constant", "linear", "residual net"
_SCHEDULES = {
    "constant, no warm-up": "hold()",
    "cosine": "warmup(5%) >> cosine()",
    "1-sqrt cooldown (WSD)": "wsd()",
    "REX": "warmup(5%) >> rex()",
    "one-cycle": "one_cycle()",
    "restarts, twice": "warmup(5%) >> restarts(times=2)",
    "exponential": "warmup(5%) >> exponential()",
    "inverse square root": "warmup(5%) >> inverse_sqrt()",
}
_DECAYS = {"decoupled": 0.5, "coupled": 1e-3, "independent": 2e-3, "corrected": 0.5, "cautious": 0.5, "initial": 0.5}
_TRANSFORMS = {
    "crop": {"digits": "crop(1)", "fashion": "crop(2)", OVERFIT: "crop(2)"},
    "flip": dict.fromkeys(REGULARIZED_IMAGES, "flip()"),
    "cutout": {"digits": "cutout(2)", "fashion": "cutout(4)", OVERFIT: "cutout(4)"},
    "erase": dict.fromkeys(REGULARIZED_IMAGES, "erase()"),
    "RandAugment": dict.fromkeys(REGULARIZED_IMAGES, "randaugment(2, 5)"),
}
_SWA = {"regularize.average_form": "swa"}
_PRECISE = {"regularize.precise": 8}
_DROPOUT = {task: {"model.dropout": 0.1 if task in TEXT else 0.2} for task in REGULARIZED}
_TWICE = "2 passes a step"
_LESS = "0.81 of the data"

ARMS = (
    Arm(CONSTANT, "", {"schedule.lr": "warmup(5%) >> hold()"}, REGULARIZED),
    Arm(LINEAR, CONSTANT, {"schedule.lr": "warmup(5%) >> linear()"}, REGULARIZED),
    *(Arm(name, CONSTANT, {"schedule.lr": text}) for name, text in _SCHEDULES.items()),
    Arm("linear, no warm-up", LINEAR, {"schedule.lr": "linear()"}),
    Arm("EMA, constant rate", CONSTANT, {"regularize.average": 0.98}),
    Arm("EMA with precise statistics", "EMA, constant rate", _PRECISE, IMAGES),
    Arm("SWA, constant rate", CONSTANT, _SWA),
    Arm("SWA with precise statistics", "SWA, constant rate", _PRECISE, IMAGES),
    Arm(
        "SWA with its schedule",
        LINEAR,
        {**_SWA, "schedule.lr": "warmup(5%) >> hold(65%) >> linear(5%, to=0.5) >> hold()"},
    ),
    Arm("window average (LAWA), constant rate", CONSTANT, {"regularize.average_form": "window"}),
    Arm("EMA, linear rate", LINEAR, {"regularize.average": 0.98}),
    *(
        Arm(
            f"weight decay, {form}",
            LINEAR,
            {"optimizer.weight_decay": wd, "optimizer.decay_form": form},
            REGULARIZED if form in ("decoupled", "coupled") else BOTH,
        )
        for form, wd in _DECAYS.items()
    ),
    Arm("label smoothing", LINEAR, {"loss.label_smoothing": 0.1}, REGULARIZED),
    Arm("label smoothing, falling to 0", "label smoothing", {"schedule.loss.label_smoothing": "linear()"}),
    Arm("dropout", LINEAR, {}, REGULARIZED, _DROPOUT),
    Arm("dropout, falling to 0", "dropout", {"schedule.dropout": "linear()"}),
    Arm("dropout by sample", "dropout", {"regularize.by_sample": True}),
    Arm("R-Drop", "dropout", {"loss.alpha": 1.0}, cost=_TWICE),
    Arm("z-loss", LINEAR, {"loss.z_loss": 1e-4}),
    Arm(RESIDUAL, LINEAR, {"model.residual": True}, REGULARIZED_IMAGES),
    *(
        Arm(name, base, changes, tasks)
        for name, changes in (
            ("dropout behind residual branches", {"regularize.dropout": 0.1}),
            ("stochastic depth", {"regularize.stochastic_depth": 0.1}),
        )
        for base, tasks in ((RESIDUAL, REGULARIZED_IMAGES), (LINEAR, TEXT))
    ),
    Arm("mixup", LINEAR, {"regularize.mixup": 0.2}, REGULARIZED_IMAGES),
    Arm("cutmix", LINEAR, {"regularize.cutmix": 1.0}, REGULARIZED_IMAGES),
    *(
        Arm(
            name, LINEAR, {}, REGULARIZED_IMAGES, {task: {"regularize.augment": [text]} for task, text in texts.items()}
        )
        for name, texts in _TRANSFORMS.items()
    ),
    Arm("ghost batches", LINEAR, {"regularize.ghost": 16}, IMAGES),
    Arm("SAM", LINEAR, {"regularize.sharpness": 0.05}, REGULARIZED, cost=_TWICE),
    Arm("ASAM", LINEAR, {"regularize.sharpness": 0.5, "regularize.sharpness_scaled": True}, cost=_TWICE),
    Arm("clipping by norm", LINEAR, {"train.clip": 1.0}),
    Arm("clipping by history (ZClip)", LINEAR, {"train.clip_history": 2.5}),
    Arm("penalty l1", LINEAR, {"regularize.penalties.l1": 1e-5}),
    Arm("penalty orthogonal", LINEAR, {"regularize.penalties.orthogonal": 1e-3}),
    Arm("penalty spectral", LINEAR, {"regularize.penalties.spectral": 1e-3}),
    Arm("batch-size warm-up", LINEAR, {"schedule.batch": "warmup(50%, start=0.25)"}, cost=_LESS),
    Arm("sequence-length warm-up", LINEAR, {"schedule.sequence": "warmup(50%, start=0.25)"}, TEXT, cost=_LESS),
    Arm("b1 warm-up", LINEAR, {"schedule.options.b1": "warmup(30%, start=0.5)"}),
)
NAMED = {(arm.name, task): arm for arm in ARMS for task in arm.tasks}


def recipe_of(arm: Arm, task: str) -> dict[str, Any]:
    """Everything by which the arm's recipe differs from the task's own."""
    below = recipe_of(NAMED[arm.against, task], task) if arm.against else OFF[task]
    return {**below, **arm.on(task)}


def loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    inputs: str,
    targets: str,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float = 0.0,
    alpha: float = 0.0,
) -> Loss:
    """Cross-entropy with what the arms add to it while training: smoothing, z-loss, R-Drop of strength ``alpha``."""
    if not model.training:
        return cross_entropy(model(batch[inputs]), batch[targets])
    if alpha:
        return r_drop(lambda: model(batch[inputs]), batch[targets], alpha=alpha)
    return cross_entropy(model(batch[inputs]), batch[targets], label_smoothing=label_smoothing, z_loss=z_loss)


class Residual(nn.Module):
    """x + branch(x), the branch being one module: two convolutions with batch normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_convolution(width, width), nn.ReLU(), *_convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def _convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]


def net(width: int = 16, dropout: float = 0.0, residual: bool = False) -> nn.Module:
    """The reference net of images, or one with three residual blocks."""
    if not residual:
        return ConvNet(width=width, dropout=dropout)
    blocks = [Residual(width), nn.MaxPool2d(2), Residual(width), Residual(width)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*_convolution(1, width), nn.ReLU(), *blocks, *head)


@cache
def fashion_data(num: int = TRAIN_IMAGES) -> Split:
    """The first ``num`` images of Fashion-MNIST at 14 x 14 pixels in [0, 1]: means of 2 x 2."""

    def part(name: str, most: int) -> dict[str, Tensor]:
        images, labels = found[name]
        return {"images": avg_pool2d(images[:most] * 0.353 + 0.286, 2), "labels": labels[:most]}

    found = fashion_mnist(num)
    facts = {"source": "Fashion-MNIST, 14 x 14", "train images": num, "held-out images": TEST_IMAGES}
    return Split(train=part("train", num), test=part("test", TEST_IMAGES), facts=facts)


@cache
def digits_data() -> Split:
    """The task's images with its parts exchanged: trained on its 360, judged on its 1,437; the other way all reach 99 %."""
    own = digits.data(max_shift=0)
    facts = {"source": own.facts["source"], "train images": len(own.test["labels"])}
    return Split(train=own.test, test=own.train, facts={**facts, "held-out images": len(own.train["labels"])})


@cache
def pycode_data() -> Split:
    """The task's bytes in windows of 64; which they are is told by their hash, not by a path."""
    own = pycode.data(context=64, held_out_windows=1024)
    facts = {name: value for name, value in own.facts.items() if name != "source"}
    return Split(train=own.train, test=own.test, facts={"source": "Python's standard library", **facts})


def _task(name: str, own: str, data: Callable[[], Split], **changes: Any) -> Task:
    given = find_task(own)
    inputs, targets = ("tokens", "targets") if name in TEXT else ("images", "labels")

    def mine(
        model: nn.Module,
        batch: dict[str, Tensor],
        label_smoothing: float | Tensor = 0.0,
        z_loss: float = 0.0,
        alpha: float = 0.0,
    ) -> Loss:
        return loss(
            model, batch, inputs=inputs, targets=targets, label_smoothing=label_smoothing, z_loss=z_loss, alpha=alpha
        )

    model = changes.get("model", given.model)
    return Task(
        name=name, model=model, loss=mine, data=data, metrics=given.metrics, recipe=given.recipe, unit=given.unit
    )


TASKS = {
    "digits": lambda: _task("digits", "digits", digits_data, model=net),
    "fashion": lambda: _task("fashion", "digits", fashion_data, model=net),
    OVERFIT: lambda: _task(OVERFIT, "digits", lambda: fashion_data(FEW_IMAGES), model=net),
    "pycode": lambda: _task("pycode", "pycode", pycode_data),
}
_ALL_OFF = {
    "device": "cpu",
    "precision": "fp32",
    "train.clip": 0.0,
    "optimizer.weight_decay": 0.0,
    "regularize.average": 0.0,
    "evaluate.every": 0,
    "evaluate.best": "loss",
}
#: By task: everything of the table switched off, and the size of a run.
OFF = {
    "digits": {**_ALL_OFF, "train.epochs": 40.0, "train.batch": 64, "model.width": 16},
    "fashion": {**_ALL_OFF, "train.epochs": 8.0, "train.batch": 64, "model.width": 16, "evaluate.batch": 500},
    OVERFIT: {**_ALL_OFF, "train.epochs": 64.0, "train.batch": 64, "model.width": 16, "evaluate.batch": 500},
    "pycode": {
        **_ALL_OFF,
        "train.steps": 200,
        "train.batch": 16,
        "train.micro_batch": 16,
        "evaluate.batch": 64,
        "model.width": 64,
        "model.layers": 2,
        "model.context": 64,
        "model.dropout": 0.0,
    },
}
METRIC = {"digits": "accuracy", "fashion": "accuracy", OVERFIT: "accuracy", "pycode": "loss"}
