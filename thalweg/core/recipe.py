"""A Recipe is data: complete, printable, serialisable. It says what a run is and nothing of how it is run.

A field that is None was left to the plan, which derives it before step 1 and says why.
"""

from __future__ import annotations

import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.core.errors import RecipeError, did_you_mean
from thalweg.core.guard import Guard
from thalweg.core.initialise import Initialise
from thalweg.core.parallel import check_parallel
from thalweg.core.tree import build, check_options, merge, plain, set_path, walk
from thalweg.core.units import to_bytes


def _check(ok: bool, asked: str, numbers: str, remedy: str) -> None:
    if not ok:
        raise RecipeError(asked, numbers, remedy)


def divisors(number: int) -> list[int]:
    """All whole numbers that divide ``number``.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _that_fit(batch: int) -> str:
    """The micro-batches to choose from, for the message of an error."""
    if batch > 1_000_000:
        return "Give a number that divides train.batch."
    return f"Micro-batches that fit here: {', '.join(map(str, divisors(batch)))}."


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, and in what portions.

    Args:
        steps: optimizer updates to attempt; None: derived from ``epochs``.
        epochs: passes over the training data; used where ``steps`` is None.
        batch: samples in one step's window.
        micro_batch: samples in one forward pass; divides ``batch``. "auto": as many as fit the memory; None: the whole
            batch at once.
        clip: the largest global gradient norm; 0 switches clipping off.
        clip_history: deviations above its running mean that a norm may have, such as 2.5 (ZClip); 0 switches it off.
        last: what becomes of an epoch's last, short window: "keep" trains on it, exactly weighted; "drop" leaves it out.
    """

    steps: int | None = None
    epochs: float | None = None
    batch: int = 64
    micro_batch: int | str | None = None
    clip: float = 1.0
    clip_history: float = 0.0
    last: str = "keep"

    @property
    def unit(self) -> int:
        """Samples that every window is a multiple of, where its size is scheduled."""
        return self.micro_batch if isinstance(self.micro_batch, int) and self.micro_batch < self.batch else 1

    def __post_init__(self) -> None:
        _check(
            self.steps is None or self.steps >= 1,
            f"train.steps={self.steps} asks for no step.",
            "A run has at least 1.",
            "Give train.steps=1 or more.",
        )
        _check(
            self.epochs is None or self.epochs > 0,
            f"train.epochs={self.epochs} asks for no pass.",
            "A run covers more than 0 epochs.",
            "Give train.epochs above 0.",
        )
        _check(
            self.batch >= 1,
            f"train.batch={self.batch} holds no sample.",
            "A batch has at least 1.",
            "Give train.batch=1 or more.",
        )
        if isinstance(self.micro_batch, str):
            _check(
                self.micro_batch == "auto",
                f"train.micro_batch={self.micro_batch!r} is no number of samples.",
                f"train.batch={self.batch}.",
                f"Use 'auto' for as many as fit, or a number. {_that_fit(self.batch)}",
            )
        elif self.micro_batch is not None:
            _check(
                self.micro_batch >= 1,
                f"train.micro_batch={self.micro_batch} holds no sample.",
                f"train.batch={self.batch}.",
                _that_fit(self.batch),
            )
            _check(
                self.batch % self.micro_batch == 0,
                f"train.batch={self.batch} is not a whole number of train.micro_batch={self.micro_batch}.",
                f"{self.batch}/{self.micro_batch} = {self.batch / self.micro_batch:.2f}.",
                _that_fit(self.batch),
            )
        _check(
            self.clip >= 0,
            f"train.clip={self.clip} is negative.",
            "A gradient norm is 0 or more.",
            "Give a norm such as 1.0, or 0 to switch clipping off.",
        )
        _check(
            self.clip_history >= 0,
            f"train.clip_history={self.clip_history} is negative.",
            "It counts deviations above the mean.",
            "Give one such as 2.5, or 0 to switch it off.",
        )
        _check(
            self.last in ("keep", "drop"),
            f"train.last={self.last!r} is not known.",
            "It says what becomes of an epoch's last, short window.",
            "Use 'keep' or 'drop'.",
        )


DECAY_FORMS = ("decoupled", "coupled", "independent", "corrected", "cautious", "initial")
SLOT_FORMS = ("full", "bf16", "bf16+error", "int8")
RELEASES = ("off", "one-pass", "two-pass")
ROUNDINGS = ("nearest", "stochastic", "kahan")
WAYS = ("eager", "stacked", "compiled", "fused")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Which update rule, at what rate, decaying what.

    Args:
        rule: a registered rule, such as "adamw".
        lr: the peak learning rate; None: the rule's published default.
        weight_decay: strength of weight decay; 0 switches it off.
        decay_form: "decoupled" (weights shrink by 1 - lr*weight_decay), "coupled" (L2: weight_decay*p joins the
            gradient), "independent", "corrected", "cautious", "initial" (docs/weight-decay.md), or None: the rule's own.
        no_decay: what is not decayed: the words "bias", "norm", "1d", "embedding", "token" (positional, class and mask
            tokens), or patterns of parameter names such as "head.*".
        options: the rule's own hyper-parameters, such as ``b1``.
        otherwise, otherwise_lr: for a rule of hidden matrices: the rule that takes embeddings, the output layer and
            vectors, and its rate; None: that rule's published default.
        groups: what differs for some parameters, by pattern:
            {pattern: {rule, lr, lr_scale, weight_decay, options, fold, schedule}}.
            A pattern is of names ("blocks.*.attn.*"), or "type:Embedding", "ndim:1", "shape:10x*".
        layer_decay: factor on the rate for each layer further from the output; 1 switches it off.
        unfreeze: a length in the schedule language, such as "30%": the layers begin to train one after the other, the output
            at once and the one furthest from it after that length; until then they cost no backward pass. None: all at once.
        stages: what combines with the rule, with its options: {"cautious": {}, "clip_update_rms": {"most": 1.0}}.
        slots: how the rule's memory is kept: "full", "bf16", "bf16+error" or "int8"; None: "full", unless
            ``memory_budget`` asks for less.
        release_gradients: "one-pass": each parameter is updated in the backward pass, as soon as its gradient is there,
            and the gradient is freed (no accumulation, no clipping); "two-pass": a pass before it measures the norm,
            so that clipping works; "off"; None: "off", unless ``memory_budget`` asks for it.
        offload: whether slots lie in the CPU's memory; None: only where ``memory_budget`` asks for it.
        rounding: of bfloat16 and float16 parameters: "nearest", "stochastic", "kahan"; "auto": stochastic for bfloat16,
            Kahan for float16.
        way: how updates run: "eager", "stacked", "compiled", "fused"; None: chosen by size, device and maths.
    """

    rule: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.0
    decay_form: str | None = None
    no_decay: tuple[str, ...] = ("bias", "norm", "1d", "token")
    options: dict[str, Any] = field(default_factory=dict)
    otherwise: str = "adamw"
    otherwise_lr: float | None = None
    groups: dict[str, Any] = field(default_factory=dict)
    layer_decay: float = 1.0
    unfreeze: str | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    slots: str | None = None
    release_gradients: str | None = None
    offload: bool | None = None
    rounding: str = "auto"
    way: str | None = None

    def __post_init__(self) -> None:
        _check(
            self.lr is None or self.lr >= 0,
            f"optimizer.lr={self.lr} is negative.",
            "A learning rate is 0 or more.",
            "Give a positive rate.",
        )
        _check(
            self.weight_decay >= 0,
            f"optimizer.weight_decay={self.weight_decay} is negative.",
            "It would grow the weights.",
            "Give 0 or more.",
        )
        _check(
            self.decay_form in (None, *DECAY_FORMS),
            f"optimizer.decay_form={self.decay_form!r} is not known.",
            f"Weight decay has {len(DECAY_FORMS)} forms here.",
            f"Use one of {', '.join(DECAY_FORMS)}, or leave it out for the rule's own.",
        )
        _check(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay={self.layer_decay} is no decay.",
            "Each layer further from the output gets the rate times this.",
            "Give a value above 0 and up to 1, such as 0.75.",
        )
        for name, known in (
            ("slots", (None, *SLOT_FORMS)),
            ("release_gradients", (None, *RELEASES)),
            ("rounding", ("auto", *ROUNDINGS)),
            ("way", (None, *WAYS)),
        ):
            value = getattr(self, name)
            _check(
                value in known,
                f"optimizer.{name}={value!r} is not known.",
                f"{len(known)} are.",
                did_you_mean(str(value), [str(k) for k in known if k]),
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What changes over the run, each value in the schedule language (``thalweg.schedules``); None: it does not change.

    A schedule is a factor on the recipe's value, but for ``options`` and ``average``, whose schedules give the value itself.

    Args:
        lr: of ``optimizer.lr``.
        weight_decay: of ``optimizer.weight_decay`` and that of each group.
        clip: of ``train.clip``.
        average: the decay of the weight average, from ``regularize.average``.
        batch: of ``train.batch``; counted in steps, skipped or not, like ``sequence``.
        sequence: of the length of sequences: they are cut.
        image_size: of height and width of the images: they are made smaller; counted in steps too.
        dropout, stochastic_depth: of the rate of each layer.
        options: the rule's own, by name: {b1: "warmup(300, start=0.85)"}.
        loss: of arguments of the task's loss, by name: {label_smoothing: "linear()"}.
        penalties: of ``regularize.penalties``, by name.
    """

    lr: str = "warmup(5%) >> cosine(to=0.1)"
    weight_decay: str | None = None
    clip: str | None = None
    average: str | None = None
    batch: str | None = None
    sequence: str | None = None
    image_size: str | None = None
    dropout: str | None = None
    stochastic_depth: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    penalties: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("options", "loss", "penalties"):
            for key, text in getattr(self, name).items():
                _check(
                    isinstance(text, str),
                    f"schedule.{name}.{key}={text!r} is no schedule.",
                    f"It is a {type(text).__name__}.",
                    "Write a text in the schedule language, such as 'linear(to=0.5)'.",
                )


AVERAGES = ("ema", "swa", "window")


@dataclass(frozen=True, kw_only=True)
class Regularize:
    """What the engine itself regularizes with; what is no part of a recipe is an argument of the task's model and loss.

    Args:
        average: decay of the exponential moving average of the weights, at most; 0 switches it off. Evaluation uses the average.
        average_form: "ema"; "swa": the plain mean of the weights at every ``average_every`` from ``average_start`` on;
            "window": the mean of the last ``average_window`` of them (LAWA).
        average_start: a length in the schedule language, such as "75%", for "swa" and "window".
        average_every: likewise: "1 epochs", "50"; for "swa" and "window".
        average_window: weights in the window.
        precise: windows (whole steps) of training data from which batch normalization takes its statistics anew before
            averaged weights are evaluated; 0: the average of the running statistics.
        sharpness: distance (rho) of the neighbour at which gradients are taken: SAM, at twice the passes; 0 switches it off.
        sharpness_scaled: measure that distance in units of each weight (ASAM).
        dropout: rate of dropout that is put into the model; 0: none is.
        dropout_at: where: "residual", behind each residual branch; "head", before the last linear layer; or patterns of
            modules' names.
        stochastic_depth: rate at which the last residual branch is left out, falling in a line towards the first; 0: never.
        stochastic_depth_mode: "row": for each sample; "batch": for a whole step.
        by_sample: masks of dropout are a function of (seed, step, sample), so that the micro-batch does not matter.
        batchnorm: "pooled"; "frozen": running statistics are used and kept.
        ghost: samples that batch normalization normalises together, whatever the micro-batch; 0: the micro-batch.
        mixup, cutmix: alpha of the Beta distribution that mixes pairs of samples; 0 switches it off.
        mix_share: share of the steps that are mixed.
        augment: transforms of the images, in order: ["crop(4)", "flip", "cutout(8)"].
        penalties: strengths of terms that join the loss, by name: {l1: 1e-5}.
    """

    average: float = 0.0
    average_form: str = "ema"
    average_start: str = "75%"
    average_every: str = "1%"
    average_window: int = 5
    precise: int = 0
    sharpness: float = 0.0
    sharpness_scaled: bool = False
    dropout: float = 0.0
    dropout_at: tuple[str, ...] = ("residual",)
    stochastic_depth: float = 0.0
    stochastic_depth_mode: str = "row"
    by_sample: bool = False
    batchnorm: str = "pooled"
    ghost: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_share: float = 1.0
    augment: tuple[str, ...] = ()
    penalties: dict[str, Any] = field(default_factory=dict)

    @property
    def averages(self) -> bool:
        """Whether there is a weight average."""
        return self.average > 0 or self.average_form != "ema"

    def __post_init__(self) -> None:
        _check(
            0 <= self.average < 1,
            f"regularize.average={self.average} is no decay.",
            "The average is average*old + (1 - average)*new.",
            "Give a value in [0, 1), such as 0.999.",
        )
        for name, known in (
            ("average_form", AVERAGES),
            ("stochastic_depth_mode", ("row", "batch")),
            ("batchnorm", ("pooled", "frozen")),
        ):
            value = getattr(self, name)
            _check(
                value in known,
                f"regularize.{name}={value!r} is not known.",
                f"{len(known)} are.",
                did_you_mean(value, known),
            )
        _check(
            self.average == 0 or self.average_form == "ema",
            f"regularize.average={self.average} and average_form='{self.average_form}' are two averages.",
            "One is kept.",
            "Give regularize.average=0 (the task's recipe may have one), or use average_form='ema'.",
        )
        for name, least in (("average_window", 1), ("precise", 0), ("ghost", 0)):
            _check(
                getattr(self, name) >= least,
                f"regularize.{name}={getattr(self, name)} is too small.",
                f"It is {least} or more.",
                f"Give {least} or more.",
            )
        for name in ("dropout", "stochastic_depth"):
            _check(
                0 <= getattr(self, name) < 1,
                f"regularize.{name}={getattr(self, name)} is no rate.",
                "A rate lies in [0, 1).",
                "Give one such as 0.1, or 0 to switch it off.",
            )
        _check(
            bool(self.dropout_at),
            "regularize.dropout_at names no place.",
            "It is an empty list.",
            "Give 'residual', 'head', or patterns of modules' names; to put none in, regularize.dropout=0.",
        )
        for name in ("mixup", "cutmix"):
            _check(
                getattr(self, name) >= 0,
                f"regularize.{name}={getattr(self, name)} is negative.",
                "It is the alpha of a Beta distribution.",
                "Give one such as 0.2, or 0 to switch it off.",
            )
        _check(
            0 <= self.mix_share <= 1,
            f"regularize.mix_share={self.mix_share} is no share.",
            "It lies in [0, 1].",
            "Give one such as 0.8.",
        )
        _check(
            self.ghost != 1 and not (self.ghost and self.batchnorm == "frozen"),
            f"regularize.ghost={self.ghost} with batchnorm='{self.batchnorm}' normalises nothing.",
            "A group has 2 or more samples, and frozen layers do not look at the batch.",
            "Give 2 or more, such as 32, and batchnorm='pooled'.",
        )
        _check(
            self.sharpness >= 0,
            f"regularize.sharpness={self.sharpness} is negative.",
            "It is a distance.",
            "Give one such as 0.05, or 0 to switch it off.",
        )
        _check(
            not self.sharpness_scaled or self.sharpness > 0,
            "regularize.sharpness_scaled=true has no distance to scale.",
            "regularize.sharpness=0.",
            "Give regularize.sharpness too, such as 0.5.",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """How samples reach the step.

    Args:
        workers: processes that read a ``Dataset``; 0 reads in this one. In-memory data needs none.
        timeout: seconds after which a worker that is waited for counts as hung; it is ended and started again once. 0: never.
        bucket: windows whose samples are sorted by their length together, so that little is padded; 0: none are sorted.
        folder: where the files lie that a task reads and that no package holds; None: the environment variable THALWEG_DATA.
        options: arguments for the task's data function.
    """

    workers: int = 0
    timeout: float = 600.0
    bucket: int = 0
    folder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(
            0 <= self.timeout < math.inf,
            f"data.timeout={self.timeout} is no number of seconds.",
            "It is how long a worker may take over one micro-batch.",
            "Give 600, or more for slow data; 0 waits for ever.",
        )
        _check(
            self.bucket >= 0,
            f"data.bucket={self.bucket} is negative.",
            "It counts windows that are sorted together.",
            "Give such as 50, or 0 to sort none.",
        )
        _check(
            self.workers >= 0,
            f"data.workers={self.workers} is negative.",
            "It counts processes.",
            "Give 0 to read in this process, or more.",
        )
        _check(self.folder != "", "data.folder='' names no folder.", "It is empty.", "Name one, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When and by what a run is judged.

    Args:
        every: steps between evaluations; None: ten times a run. 0: at the end alone.
        batch: samples in one evaluation batch; None: the micro-batch.
        best: the metric that chooses the best checkpoint.
        goal: "min" or "max"; None: by the metric's name.
        patience: evaluations in a row without a better ``best`` after which the run stops, and its best weights are
            taken; 0: it goes to its end.
        min_delta: better means: by more than this.
        target: the value of ``best`` at whose first evaluation the run ends; None: it goes to its end.
    """

    every: int | None = None
    batch: int | None = None
    best: str = "loss"
    goal: str | None = None
    patience: int = 0
    min_delta: float = 0.0
    target: float | None = None

    def __post_init__(self) -> None:
        _check(
            self.every is None or self.every >= 0,
            f"evaluate.every={self.every} is negative.",
            "It counts steps.",
            "Give a number of steps, or 0 to evaluate at the end alone.",
        )
        _check(
            self.batch is None or self.batch >= 1,
            f"evaluate.batch={self.batch} holds no sample.",
            "A batch has at least 1.",
            "Give 1 or more.",
        )
        _check(
            self.goal in (None, "min", "max"),
            f"evaluate.goal={self.goal!r} is not known.",
            "A metric is better when it is smaller or larger.",
            "Use 'min' or 'max'.",
        )
        for name in ("patience", "min_delta"):
            _check(
                getattr(self, name) >= 0,
                f"evaluate.{name}={getattr(self, name)} is negative.",
                "It is 0 or more.",
                "Give 0 to switch it off, or more.",
            )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, and what to keep.

    Args:
        every: steps between checkpoints; None: derived. 0: at the end and on interruption alone.
        keep_last: newest checkpoints kept; at least 1.
        keep_best: checkpoints kept for the best values of ``evaluate.best``.
        keep_every: checkpoints at multiples of this step are kept for good; 0: none.
        store: where they go: "" for the run folder, a path, or an address such as "s3://bucket/runs/digits".
        failures: saves in a row that may fail; until then the run goes on in memory.
        grace: seconds that a run which was asked to end by a signal has for the step under way, and that its end waits for
            a save that fails, before it gives up.
    """

    every: int | None = None
    keep_last: int = 2
    keep_best: int = 1
    keep_every: int = 0
    store: str = ""
    failures: int = 10
    grace: float = 25.0

    def __post_init__(self) -> None:
        for name in ("every", "keep_best", "keep_every", "failures", "grace"):
            value = getattr(self, name)
            _check(
                value is None or value >= 0,
                f"checkpoint.{name}={value} is negative.",
                "It is a number of seconds." if name == "grace" else "It is a count.",
                "Give 0 or more.",
            )
        _check(
            self.keep_last >= 1,
            f"checkpoint.keep_last={self.keep_last} keeps nothing to resume from.",
            "At least 1 is kept.",
            "Give 1 or more.",
        )


PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "bf16-pure", "fp8")
RECOMPUTED = ("none", "blocks", "ops", "compiled")
COMPILED = ("auto", "off", "model", "blocks", "step", "captured", "best")
_SWITCHED = {"true": "best", "false": "off"}  # of ``compile``, which may be given as a switch
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
#: The words that a value of the recipe's own may be.
_WORDS: dict[str, tuple[str, ...]] = {
    "precision": ("auto", *PRECISIONS),
    "recompute": RECOMPUTED,
    "compile": COMPILED,
    "memory_format": MEMORY_FORMATS,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is. Two runs with one recipe, seed and device kind are the same run.

    Args:
        seed: names every random stream of the run.
        device: "auto", or a device that torch knows: "cpu", "cuda", "cuda:1", "mps", "xpu", "tpu", or one that registered
            itself (docs/devices.md).
        precision: "fp32"; "tf32", "bf16", "fp16", "fp8": matrix products and convolutions in it, over float32 weights;
            "bf16-pure": weights and gradients in it too; "auto": what is faster here, measured (docs/precision.md).
        islands: what computes in float32 whatever the precision: "norm", "softmax", "logits", or patterns of modules'
            names; None: what the precision needs.
        memory_budget: bytes that training may take, such as "12GiB"; what is left open of recomputation, slots, release
            of gradients and offload is chosen to fit it, by measured price (docs/memory.md).
        recompute: which activations are not kept but computed again in the backward pass: "none"; "blocks": those
            inside the model's repeated blocks; "ops": all but the products of matrices; "compiled": what torch.compile's
            activation memory budget leaves out; None: "none", unless ``memory_budget`` asks for more.
        compile: what torch.compile is given: "off"; "model": the model alone; "blocks": its repeated blocks, one graph for
            all of a kind; "step": forward and backward pass, clipping and update as one graph; "captured": the same, and its
            launches recorded once and played again, where the device can; "auto": what ends the run first, estimated or
            measured; "best" or true: the first of "step", "model" and "blocks" that works, however short the run; false:
            "off" (docs/compile.md).
        steps_per_call: steps that are taken by one call of a graph (compile="step"), nothing else being due between them; "auto":
            as many as take 20 ms, at most 64. It changes no result.
        memory_format: how the kernels of two-dimensional convolutions lie, and with them what flows through the model:
            "contiguous", "channels_last"; "auto": what is faster here, on the CPU measured (docs/on-a-cpu.md).
        threads: that torch computes with on the CPU; None: as OMP_NUM_THREADS or torch.set_num_threads say, else what is
            fastest, measured. Sums are cut by threads, so that another number gives other bits.
        weights: what a new run begins with: a run folder, a checkpoint, a file of torch, safetensors or Lightning, a
            Hugging Face folder; None: what the model is made with. A resumed run does not read it again.
        weights_rename: ``OLD=NEW`` names of modules or tensors in it; the first that fits a name changes it.
        exact_reduce: gradients, losses and statistics are added up in the order of micro-batches, so that any number of ranks
            gives the same bits (docs/ranks.md); it costs a second buffer for gradients, and more to send.
        parallel: how ranks share the model: "ddp", "fsdp", "hsdp", or sizes: {data=4, tensor=2}, {data=2, shard=4};
            "auto": the simplest that fits the device's memory. It changes no result (docs/parallel.md).
        tensor_plan: how layers are cut by ``parallel.tensor``, by pattern of their names: {"blocks.*.up": "colwise",
            "blocks.*.down": "rowwise"}; empty: the model's own ``tp_plan``.
        model, loss: arguments for the task's model and loss functions, by name.

    >>> Recipe().override({"optimizer.lr": "3e-4"}).optimizer.lr
    0.0003
    """

    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    islands: tuple[str, ...] | None = None
    memory_budget: str | None = None
    recompute: str | None = None
    compile: str = "auto"
    steps_per_call: int | str = "auto"
    memory_format: str = "auto"
    threads: int | None = None
    weights: str | None = None
    weights_rename: tuple[str, ...] = ()
    exact_reduce: bool = False
    parallel: str | dict[str, Any] = "auto"
    tensor_plan: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    regularize: Regularize = field(default_factory=Regularize)
    initialise: Initialise = field(default_factory=Initialise)
    data: Data = field(default_factory=Data)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        for path, table in (
            ("model", self.model),
            ("loss", self.loss),
            ("data.options", self.data.options),
            ("tensor_plan", self.tensor_plan),
            ("optimizer.options", self.optimizer.options),
            ("optimizer.groups", self.optimizer.groups),
            ("optimizer.stages", self.optimizer.stages),
            ("regularize.penalties", self.regularize.penalties),
        ):
            check_options(path, table)
        _check(
            -(2**63) <= self.seed < 2**63,
            f"seed={self.seed} does not fit.",
            "A seed is a whole number of 64 bits, with sign.",
            "Give one from -2**63 to 2**63 - 1, such as 0.",
        )
        object.__setattr__(self, "compile", _SWITCHED.get(str(self.compile).lower(), self.compile))
        for name, known in _WORDS.items():
            value = getattr(self, name)
            _check(
                value in known or (name == "recompute" and value is None),
                f"{name}={value!r} is not known.",
                f"{len(known)} are{', and true and false' if name == 'compile' else ''}.",
                did_you_mean(str(value), known),
            )
        _check(
            self.steps_per_call == "auto" or (type(self.steps_per_call) is int and 1 <= self.steps_per_call <= 64),
            f"steps_per_call={self.steps_per_call!r} is no number of steps.",
            "The records of 64 steps are kept on the device.",
            "Give 'auto' or a number from 1 to 64.",
        )
        _check(
            self.threads is None or 1 <= self.threads <= 1024,
            f"threads={self.threads} is no number of threads to compute with.",
            "It counts threads of the CPU, from 1 to 1024.",
            "Give as many as there are cores or fewer, or leave it out: what is fastest is measured.",
        )
        if self.memory_budget is not None:
            to_bytes(self.memory_budget, "memory_budget")
        for text in self.weights_rename:
            _check(
                "=" in text, f"weights_rename={text!r} renames nothing.", "It is OLD=NEW.", "Give such as 'model=net'."
            )
        _check(
            self.weights is not None or not self.weights_rename,
            "weights_rename is given without weights.",
            f"It is {', '.join(self.weights_rename)}.",
            "Give weights too.",
        )
        check_parallel(self.parallel)
        _check(self.weights != "", "weights='' names no file.", "It is empty.", "Name one, or leave it out.")

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A recipe with values replaced by path.

        Args:
            changes: dotted path to value; a text is read as the field's type, as on the command line.

        Raises:
            RecipeError: for an unknown path or a value of the wrong kind.
        """
        tree = self.to_dict()
        for path, value in changes.items():
            set_path(Recipe, tree, path, value)
        return Recipe.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data; fields left to the plan are left out."""
        return typing.cast(dict[str, Any], plain(self))

    def flat(self) -> dict[str, Any]:
        """Dotted path to value, for comparing and printing."""
        return dict(walk(self.to_dict(), ""))

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Recipe:
        switched = {**tree, "compile": str(tree["compile"])} if isinstance(tree.get("compile"), bool) else tree
        for name in _WORDS:
            if not isinstance(switched.get(name, ""), str):
                cls(**{name: switched[name]})  # names the words that are known
        return typing.cast(Recipe, build(cls, switched, ""))

    @classmethod
    def from_toml(cls, text: str, *, base: Recipe | None = None, name: str = "the recipe") -> Recipe:
        """Read TOML text; what it leaves out is taken from ``base``."""
        try:
            tree = tomllib.loads(text)
        except (ValueError, RecursionError) as err:
            raise RecipeError(f"{name} is not TOML.", f"{err}.", "See docs/recipes.md for an example.") from None
        start = (base or Recipe()).to_dict()
        merge(cls, start, tree, "")
        return cls.from_dict(start)

    @classmethod
    def from_file(cls, path: str | Path, *, base: Recipe | None = None) -> Recipe:
        path = Path(path)
        if not path.is_file():
            raise RecipeError(
                f"There is no recipe file {path}.", "It was looked for in this folder.", "Check the path."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise RecipeError(f"{path} cannot be read.", f"{err}.", "Save it as TOML in UTF-8.") from None
        return cls.from_toml(text, base=base, name=str(path))

    def diff(self, other: Recipe) -> list[tuple[str, Any, Any]]:
        """(path, mine, theirs) where two recipes differ."""
        mine, theirs = self.flat(), other.flat()
        return [(k, mine.get(k), theirs.get(k)) for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
