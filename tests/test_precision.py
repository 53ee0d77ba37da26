"""Precision: each policy against float64, islands, what is refused, and what a model is left with."""

from __future__ import annotations

import contextlib
import copy
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import thalweg
from tests.models import (
    assert_same_bits,
    batchnorm_net,
    make_step,
    mean_loss,
    mlp,
    points,
    ragged_text,
    run_steps,
    small_gpt,
    state_bits,
    text_loss,
)
from thalweg.core import DeviceError, LossError, MissingExtra, ModelError, Recipe, RecipeError, Split, ThalwegError
from thalweg.device import Device, float32_products
from thalweg.engine import TrainStep
from thalweg.engine.levers import settle_levers
from thalweg.precision import POLICIES, LossScale, Prepared, island_modules, policy_for

CPU = Device(torch.device("cpu"))
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-pure")
SHORT = {"train.steps": 3, "train.batch": 16, "schedule.lr": "constant()"}


def train(model: Any, **changes: Any) -> Any:
    data = Split(train=points(), test=points(seed=1))
    return thalweg.train(model, mean_loss, data, {**SHORT, **changes})


def refused(kind: type[ThalwegError], *words: str, model: Any = mlp, loss: Any = mean_loss, **changes: Any) -> None:
    """In thalweg.train and in TrainStep alike, with all of the words in the message."""
    data = points()
    with pytest.raises(kind) as told:
        thalweg.train(model, loss, Split(train=data), {**SHORT, **changes})
    for word in words:
        assert word in str(told.value)
    assert all((told.value.asked, told.value.numbers, told.value.remedy))
    made = model if isinstance(model, nn.Module) else model()
    with pytest.raises(kind):
        TrainStep(made, loss, {**SHORT, **changes})(data)


def patched(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """As if bf16 had been measured to be ``gain`` times as fast as fp32."""

    def race(ways: Any, run: Any, budget_s: float) -> dict[Any, float]:
        return {way: 1 / gain if way.precision == "bf16" else 1.0 for way in ways}

    monkeypatch.setattr(importlib.import_module("thalweg.engine.levers"), "race", race)


# ---------------------------------------------------------------------- against float64


def gradients(step: Any) -> dict[str, Tensor]:
    return {n: p.grad.double().clone() for n, p in step.state.model.named_parameters()}


def one_pass(precision: str, micro: int = 16) -> tuple[float, dict[str, Tensor]]:
    """(loss, summed gradients over their weight) of one window, before its update."""
    torch.manual_seed(0)
    model = small_gpt()
    if precision == "fp64":
        model, precision = model.double(), "fp32"
    changes = {"precision": precision, "train.batch": 16, "train.micro_batch": micro}
    step, feed = make_step(model, text_loss, ragged_text(), **changes)
    step._begin()
    step._accumulate(next(iter(feed.windows(0, 1))))
    mass = float(step.sum_of_weights) * step.unit * (1.0 if step.state.scale is None else float(step.state.scale.scale))
    found = gradients(step)
    return float(step.sum_of_losses / step.sum_of_weights), {n: g / mass for n, g in found.items()}


@pytest.mark.parametrize(
    ("precision", "loss_error", "gradient_error"),
    [("fp32", 1e-6, 1e-5), ("bf16", 2e-3, 0.03), ("fp16", 3e-4, 5e-3), ("bf16-pure", 5e-3, 0.06)],
)
def test_loss_and_gradients_follow_float64(precision: str, loss_error: float, gradient_error: float) -> None:
    loss, grads = one_pass("fp64")
    mine, found = one_pass(precision)
    assert mine == pytest.approx(loss, rel=loss_error)
    whole = torch.cat([g.flatten() for g in grads.values()])
    other = torch.cat([found[n].flatten() for n in grads])
    assert float((other - whole).norm() / whole.norm()) < gradient_error


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("micro", [4, 16])
def test_every_precision_learns_as_fp32_does(precision: str, micro: int) -> None:
    finals = {}
    for name in ("fp32", precision):
        torch.manual_seed(0)
        changes = {"precision": name, "train.steps": 40, "train.batch": 16, "train.micro_batch": micro}
        step, feed = make_step(small_gpt(), text_loss, ragged_text(), **changes, **{"optimizer.lr": 0.01})
        rows = run_steps(step, feed, 40)
        assert not any(row[3] for row in rows)
        finals[name] = sum(row[0] for row in rows[-8:]) / sum(row[1] for row in rows[-8:])
    assert finals["fp32"] < 2.7  # it has learned: chance is log 17 = 2.83
    assert finals[precision] == pytest.approx(finals["fp32"], rel=0.03)


def _affine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and bias as batch normalization has them here: never in half precision."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.ones(x.shape[1], dtype=wide), torch.zeros(x.shape[1], dtype=wide)


HALVES_IN = {
    "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x[:, :, None], 8).flatten(1),
    "batch_norm": lambda x: F.batch_norm(x, None, None, *_affine(x), training=True),
    "sum": lambda x: x.abs().sum(-1),
}


@pytest.mark.parametrize("name", HALVES_IN)
def test_torch_adds_up_in_float32_inside_so_that_these_are_no_islands(name: str) -> None:
    """With bfloat16 in and out, only the result is rounded: 4096 terms added up in bfloat16 would be off by percents."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, exact = HALVES_IN[name](x), HALVES_IN[name](x.double())
    assert out.dtype == torch.bfloat16
    bound = exact.abs() * 2.0**-8 + exact.abs().max() * 2.0**-16
    assert bool(((out.double() - exact).abs() <= bound).all())


# ---------------------------------------------------------------------- true float32, and TF32


class Spy(torch.autograd.Function):
    """The identity, that notes how float32 products are computed while it runs forward and backward."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Spy.seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        Spy.seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return grads[0]


@pytest.fixture
def lower_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_means_float32_in_both_passes_whatever_was_set(precision: str, lower_products: None) -> None:
    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Spy.apply(x.requires_grad_()))

    step, feed = make_step(
        nn.Sequential(Watched(6, 3)), mean_loss, points(), precision=precision, **{"train.batch": 16}
    )
    Spy.seen.clear()
    run_steps(step, feed, 1)
    assert Spy.seen == ["ieee", "ieee"]
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # what "medium" says, as before
    assert torch.get_float32_matmul_precision() == "medium"


def test_switches_are_put_back_after_an_error(lower_products: None) -> None:
    with contextlib.suppress(KeyError), float32_products("tf32", "cpu"):
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Device:
    """A CUDA device of another machine."""
    monkeypatch.setattr(Device, "capability", property(lambda self: capability))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))
    return Device(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        ("tf32", (7, 5), ("7.5", "8.0", "fp32, fp16")),
        ("bf16", (7, 5), ("7.5", "8.0", "precision='auto'")),
        ("bf16-pure", (7, 5), ("7.5", "8.0")),
        ("fp8", (8, 0), ("8.0", "8.9", "fp32, tf32, bf16, fp16, bf16-pure")),
    ],
)
def test_a_chip_that_cannot_is_refused_by_number(
    name: str, capability: tuple[int, int], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError) as told:
        policy_for(name, on_cuda(monkeypatch, capability))
    for word in (repr(name), *words):
        assert word in str(told.value)


def test_a_chip_that_can_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_cuda(monkeypatch, (9, 0))
    assert device.precisions == tuple(POLICIES)
    assert policy_for("tf32", device).products == "tf32"
    policy_module = importlib.import_module("thalweg.precision.policy")
    monkeypatch.setattr(policy_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"torchao(.|\n)*thalweg\[fp8\]"):
        policy_for("fp8", device)


@pytest.mark.skipif(CPU.tf32, reason="this CPU has TF32")
def test_on_the_cpu_what_is_not_there_is_refused() -> None:
    refused(DeviceError, "precision='tf32'", "cpu", "fp32, bf16, fp16, bf16-pure", precision="tf32")
    refused(DeviceError, "precision='fp8'", "8.9", precision="fp8")


# ---------------------------------------------------------------------- islands


class Noting(nn.Module):
    """A linear layer that notes the dtypes of its input, its product and its weight."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.inner = nn.Linear(before, after)
        self.seen: list[tuple[torch.dtype, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        self.seen.append((x.dtype, y.dtype, self.inner.weight.dtype))
        return y


def islands_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), Noting(16, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-pure"])
def test_an_island_computes_in_float32(precision: str) -> None:
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    for islands in (["logits"], ["1", "logits"]):
        step, feed = make_step(islands_net(), mean_loss, points(), precision=precision, islands=islands)
        noting = step.state.model[1]
        noting.seen.clear()
        run_steps(step, feed, 1)
        weight = half if precision == "bf16-pure" and "1" not in islands else torch.float32
        computed = torch.float32 if "1" in islands else half
        assert noting.seen == [(computed, computed, weight)]


class Functional(nn.Module):
    """Attention and a norm as functions, computed again in the backward pass; notes what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.seen: list[tuple[str, torch.dtype]] = []

    def _inner(self, x: Tensor) -> Tensor:
        x = self.up(x)
        weights = F.softmax(x @ x.T, -1)
        self.seen.append(("softmax", weights.dtype))
        normed = F.layer_norm(x, (16,))
        self.seen.append(("norm", normed.dtype))
        return (weights @ x + normed).relu()

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self._inner, x, use_reentrant=False)
        return self.head(hidden)


@pytest.mark.parametrize("word", ["softmax", "norm"])
def test_functions_are_islands_where_asked_also_when_computed_again(word: str) -> None:
    dtypes = {}
    for islands in (["logits"], ["logits", word]):
        step, feed = make_step(Functional(), mean_loss, points(), precision="bf16", islands=islands)
        step.state.model.seen.clear()
        run_steps(step, feed, 1)
        mine = [dtype for name, dtype in step.state.model.seen if name == word]
        assert len(mine) == 2  # forward, and again in the backward pass
        dtypes[len(islands)] = set(mine)
    assert dtypes[1] == {torch.bfloat16}
    assert dtypes[2] == {torch.float32}


def test_in_pure_half_precision_an_island_gives_back_what_it_was_given() -> None:
    changes = {"precision": "bf16-pure", "islands": ["softmax", "norm", "logits"]}
    step, feed = make_step(Functional(), mean_loss, points(), **changes)
    inside = []
    known = F.layer_norm

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is known:
                inside.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    step.state.model.seen.clear()
    with Watch():
        run_steps(step, feed, 1)
    assert set(inside) == {torch.float32}
    assert {dtype for _, dtype in step.state.model.seen} == {torch.bfloat16}


def test_words_find_modules_of_any_library() -> None:
    class FancyRMSNorm(nn.Module):
        pass

    model = nn.ModuleDict(
        {"a": FancyRMSNorm(), "b": nn.Sequential(nn.LayerNorm(3), nn.Softmax(-1)), "c": nn.Linear(2, 2)}
    )
    assert list(island_modules(model, ["norm"])) == ["a", "b.0"]
    assert list(island_modules(model, ["softmax"])) == ["b.1"]
    assert list(island_modules(model, ["b", "b.*"])) == ["b"]  # what lies in an island is one


def test_islands_that_match_nothing_are_refused() -> None:
    refused(RecipeError, "islands='nrom'", "Did you mean norm?", precision="bf16", islands=["nrom"])
    refused(RecipeError, "islands='softmax'", "no such module", precision="bf16", islands=["softmax"])
    refused(RecipeError, "islands='blocks.*'", precision="fp32", islands=["blocks.*"])


def test_an_island_cannot_share_a_weight_with_what_is_none() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
        model[2].weight = model[0].weight
        return model

    refused(RecipeError, "'2' shares a weight with '0'", "Name both", model=tied, precision="bf16-pure", islands=["2"])
    train(tied(), precision="bf16-pure", islands=["0", "2", "logits"])


class Nested(nn.Module):
    """Gives a tree of outputs and takes a tree of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, inputs: dict[str, Any], *, more: list[Tensor]) -> dict[str, Any]:
        self.seen += [inputs["x"].dtype, more[0].dtype]
        y = self.layer(inputs["x"] + more[0])
        return {"logits": (y, [y * 2]), "index": inputs["y"], "name": "nested"}


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_logits_come_out_in_float32_whatever_tree_they_stand_in(precision: str) -> None:
    found: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model({"x": batch["x"], "y": batch["y"]}, more=[batch["x"]])
        found.append(out)
        return F.cross_entropy(out["logits"][1][0], batch["y"])

    step, feed = make_step(Nested(), loss, points(), precision=precision)
    step.state.model.seen.clear()
    run_steps(step, feed, 1)
    out = found[-1]
    assert out["logits"][0].dtype == out["logits"][1][0].dtype == torch.float32
    assert out["index"].dtype == torch.int64 and out["name"] == "nested"
    assert set(step.state.model.seen) == {torch.bfloat16 if precision == "bf16-pure" else torch.float32}


def half_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-pure"])
def test_a_loss_in_half_precision_is_refused(precision: str) -> None:
    words = ("half precision", precision, "significant bits", "logits.float()")
    refused(LossError, *words, loss=half_loss, precision=precision, islands=[])
    result = thalweg.train(mlp, half_loss, Split(train=points()), {**SHORT, "precision": precision})
    assert next(d for d in result.plan.decisions if d.path == "islands").value == ("logits",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_islands_reach_into_a_compiled_model() -> None:
    model = torch.compile(islands_net(), backend="eager")
    noted: list[Any] = []
    model._orig_mod[1].register_forward_hook(lambda module, args, out: noted.append((args[0].dtype, out.dtype)))
    step, feed = make_step(model, mean_loss, points(), precision="bf16", islands=["1", "logits"])
    noted.clear()
    run_steps(step, feed, 1)
    assert noted == [(torch.bfloat16, torch.float32)]
    torch._dynamo.reset()


# ---------------------------------------------------------------------- weights are cast once a window


class Casts(TorchDispatchMode):
    """Counts casts of a matrix of one shape to bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.num = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_half = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        self.num += bool(to_half and tuple(args[0].shape) == self.shape)
        return func(*args, **kwargs)


def test_autocast_casts_each_weight_once_a_window_and_not_beyond() -> None:
    changes = {
        "precision": "bf16",
        "train.batch": 16,
        "train.micro_batch": 4,
        "optimizer.rule": "sgd",
        "optimizer.lr": 0.5,
    }
    torch.manual_seed(0)
    step, feed = make_step(mlp(), mean_loss, points(), **changes)
    windows = list(feed.windows(0, 3))
    with Casts((16, 6)) as casts:
        for num, window in enumerate(windows, 1):
            step.run(window)
            assert casts.num == num
    weights = [p.detach().clone() for p in step.state.model.parameters()]

    torch.manual_seed(0)
    plain = mlp()
    for window in windows:  # torch's own way: a context, and a cast, for each micro-batch
        num = sum(len(batch["x"]) for batch in window)
        plain.zero_grad()
        for batch in window:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = plain(batch["x"])
            loss = F.cross_entropy(out.float(), batch["y"]) * len(batch["x"])
            loss.backward()
        nn.utils.clip_grad_norm_(list(plain.parameters()), num)  # clip = 1 on the mean
        with torch.no_grad():
            for p in plain.parameters():
                assert p.grad is not None
                p -= 0.5 * p.grad / num
    for mine, theirs in zip(weights, plain.parameters()):
        torch.testing.assert_close(mine, theirs.detach(), rtol=2e-3, atol=1e-5)


# ---------------------------------------------------------------------- bf16-pure


class Zoo(nn.Module):
    """One of everything that mixes dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.linspace(0, 1, 8))
        self.embed = nn.Embedding(3, 8)
        self.conv, self.batch = nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.group, self.layer = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = self.group(self.batch(self.conv(x[:, None]))).transpose(1, 2)
        y = self.layer(y + self.places + self.embed(index)[:, None])
        return self.head(self.attention(y, y, y, need_weights=False)[0].mean(1))


def zoo_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["y"]), batch["y"])


@pytest.mark.parametrize(
    "changes", [{}, {"regularize.ghost": 4}, {"regularize.batchnorm": "frozen"}, {"train.micro_batch": 4}]
)
def test_bf16_pure_goes_through_every_kind_of_layer(changes: dict[str, Any]) -> None:
    steps = {}
    for precision in ("fp32", "bf16-pure"):
        torch.manual_seed(0)
        given = {"precision": precision, "train.batch": 16, "optimizer.lr": 0.01, **changes}
        step, feed = make_step(Zoo(), zoo_loss, points(), **given)
        rows = run_steps(step, feed, 15)
        steps[precision] = rows[-1][0] / rows[-1][1], step.state.model
    loss, model = steps["bf16-pure"]
    assert loss == pytest.approx(steps["fp32"][0], rel=0.05)
    dtypes = {name: x.dtype for name, x in [*model.named_parameters(), *model.named_buffers()] if x.is_floating_point()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {f"batch.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(
        model.batch.running_var, steps["fp32"][1].batch.running_var, rtol=0.1, atol=0.02
    )  # statistics as in float32


def test_gradients_of_several_micro_batches_add_up_in_float32() -> None:
    """Sixteen sums in bfloat16 lose bits; in float32 only each micro-batch's own rounding is left."""
    _, exact = one_pass("fp64", micro=1)
    _, alone = one_pass("bf16-pure", micro=16)
    _, several = one_pass("bf16-pure", micro=1)
    step, _ = make_step(
        mlp(), mean_loss, points(), precision="bf16-pure", **{"train.batch": 16, "train.micro_batch": 1}
    )
    assert {p.grad.dtype for p in step.state.model.parameters()} == {torch.float32}
    assert {p.dtype for p in step.state.model.parameters()} == {torch.bfloat16}

    def error(found: dict[str, Tensor]) -> float:
        a, b = (torch.cat([g.flatten() for g in side.values()]) for side in (found, exact))
        return float((a - b).norm() / b.norm())

    assert error(several) < 1.3 * error(alone)


def test_one_micro_batch_takes_six_bytes_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(6, 512), nn.Linear(512, 512), nn.Linear(512, 3))
    changes = {"precision": "bf16-pure", "optimizer.slots": "int8", "train.batch": 16}
    step, _ = make_step(model, mean_loss, points(), **changes)
    sizes = step.state.nbytes()
    num = sum(p.numel() for p in model.parameters())
    assert (sizes["parameters"] + sizes["gradients"] + sizes["slots"]) / num < 6.2


@pytest.mark.parametrize("rounding", ["auto", "kahan"])
def test_bf16_pure_moves_by_less_than_a_bit(rounding: str) -> None:
    """Updates of a hundredth of half a unit in the last place: to nearest, no weight would ever move."""
    model = nn.Linear(6, 3)
    nn.init.constant_(model.weight, 1.0)
    changes = {
        "precision": "bf16-pure",
        "optimizer.rounding": rounding,
        "optimizer.rule": "adamw",
        "optimizer.lr": 4e-5,
    }
    step, feed = make_step(model, mean_loss, points(), **changes, **{"train.steps": 200, "train.batch": 64})
    run_steps(step, feed, 200)
    assert 0 < float((model.weight.detach().float() - 1).abs().mean()) < 0.02


def test_bf16_pure_resumes_to_the_bit_and_keeps_float32_averages(tmp_path: Path) -> None:
    changes = {
        "precision": "bf16-pure", "train.steps": 8, "train.batch": 16, "train.micro_batch": 8,
        "regularize.average": 0.9, "checkpoint.every": 4, "checkpoint.keep_last": 9, "optimizer.slots": "int8",
    }  # fmt: skip

    def run(folder: Path, resume: Any = False) -> Any:
        torch.manual_seed(0)
        data = Split(train=points(), test=points(seed=1))
        return thalweg.train(batchnorm_net(0.1), mean_loss, data, changes, folder=folder, resume=resume)

    whole = run(tmp_path / "a")
    run(tmp_path / "b")
    again = run(tmp_path / "b", resume=4)
    assert_same_bits(whole.model.state_dict(), again.model.state_dict())
    assert whole.metrics == again.metrics
    step, feed = make_step(batchnorm_net(), mean_loss, points(), **changes)
    run_steps(step, feed, 2)
    assert {
        x.dtype for name, x in state_bits(step).items() if name.startswith("average/") and "tracked" not in name
    } >= {torch.float32}
    assert {average.dtype for average, _ in step.state.averages()} == {torch.float32}
    settled = whole.plan.recipe
    assert Recipe.from_toml(settled.to_toml()) == settled
    assert settled.islands == ("logits",)


def test_a_model_in_bfloat16_is_taken_as_it_is() -> None:
    for precision in ("auto", "bf16-pure"):
        result = train(lambda: batchnorm_net().bfloat16(), precision=precision)
        assert result.plan.recipe.precision == "bf16-pure"
        assert result.model[0].weight.dtype == torch.bfloat16 and result.model[1].running_var.dtype == torch.float32
        assert result.metrics["loss"] > 0
    model = lambda: mlp().bfloat16()
    for precision in ("fp32", "fp16"):
        words = (f"precision='{precision}'", "4 of 4 are bfloat16, such as '0.weight'", "bf16-pure", "model.float()")
        refused(ModelError, *words, model=model, precision=precision)


def test_frozen_parts_may_be_in_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, 2.0)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(6, 6).bfloat16().requires_grad_(False)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.base(x.bfloat16()).float())

    for precision in ("fp32", "auto", "bf16"):
        result = train(Adapted, precision=precision)
        assert result.model.base.weight.dtype == torch.bfloat16 and result.model.head.weight.dtype == torch.float32


def test_a_model_that_mixes_dtypes_itself_is_refused_with_the_remedy() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.ones(6))

    model = Stubborn()
    refused(ModelError, "precision='bf16-pure'", "islands", model=model, precision="bf16-pure")
    assert model.layer.weight.dtype == torch.float32  # it is as it was
    assert not model._forward_pre_hooks and not model._forward_hooks


# ---------------------------------------------------------------------- fp16


def test_float16_weights_need_masters_or_kahan() -> None:
    model = lambda: mlp().half()
    for changes in ({"precision": "fp16"}, {"precision": "auto"}, {"precision": "fp32", "optimizer.rounding": "kahan"}):
        refused(ModelError, "float16", "4 of 4", "model.float()", "kahan", model=model, **changes)


def test_float16_weights_train_with_kahan() -> None:
    finals = {}
    for half in (False, True):
        torch.manual_seed(0)
        model = small_gpt().half() if half else small_gpt()
        changes = {"precision": "fp16", "optimizer.rounding": "kahan", "optimizer.lr": 0.01, "train.batch": 16}
        step, feed = make_step(model, text_loss, ragged_text(), **changes)
        rows = run_steps(step, feed, 20)
        assert model.head.weight.dtype == (torch.float16 if half else torch.float32)
        finals[half] = sum(row[0] for row in rows[-8:]) / sum(row[1] for row in rows[-8:])
    assert finals[True] == pytest.approx(finals[False], rel=0.03)


def test_the_loss_scale_stays_within_bounds() -> None:
    scale = LossScale.start(CPU)
    scale.interval = 1
    for _ in range(300):
        scale.update(torch.zeros(()))
    assert float(scale.scale) == 2.0**60
    for _ in range(300):
        scale.update(torch.ones(()))
    assert float(scale.scale) == 2.0**-24


# ---------------------------------------------------------------------- fp8, emulated here


def wide_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)
    )


def test_fp8_takes_layers_that_fit_and_leaves_no_trace() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model, plain = wide_net(), wide_net()
    kinds, names, held = [type(m) for m in model], list(model.state_dict()), list(model.parameters())
    prepared = Prepared(model, POLICIES["fp8"], CPU, ("4", "logits"), emulate=True)
    eight = [i for i, (m, kind) in enumerate(zip(model, kinds)) if type(m) is not kind]
    assert eight == [2]  # 0: 6 is no multiple of 16; 4: an island; 6: the output
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(held, model.parameters()))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(64, 6)
    with POLICIES["fp8"].context(CPU):
        out = model(x)
    out.square().mean().backward()
    assert out.dtype == torch.float32 and all(p.grad is not None for p in held)
    out, exact = out.detach(), plain(x).detach()
    error = float((out - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.1  # it rounds to 8 bits, and no more
    prepared.undo()
    assert [type(m) for m in model] == kinds
    assert torch.equal(model(x), exact)


def test_fp8_learns() -> None:
    pytest.importorskip("torchao")
    finals = []
    for eight in (False, True):
        torch.manual_seed(0)
        model = wide_net()
        prepared = Prepared(model, POLICIES["fp8"], CPU, (), emulate=True) if eight else None
        step, feed = make_step(
            model, mean_loss, points(), precision="bf16", **{"train.batch": 64, "optimizer.lr": 0.01}
        )
        rows = run_steps(step, feed, 20)
        finals.append(rows[-1][0] / rows[-1][1])
        if prepared is not None:
            prepared.undo()
    assert finals[1] == pytest.approx(finals[0], rel=0.1)
    assert finals[1] < 1.0  # chance is log 3 = 1.1


def test_fp8_without_a_layer_that_fits_is_refused() -> None:
    with pytest.raises(ModelError, match="multiples of 16"):
        Prepared(mlp(), POLICIES["fp8"], CPU, ("logits",), emulate=True)


# ---------------------------------------------------------------------- auto


@pytest.mark.parametrize(("gain", "chosen"), [(0.7, "fp32"), (1.09, "fp32"), (1.1, "bf16"), (3.0, "bf16")])
def test_auto_takes_what_is_worth_it_and_says_both_numbers(
    gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, gain)
    result = train(mlp, precision="auto")
    told = next(d for d in result.plan.decisions if d.path == "precision")
    assert result.plan.recipe.precision == told.value == chosen
    assert f"bf16 on 1 thread {1e3 / gain:.3g}" in told.reason and "fp32 on 1 thread 1e+03" in told.reason


def test_auto_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = batchnorm_net(0.3)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    asked, take = Recipe(device="cpu"), lambda path, value, why: value
    assert settle_levers(asked, model, mean_loss, points(16), CPU, take, steps=9).precision in ("fp32", "bf16")
    module = importlib.import_module("thalweg.engine.precision")  # as on an accelerator
    assert module._measured(model, mean_loss, points(16), CPU, 0, take) in ("fp32", "bf16")
    assert_same_bits(before, model.state_dict())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.rand(4), expected)
    assert not torch.is_autocast_enabled("cpu")


def test_auto_and_by_name_are_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, 2.0)
    torch.manual_seed(0)
    weights = mlp().state_dict()

    def model() -> nn.Module:
        made = mlp()
        made.load_state_dict(weights)
        return made

    measured, named = train(model(), precision="auto"), train(model(), precision="bf16")
    assert_same_bits(measured.model.state_dict(), named.model.state_dict())


# ---------------------------------------------------------------------- what a model is left with


@pytest.mark.parametrize("precision", PRECISIONS)
def test_after_a_run_the_model_is_plain(precision: str) -> None:
    model = islands_net()
    islands = ["1", "logits"] if precision != "fp32" else []
    train(model, precision=precision, islands=islands)
    for module in model.modules():
        assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def test_a_run_that_fails_leaves_a_plain_model() -> None:
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise ValueError("broken")
        return mean_loss(model, batch)

    model = islands_net()
    with pytest.raises(ValueError, match="broken"):
        thalweg.train(model, loss, Split(train=points()), {**SHORT, "precision": "bf16", "islands": ["1", "logits"]})
    assert "forward" not in model[1].__dict__ and not model._forward_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_prepared_model_can_be_copied(copied: Any) -> None:
    model = islands_net()
    prepared = Prepared(model, POLICIES["bf16-pure"], CPU, ("1", "logits"))
    other = copied(model)
    nn.init.zeros_(model[1].inner.weight)
    nn.init.zeros_(model[1].inner.bias)
    x = points()["x"]
    assert other(x).dtype == torch.float32
    assert not torch.equal(other(x), model(x))  # the copy's island is its own
    prepared.undo()


def test_the_step_of_ones_own_loop_evaluates_and_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = batchnorm_net()
    step = TrainStep(model, mean_loss, {"precision": "bf16-pure", "regularize.average": 0.9, **SHORT})
    losses = [float(step(points()).loss) for _ in range(30)]
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad(), step.averaged():
        assert model(points()["x"]).dtype == torch.float32
    model.train()
    torch.manual_seed(0)
    other = TrainStep(batchnorm_net(), mean_loss, {"precision": "bf16-pure", "regularize.average": 0.9, **SHORT})
    other.load(step.snapshot(), points())
    assert float(step(points()).loss) == float(other(points()).loss)
    assert_same_bits(model.state_dict(), other.model.state_dict())


# ---------------------------------------------------------------------- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.gpu
@gpu
def test_tf32_rounds_and_fp32_does_not() -> None:
    device = Device(torch.device("cuda", 0))
    if not device.tf32:
        pytest.skip("this GPU has no TF32")
    a = torch.randn(256, 256, device="cuda")
    exact = (a.double() @ a.double()).float()
    errors = {}
    for name in ("fp32", "tf32"):
        with policy_for(name, device).context(device):
            errors[name] = float((a @ a - exact).abs().max())
    assert errors["fp32"] < 1e-3 < errors["tf32"]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16", "bf16-pure", "fp8"])
def test_every_precision_of_the_gpu_learns(precision: str) -> None:
    device = Device(torch.device("cuda", 0))
    if precision not in device.precisions:
        pytest.skip(f"this GPU has no {precision}")
    if precision == "fp8":
        pytest.importorskip("torchao")
    finals = {}
    for name in ("fp32", precision):
        torch.manual_seed(0)
        changes = {"precision": name, "device": "cuda", "train.batch": 64, "optimizer.lr": 0.01}
        step, feed = make_step(wide_net(), mean_loss, points(), **changes)
        rows = run_steps(step, feed, 20)
        finals[name] = rows[-1][0] / rows[-1][1]
    assert finals[precision] == pytest.approx(finals["fp32"], rel=0.1)
