"""Dropout in models built by others: what is replaced, what is left, what is added, and that nothing else changes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import three_parts
from thalweg.core import ModelError
from thalweg.recipes.models.gpt import GPT
from thalweg.regularize import (
    AlphaDropout,
    Dropout,
    FeatureAlphaDropout,
    SpatialDropout,
    StochasticDepth,
    Streams,
    add_dropout,
    add_stochastic_depth,
    connect,
    convert_dropout,
    not_converted,
)


class BasicBlock(nn.Module):
    """Two convolutions, with torchvision's names and its order of operations."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        change = stride != 1 or width != out
        self.downsample = shortcut(width, out, stride) if change else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, likewise."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out // 2, 1, bias=False), nn.BatchNorm2d(out // 2)
        self.conv2, self.bn2 = nn.Conv2d(out // 2, out // 2, 3, stride, 1, bias=False), nn.BatchNorm2d(out // 2)
        self.conv3, self.bn3 = nn.Conv2d(out // 2, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        change = stride != 1 or width != out
        self.downsample = shortcut(width, out, stride) if change else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def shortcut(width: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    def __init__(self, block: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(block(8, 8, 1), block(8, 8, 1))
        self.layer2 = nn.Sequential(block(8, 16, 2), block(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x)).mean((2, 3))
        logits: Tensor = self.fc(x)
        return logits


@pytest.fixture
def timm_models() -> Iterator[Callable[[str], Any]]:
    """Single model files of timm, which as a whole asks for torchvision; nothing of it stays imported."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("timm is not installed")
    place, before = found.submodule_search_locations[0], dict(sys.modules)

    def bare(name: str, path: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = [path]
        sys.modules[name] = module
        return module

    bare("timm", place).__dict__["__version__"] = "0"
    bare("timm.models", f"{place}/models")
    data = bare("timm.data", f"{place}/data")
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        bare(name, place + "/nowhere")
    sys.modules["torchvision.ops.misc"].__dict__["FrozenBatchNorm2d"] = type("FrozenBatchNorm2d", (nn.Module,), {})
    constants = importlib.import_module("timm.data.constants")
    data.__dict__.update({key: value for key, value in vars(constants).items() if key.isupper()})
    yield lambda name: importlib.import_module(f"timm.models.{name}")
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("timm", "torchvision"):
            del sys.modules[name]
    sys.modules.update(
        {name: module for name, module in before.items() if name.split(".")[0] in ("timm", "torchvision")}
    )


IMAGES = (2, 3, 16, 16)


def gpt(dropout: float = 0.0) -> GPT:
    return GPT(vocab=16, context=8, width=8, heads=2, layers=2, dropout=dropout)


def depths(changes: list[Any]) -> list[tuple[str, str]]:
    """(name, rate) of each change."""
    return [(change.name, change.after.split("p=")[1].split(",")[0].rstrip(")")) for change in changes]


def check_only_training_changes(model: nn.Module, x: Tensor, change: Callable[[], Any]) -> Any:
    """Evaluation keeps its bits and parameters their names; modes, gradients and statistics stay as they are."""
    model.eval()
    with torch.no_grad():
        before = model(x)
    names = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    model.train()
    next(iter(model.children())).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    result = change()
    now = {name: module.training for name, module in model.named_modules()}
    assert {name: now[name] for name in modes if name in now} == modes
    assert list(model.state_dict()) == list(names)
    assert all(torch.equal(value, names[key]) for key, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin.eval()(x), before)
    model.train()
    with torch.no_grad():
        outs = {tuple(model(x).flatten().tolist()) for _ in range(8)}
    assert len(outs) > 1, "in training something is left out"
    return result


@pytest.mark.parametrize(("block", "last"), [(BasicBlock, "bn2"), (Bottleneck, "bn3")])
def test_stochastic_depth_in_a_resnet(block: Any, last: str) -> None:
    model, x = ResNet(block), torch.randn(IMAGES)
    changes = check_only_training_changes(model, x, lambda: add_stochastic_depth(model, lambda: model(x), 0.4))
    places = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    if block is Bottleneck:
        assert depths(changes) == [(f"{p}.bn3", r) for p, r in zip(places, ("0.1", "0.2", "0.3", "0.4"))]
    assert [str(change) for change in changes] == [
        f"{place}.{last}: BatchNorm2d -> BatchNorm2d, then StochasticDepth(p={rate}, mode=row)"
        for place, rate in zip(places, ("0.1", "0.2", "0.3", "0.4"))
    ]


def test_stochastic_depth_in_timms_resnet_and_vit(timm_models: Callable[[str], Any]) -> None:
    resnet, x = timm_models("resnet").resnet18(num_classes=5, zero_init_last=False), torch.randn(2, 3, 32, 32)
    changes = check_only_training_changes(resnet, x, lambda: add_stochastic_depth(resnet, lambda: resnet(x), 0.8))
    wanted = [f"layer{stage}.{place}.bn2" for stage in (1, 2, 3, 4) for place in (0, 1)]
    assert depths(changes) == [(name, f"{0.1 * (i + 1):g}") for i, name in enumerate(wanted)]
    vit = timm_models("vision_transformer").vit_tiny_patch16_224(img_size=32, patch_size=16, depth=2, num_classes=5)
    changes = check_only_training_changes(vit, x, lambda: add_stochastic_depth(vit, lambda: vit(x), 0.2))
    assert depths(changes) == [
        ("blocks.0.drop_path1", "0.05"),
        ("blocks.0.drop_path2", "0.1"),
        ("blocks.1.drop_path1", "0.15"),
        ("blocks.1.drop_path2", "0.2"),
    ]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_stochastic_depth_in_a_gpt(dropout: float, frozen: bool) -> None:
    """Its dropout layer serves two branches, and is passed over for the layer before it; positions are no branch."""
    model, x = gpt(dropout).requires_grad_(not frozen), torch.randint(16, (2, 8))
    changes = check_only_training_changes(
        model, x, lambda: add_stochastic_depth(model, lambda: model(x), 0.4, mode="batch")
    )
    assert depths(changes) == [
        ("blocks.0.out", "0.1"),
        ("blocks.0.down", "0.2"),
        ("blocks.1.out", "0.3"),
        ("blocks.1.down", "0.4"),
    ]
    assert all("mode=batch" in change.after for change in changes)


def test_torchs_transformer_and_frozen_parameters() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 8)
    model.requires_grad_(False)
    changes = check_only_training_changes(model, x, lambda: add_stochastic_depth(model, lambda: model(x), 0.4))
    assert depths(changes) == [(f"layers.{i}.dropout{j}", f"{0.1 * (2 * i + j):g}") for i in (0, 1) for j in (1, 2)]


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.a(x)).add_(self.b(x)) + self.scale


def test_parallel_branches_and_raw_inputs() -> None:
    model, x = Parallel(), torch.randn(64, 4)
    changes = check_only_training_changes(model, x, lambda: add_stochastic_depth(model, lambda: model(x), 0.5))
    assert depths(changes) == [("a", "0.25"), ("b", "0.5")]
    rows = (model(x) - x - 1).abs().amax(1)
    assert 0 < int((rows < 1e-6).sum()) < 32, "a sample whose two branches are out keeps the shortcut alone"
    assert type(model.b[-1]) is StochasticDepth, (
        "a Sequential runs its children by itself: no hook, or it would act twice"
    )
    assert not model.b._forward_hooks


def test_what_was_added_keeps_the_mean_and_takes_streams() -> None:
    model, x = Parallel().double(), torch.randn(2, 4, dtype=torch.float64)
    plain, steps = model.eval()(x).detach(), 3000
    add_stochastic_depth(model, lambda: model(x), 0.5)
    streams = Streams(0, "cpu", by_sample=True)
    assert connect(model.train(), streams) == ["a.stochastic_depth", "b.stochastic_depth"]
    total = torch.zeros_like(plain)
    for step in range(steps):
        streams.begin(step, 0, 0, 2)
        total += model(x).detach()
    spread = (
        nn.functional.linear(x, model.a.weight, model.a.bias).abs() + model.b[:2](x).abs()
    ).detach() / steps**0.5  # of a mean: the rates are at most 1/2
    assert bool(((total / steps - plain).abs() < 5 * spread).all())
    streams.begin(3, 0, 0, 2)
    whole = model(x)
    streams.begin(3, 1, 1, 1)
    torch.testing.assert_close(model(x[1:]), whole[1:])


def test_dropout_at_residuals_the_head_and_patterns() -> None:
    model, x = ResNet(BasicBlock), torch.randn(IMAGES)
    check = lambda **at: check_only_training_changes(model, x, lambda: add_dropout(model, lambda: model(x), 0.3, **at))
    residual = check(at="residual")
    assert depths(residual) == [(f"layer{i}.{j}.bn2", "0.3") for i in (1, 2) for j in (0, 1)]
    (head,) = check(at="head")
    assert str(head) == "fc: Linear -> Linear, after Dropout(p=0.3)"
    chosen = check(at=["layer?.0", "bn1"])
    assert [change.name for change in chosen] == ["layer1.0", "layer2.0", "bn1"]
    x = torch.ones(4, 16)
    model.fc.bias.data.zero_()
    model.fc.weight.data.copy_(torch.ones(5, 16))
    out = model.fc(x)
    assert torch.equal(out, out[:, :1].expand_as(out)), "the head's input was dropped, not its output"
    assert len(out.unique()) > 1


def test_a_model_that_has_both_gets_each_once() -> None:
    model, x = gpt(), torch.randint(16, (2, 8))
    add_stochastic_depth(model, lambda: model(x), 0.2)
    assert [c.name for c in add_dropout(model, lambda: model(x), 0.2)] == [
        "blocks.0.out",
        "blocks.0.down",
        "blocks.1.out",
        "blocks.1.down",
    ]
    for again in (
        lambda: add_stochastic_depth(model, lambda: model(x), 0.2),
        lambda: add_dropout(model, lambda: model(x), 0.2),
    ):
        with pytest.raises(ModelError, match="already") as caught:
            again()
        three_parts(caught.value)


def test_in_a_model_that_evaluates_what_is_added_does_too() -> None:
    model, x = gpt().eval(), torch.randint(16, (2, 8))
    add_stochastic_depth(model, lambda: model(x), 0.2)
    (head,) = add_dropout(model, lambda: model(x), 0.2, at="head")
    assert head.name == "head", "of many Linear the last"
    assert not any(module.training for module in model.modules())


class Unreachable(nn.Module):
    """One branch can be reached, the other is scaled in the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + 0.5 * self.b(x)


class InPlace(nn.Module):
    """What the module returned is no longer what is added."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x).mul_(0.5)


class Tied(nn.Module):
    """A sum of two values that share a parameter, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.zeros_like(x)) + self.norm(self.a(x.detach()))


def no_branches() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        (no_branches, lambda m, run: add_stochastic_depth(m, run, 0.1), "no residual branches"),
        (no_branches, lambda m, run: add_dropout(m, run, 0.1), "no residual branches"),
        (no_branches, lambda m, run: add_dropout(m, run, 0.1, at="head"), "none runs"),
        (no_branches, lambda m, run: add_dropout(m, run, 0.1, at="heads"), "no place"),
        (no_branches, lambda m, run: add_dropout(m, run, 0.1, at=["7"]), "No module matches '7'"),
        (lambda: nn.ModuleList([nn.LSTM(4, 4)]), lambda m, run: add_dropout(m, run, 0.1, at=["0"]), "one tensor"),
        (InPlace, lambda m, run: add_stochastic_depth(m, run, 0.1), "0 of 1 are"),
        (Tied, lambda m, run: add_stochastic_depth(m, run, 0.1), "no residual branches"),
        (Unreachable, lambda m, run: add_stochastic_depth(m, run, 0.1), "Not every residual branch"),
        (Unreachable, lambda m, run: add_stochastic_depth(m, run, 1.0), "no rate"),
        (Unreachable, lambda m, run: add_stochastic_depth(m, run, 0.1, mode="rows"), "Modes: row, batch"),
        (Unreachable, lambda m, run: add_dropout(m, run, -0.1), "no rate"),
    ],
)
def test_wrong_use_changes_nothing(make: Callable[[], nn.Module], call: Any, message: str) -> None:
    model = make()
    before, x = repr(model), torch.randn(3, 4, 4)
    run = lambda: model[0](x) if isinstance(model, nn.ModuleList) else model(x)
    with pytest.raises(ModelError, match=message) as caught:
        call(model, run)
    three_parts(caught.value)
    assert repr(model) == before and not any(module._forward_hooks for module in model.modules())


def test_a_run_that_fails_leaves_the_model_as_it_was() -> None:
    model = gpt()
    model.head.weight.requires_grad_(False)
    with pytest.raises(TypeError):
        add_stochastic_depth(model, lambda: model(None, 1), 0.1)
    assert model.training and not model.head.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Conversion


class DropPath(nn.Module):
    """With timm's attributes."""

    def __init__(self, drop_prob: float | None, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep


class TorchvisionDepth(nn.Module):
    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode


TorchvisionDepth.__name__ = "StochasticDepth"


@pytest.mark.parametrize(
    ("theirs", "ours", "rest"),
    [
        (nn.Dropout(0.25), Dropout, "p=0.25"),
        (nn.Dropout(0.25, inplace=True), Dropout, "p=0.25"),
        (nn.Dropout1d(0.25), SpatialDropout, "p=0.25"),
        (nn.Dropout2d(0.25), SpatialDropout, "p=0.25"),
        (nn.Dropout3d(0.25), SpatialDropout, "p=0.25"),
        (nn.AlphaDropout(0.25), AlphaDropout, "p=0.25"),
        (nn.FeatureAlphaDropout(0.25), FeatureAlphaDropout, "p=0.25"),
        (DropPath(0.25), StochasticDepth, "p=0.25, mode=row"),
        (DropPath(None), StochasticDepth, "p=0, mode=row"),
        (TorchvisionDepth(0.25, "batch"), StochasticDepth, "p=0.25, mode=batch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("training", [True, False])
def test_each_kind_becomes_ours(theirs: nn.Module, ours: type[nn.Module], rest: str, training: bool) -> None:
    seen: list[nn.Module] = []
    theirs.train(training).register_forward_hook(lambda module, args, output: seen.append(module))
    model = nn.ModuleDict({"first": nn.ReLU(), "drop": theirs, "last": nn.Linear(2, 2)})
    (change,) = convert_dropout(model)
    drop = model["drop"]
    assert type(drop) is ours and drop.extra_repr() == rest and drop.training is training
    assert change.name == "drop" and change.before.startswith(type(theirs).__name__)
    assert change.after == f"thalweg {ours.__name__}({rest})"
    assert list(model) == ["first", "drop", "last"]
    drop(torch.ones(2, 3, 4, 4))
    assert seen == [drop], "hooks move along"
    assert convert_dropout(model) == [] and not_converted(model) == []


def test_a_shared_layer_stays_shared() -> None:
    one = nn.Dropout(0.1)
    model = nn.Sequential(one, nn.Sequential(nn.ReLU(), one))
    assert [change.name for change in convert_dropout(model)] == ["0", "1.1"]
    assert type(model[0]) is Dropout and model[0] is model[1][1]


def test_conversion_keeps_evaluation_and_the_statistics_of_training() -> None:
    model = gpt(0.3)
    x = torch.randint(16, (4, 8))
    check_only_training_changes(model, x, lambda: convert_dropout(model))
    theirs, ours = nn.Sequential(nn.Dropout2d(0.3)), nn.Sequential(nn.Dropout2d(0.3))
    convert_dropout(ours)
    ones = torch.ones(64, 64, 3, 3)
    assert abs(float((theirs(ones) == 0).float().mean() - (ours(ones) == 0).float().mean())) < 0.04
    torch.testing.assert_close(ours(ones).max(), theirs(ones).max())


class Scaled(nn.Module):
    """As a model's own attention: a rate that it hands to torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout = 0.2


class FusedAttention(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.fused_attn, self.attn_drop = True, nn.Dropout(p)


class MyDropout(nn.Dropout):
    pass


def test_what_is_left_is_listed_by_name() -> None:
    model = nn.ModuleDict(
        {
            "drop": nn.Dropout(0.1),
            "mha": nn.MultiheadAttention(4, 2, dropout=0.1),
            "mha0": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(4, 4, 2, dropout=0.3),
            "gru": nn.GRU(4, 4, 2, dropout=0.3),
            "rnn": nn.RNN(4, 4, 2, dropout=0.3),
            "encoder": nn.TransformerEncoderLayer(4, 2, 4, dropout=0.1),
            "mine": MyDropout(0.4),
            "unscaled": DropPath(0.2, scale_by_keep=False),
            "own": Scaled(),
            "fused": FusedAttention(0.1),
            "fused0": FusedAttention(0.0),
            "depth": StochasticDepth(0.1),
        }
    )
    convert_dropout(model)
    lines = not_converted(model)
    assert [line.split("'")[1] for line in lines] == [
        "mha",
        "lstm",
        "gru",
        "rnn",
        "encoder.self_attn",
        "mine",
        "unscaled",
        "own",
        "fused",
    ]
    assert lines[0] == "'mha': MultiheadAttention has dropout=0.1 inside"
    assert lines[5] == "'mine': MyDropout has p=0.4 inside"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Dropout(0.1), nn.Dropout(1.0)), "'1' cannot be converted"),
        (nn.Sequential(nn.Dropout(0.1), DropPath(1.0)), "'1' cannot be converted"),
        (nn.Dropout(0.1), "no parent"),
    ],
)
def test_what_cannot_be_converted_changes_nothing(model: nn.Module, message: str) -> None:
    before = repr(model)
    with pytest.raises(ModelError, match=message) as caught:
        convert_dropout(model)
    three_parts(caught.value)
    assert repr(model) == before
