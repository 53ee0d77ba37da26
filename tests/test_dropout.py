"""The dropout family: whose mask is whose, how often and how much, and the same under recomputation, splits and compiling."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.conftest import three_parts
from thalweg.core import ModelError
from thalweg.device.counters import element_bits, hashed
from thalweg.regularize import (
    AlphaDropout,
    DropBlock,
    DropConnect,
    Dropout,
    FeatureAlphaDropout,
    SpatialDropout,
    StochasticDepth,
    Streams,
    connect,
    drop_connect,
    set_factors,
)

LAYERS: dict[str, Callable[[float], nn.Module]] = {
    "dropout": Dropout,
    "spatial": SpatialDropout,
    "alpha": AlphaDropout,
    "feature_alpha": FeatureAlphaDropout,
    "block": lambda p: DropBlock(p, size=2),
    "depth_row": StochasticDepth,
    "depth_batch": lambda p: StochasticDepth(p, mode="batch"),
    "connect": lambda p: with_drop_connect(p),
}
BY_SAMPLE = [name for name in LAYERS if name not in ("depth_batch", "connect")]
IMAGES = (8, 6, 5, 4)  # samples, channels, height, width


def with_drop_connect(p: float) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, 1, bias=False)
    drop_connect(layer, p)
    return layer


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def streams_for(model: nn.Module, *, by_sample: bool = True, seed: int = 0) -> Streams:
    streams = Streams(seed, "cpu", by_sample=by_sample)
    connect(model, streams)
    return streams


def run(model: nn.Module, x: Tensor, *, by_sample: bool = True, seed: int = 0, step: int = 0, index: int = 0) -> Tensor:
    """One forward pass over a whole window."""
    streams_for(model, by_sample=by_sample, seed=seed).begin(step, index, 0, len(x))
    out: Tensor = model(x)
    return out


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# Whose mask is whose


@pytest.mark.parametrize("name", BY_SAMPLE)
@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [2, 5, 1]], ids=str)
def test_another_split_of_the_window_gives_the_same_masks(name: str, sizes: list[int]) -> None:
    model = nn.Sequential(LAYERS[name](0.4), nn.Tanh(), LAYERS[name](0.3))
    x = torch.randn(IMAGES)
    whole = run(model, x, step=3)
    streams = streams_for(model)
    parts, first = [], 0
    for index, part in enumerate(x.split(sizes)):
        streams.begin(3, index, first, len(part))
        parts.append(model(part))
        first += len(part)
    assert torch.equal(torch.cat(parts), whole)
    alike = run(model, x[:1].expand_as(x), step=3)
    assert len({tuple(row.ravel().tolist()) for row in alike}) > 1, "samples have masks of their own"


@pytest.mark.parametrize("name", ["depth_batch", "connect"])
@pytest.mark.parametrize("by_sample", [True, False])
def test_what_is_keyed_by_the_step_is_the_same_in_all_micro_batches(name: str, by_sample: bool) -> None:
    layer, x = LAYERS[name](0.5), torch.randn(IMAGES)
    streams = streams_for(layer, by_sample=by_sample)
    outs = []
    for step in range(8):
        streams.begin(step, 0, 0, 8)
        whole = layer(x)
        streams.begin(step, 1, 3, 5)
        torch.testing.assert_close(layer(x[3:]), whole[3:], rtol=1e-6, atol=1e-6)
        outs.append(whole)
    assert any(not torch.equal(outs[0], other) for other in outs[1:]), "steps differ"


def test_rows_of_one_sample_may_lie_side_by_side() -> None:
    """(samples * heads, places) as in attention: split along samples, the same masks."""
    layer, x = Dropout(0.5), ones(6 * 3, 40)
    streams = streams_for(layer)
    streams.begin(0, 0, 0, 6)
    whole = layer(x)
    streams.begin(0, 1, 4, 2)
    assert torch.equal(layer(x[12:]), whole[12:])


@pytest.mark.parametrize("by_sample", [True, False])
def test_seeds_steps_layers_calls_and_samples_all_differ(by_sample: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Dropout(0.5), Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.a(x), self.a(x), self.b(x)])

    x = ones(4, 64)
    masks = [
        mask
        for seed in (0, 1)
        for step in (0, 1)
        for layers in run(Twice(), x, by_sample=by_sample, seed=seed, step=step)
        for mask in layers
    ]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 2 * 2 * 3 * 4
    for a, b in zip(masks, masks[1:]):
        assert 10 < int((a == b).sum()) < 54, "and are not each other's opposite"


def test_micro_batches_differ_without_by_sample_and_a_pass_repeats() -> None:
    layer, x = Dropout(0.5), ones(4, 64)
    streams = streams_for(layer, by_sample=False)
    outs = []
    for index in (0, 1, 0):
        streams.begin(5, index, 4 * index, 4)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
    streams.begin(5, 0, 77, 4)
    assert torch.equal(layer(x), outs[0]), "the samples' places do not matter"


def test_a_layer_elsewhere_changes_no_mask() -> None:
    x = ones(4, 32)
    lonely = nn.ModuleDict({"drop": Dropout(0.5)})
    larger = nn.ModuleDict({"first": Dropout(0.5), "drop": Dropout(0.5), "last": StochasticDepth(0.5)})
    outs = []
    for model in (lonely, larger, torch.compile(larger, backend="eager"), nn.DataParallel(larger)):
        streams = Streams(0, "cpu", by_sample=True)
        assert "drop" in connect(model, streams), "wrappers do not count"
        streams.begin(0, 0, 0, 4)
        drop = (lonely if model is lonely else larger)["drop"]
        outs.append(drop(x))
    assert all(torch.equal(outs[0], other) for other in outs)


def test_shared_tensors_without_samples_are_refused_by_sample_and_fine_by_micro_batch() -> None:
    layer = Dropout(0.5)
    streams = streams_for(nn.ModuleDict({"positions": layer}))
    streams.begin(0, 0, 0, 4)
    for wrong in (ones(1, 9), ones(6, 9), torch.tensor(1.0)):
        with pytest.raises(ModelError, match="'positions' cannot tell the samples apart") as caught:
            layer(wrong)
        three_parts(caught.value)
    streams = streams_for(layer, by_sample=False)
    streams.begin(0, 0, 0, 4)
    assert 0 < float((layer(ones(1, 900)) == 0).float().mean()) < 1 and layer(torch.tensor(1.0)).shape == ()


def test_without_streams_torchs_generator_is_what_counts() -> None:
    layer, x = Dropout(0.5), ones(4, 64)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    streams = streams_for(layer)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first), "so it is until the first begin"
    streams.begin(0, 0, 0, 4)
    torch.manual_seed(3)
    keyed = layer(x)
    assert not torch.equal(keyed, first)
    streams.release()
    torch.manual_seed(3)
    assert torch.equal(layer(x), first), "and after release"
    streams.begin(0, 0, 0, 4)
    assert layer._rows is None


def test_a_layer_has_one_streams_the_newest() -> None:
    layer, x = Dropout(0.5), ones(4, 64)
    old, new = streams_for(layer, seed=1), streams_for(layer, seed=2)
    new.begin(0, 0, 0, 4)
    wanted = layer(x)
    new.begin(0, 0, 0, 4)
    old.begin(0, 0, 0, 3)
    assert torch.equal(layer(x), wanted)


def test_copies_are_on_their_own() -> None:
    model, x = nn.Sequential(Dropout(0.5)), ones(4, 64)
    streams = streams_for(model)
    set_factors(model, {"dropout": torch.tensor(0.0)})
    streams.begin(0, 0, 0, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        first = twin(x)
        assert not torch.equal(first, twin(x)) and bool((first == 0).any())
        assert twin.state_dict() == {} and repr(twin) == repr(model)
    assert torch.equal(model(x), x), "the copied one keeps its streams and its factor"


# How often and how much


@given(p=st.floats(0.0, 0.999), seed=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_the_rate_is_p_and_what_stays_is_scaled(p: float, seed: int) -> None:
    out = run(Dropout(p), ones(8, 2048), seed=seed)
    kept = out[out != 0]
    num, share = out.numel(), 1 - p
    assert abs(len(kept) - num * share) < 6 * math.sqrt(num * p * share) + 1
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / share), rtol=2e-7 / share, atol=0)


def test_masks_of_elements_samples_and_passes_are_independent() -> None:
    """Correlations between any two elements, any two samples, and from step to step are those of independent draws."""
    layer = Dropout(0.3)
    streams = streams_for(layer)
    masks = []
    for step in range(20):
        streams.begin(step, 0, 0, 100)
        masks.append((layer(ones(100, 400)) == 0).double())
    z = (torch.stack(masks) - 0.3) / math.sqrt(0.21)  # (steps, samples, elements)
    flat = z.reshape(2000, 400)
    for rows in (flat.T, flat, z.transpose(0, 1).reshape(100, -1)):
        correlation = rows @ rows.T / math.sqrt(rows.shape[1])
        off = correlation[~torch.eye(len(rows), dtype=torch.bool)]
        assert abs(float(off.std()) - 1) < 0.05 and float(off.abs().max()) < 7
    assert float(z.mean() * math.sqrt(z.numel())) < 4


def test_bits_are_uniform_in_each_place() -> None:
    keys = hashed(torch.arange(256, dtype=torch.int32).view(-1, 1), 99, 1)
    bits = element_bits(keys, 4096)
    assert bits.dtype == torch.int32
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(((bits >> shift) & 255).flatten(), minlength=256).double()
        chi = float(((counts - 4096) ** 2 / 4096).sum())
        assert abs(chi - 255) < 6 * math.sqrt(2 * 255)
    assert torch.equal(element_bits(keys, 17), bits[:, :17]), "an element's bits do not hang on how many there are"
    assert torch.equal(element_bits(keys[:2], 9000)[:, :4096], bits[:2]), "also where the kept hashes must grow"


def test_no_two_keys_share_their_bits() -> None:
    keys = hashed(torch.arange(2**20, dtype=torch.int32).view(-1, 1), 9, 1)
    assert len(element_bits(keys, 1).unique()) == len(keys)


def test_nothing_of_a_trace_is_kept_for_later() -> None:
    """Shapes alone are computed under a fake mode, and the layer works there and after it."""
    num = 300_007  # more than any other test has asked for
    with FakeTensorMode():
        assert Dropout(0.5)(torch.ones(1, num)).shape == (1, num)
    assert type(Dropout(0.5)(ones(1, num))) is Tensor
    with FakeTensorMode():
        assert Dropout(0.5)(torch.ones(1, num)).shape == (1, num)


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("block", "alpha", "feature_alpha")])
def test_the_mean_is_kept_in_value_and_gradient(name: str) -> None:
    layer, steps = LAYERS[name](0.3).double(), 1500
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    plain = layer.eval()(x)
    streams = streams_for(layer.train())
    total = torch.zeros_like(plain)
    for step in range(steps):
        streams.begin(step, 0, 0, 2)
        total = total + layer(x)
    error = (total / steps - plain).detach()
    spread = 6 * math.sqrt(0.3 / 0.7 / steps) * (plain.detach().abs().max() + 1)
    assert float(error.abs().max()) < float(spread)
    (grad,) = torch.autograd.grad(total.sum() / steps, x)
    (wanted,) = torch.autograd.grad(plain.sum(), x)
    assert float((grad - wanted).abs().max()) < float(spread)


@pytest.mark.parametrize("p", [0.0625, 0.3125, 0.75])
def test_alpha_dropout_is_torchs_and_keeps_both_moments(p: float) -> None:
    x = torch.randn(40, 5000, dtype=torch.float64)
    ours, theirs = run(AlphaDropout(p), x), F.alpha_dropout(x, p, training=True)
    assert abs(float(ours.mean())) < 0.02 and abs(float(ours.var()) - 1) < 0.04
    lowest = theirs.flatten().mode().values
    torch.testing.assert_close(ours.flatten().mode().values, lowest, rtol=1e-12, atol=0)
    out = (ours - lowest).abs() < 1e-9
    assert abs(float(out.double().mean()) - p) < 0.01
    both = ~out & (theirs != lowest)
    torch.testing.assert_close(ours[both], theirs[both], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [SpatialDropout, FeatureAlphaDropout])
@pytest.mark.parametrize("shape", [(3, 50, 7), (3, 50, 4, 5), (3, 50, 2, 3, 4)], ids=str)
def test_channels_go_whole(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    out = run(kind(0.4), ones(*shape)).flatten(2)
    assert torch.equal(out, out[..., :1].expand_as(out))
    assert len(out[..., 0].unique()) == 2 and not torch.equal(out[0], out[1])


def block_reference(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Algorithm 1 in loops: squares from corners, then count(mask)/count_ones(mask) of a sample."""
    B, C, rows, columns = corners.shape
    mask = torch.ones(B, C, rows + size[0] - 1, columns + size[1] - 1, dtype=torch.float64)
    for b, c, i, j in corners.nonzero().tolist():
        mask[b, c, i : i + size[0], j : j + size[1]] = 0
    for sample in mask:
        sample *= sample.numel() / max(1.0, float(sample.sum()))
    return mask


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_drop_block_is_its_algorithm(size: int) -> None:
    H, W, p = 7, 5, 0.3
    layer = DropBlock(p, size)
    h, w = min(size, H), min(size, W)
    gamma = p * H * W / (h * w * (H - h + 1) * (W - w + 1))
    drawn: list[Tensor] = []
    real = layer.sample_bits
    layer.__dict__["sample_bits"] = lambda x, shape: drawn.append(real(x, shape)) or drawn[-1]  # type: ignore[func-returns-value]
    x = torch.randn(64, 8, H, W)
    out = run(layer, x)
    corners = (drawn[0].double() + 2**31) / 2**32 < gamma
    assert abs(float(corners.double().mean()) - gamma) < 6 * math.sqrt(gamma / corners.numel())
    torch.testing.assert_close(out.double(), x.double() * block_reference(corners, (h, w)), rtol=1e-5, atol=1e-6)


def test_drop_block_of_one_place_is_dropout_with_its_own_scale() -> None:
    out = run(DropBlock(0.25, size=1), ones(4, 16, 16, 16))
    torch.testing.assert_close(out.mean((1, 2, 3)), ones(4))
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.02


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_drops_whole_branches(mode: str) -> None:
    layer, x = StochasticDepth(0.25, mode), ones(6, 3, 4)
    streams = streams_for(layer)
    kept = []
    for step in range(600):
        streams.begin(step, 0, 0, 6)
        rows = layer(x).flatten(1)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        kept.append(rows[:, 0])
    values = torch.stack(kept)
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float((values == 0).float().mean()) - 0.25) < (0.04 if mode == "row" else 0.08)
    together = (values == values[:, :1]).all(1).float().mean()
    assert float(together) == 1 if mode == "batch" else float(together) < 0.5


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 9), (4, 12)),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 4, 5, 5)),
        (nn.Conv3d(2, 3, 2), (4, 2, 3, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_drop_connect_drops_weights(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    names, plain = list(layer.state_dict()), layer(x)
    change = drop_connect(layer, 0.5)
    assert str(change).endswith("with DropConnect(p=0.5)")
    assert list(layer.state_dict()) == names and torch.equal(layer.eval()(x), plain)
    out = run(layer.train(), x)
    weight: Any = layer.weight
    masked = streams_mask(layer, weight)
    with torch.no_grad():
        weight.copy_(masked)
    torch.testing.assert_close(layer.eval()(x), out)
    torch.testing.assert_close(
        masked[masked != 0].abs().min() * 0 + (masked != 0).float().mean(), torch.tensor(0.5), atol=0.3, rtol=0
    )
    out.sum().backward()
    assert torch.equal(weight.grad == 0, masked == 0), "a weight that was left out has no gradient"
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and torch.equal(
        pickle.loads(pickle.dumps(layer))(x), layer(x)
    )


def streams_mask(layer: nn.Module, weight: Tensor) -> Tensor:
    drop: Any = layer.get_submodule("drop_connect")
    kept: Tensor = drop(weight.detach())
    return kept


def test_drop_connect_is_one_mask_a_step_however_often_it_is_called() -> None:
    layer = with_drop_connect(0.5)
    streams = streams_for(layer)
    x = torch.randn(IMAGES)
    streams.begin(0, 0, 0, 8)
    assert torch.equal(layer(x), layer(x))


# Rates on a schedule


@pytest.mark.parametrize("name", LAYERS)
def test_a_factor_scales_the_rate(name: str) -> None:
    layer, x = LAYERS[name](0.4), torch.randn(IMAGES)
    factor = torch.ones(())
    streams = streams_for(layer)

    def out() -> Tensor:
        streams.begin(2, 0, 0, 8)
        result: Tensor = layer(x)
        return result

    plain = out()
    set_factors(layer, {"dropout": factor, "stochastic_depth": factor})
    torch.testing.assert_close(out(), plain)
    factor.fill_(0.5)
    half = run(LAYERS[name](0.2), x, step=2)
    torch.testing.assert_close(out(), half, rtol=1e-5, atol=1e-6)
    factor.fill_(0.0)
    torch.testing.assert_close(out(), layer.eval()(x), rtol=1e-6, atol=1e-6)
    layer.train()
    for beyond in (7.0, -3.0):
        factor.fill_(beyond)
        assert bool(torch.isfinite(out()).all())
    set_factors(layer, {"dropout": None, "stochastic_depth": None})
    assert torch.equal(out(), plain)


def test_factors_go_to_their_own_kind() -> None:
    model = nn.Sequential(Dropout(0.5), StochasticDepth(0.5), SpatialDropout(0.5))
    one, other = torch.tensor(0.3), torch.tensor(0.4)
    set_factors(model, {"dropout": one})
    set_factors(model, {"stochastic_depth": other})
    assert [layer.factor is one for layer in model] == [True, False, True] and model[1].factor is other


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"dropuot": torch.ones(())}, "Did you mean dropout"),
        ({"dropout": torch.ones(2)}, r"shape \(2,\)"),
        ({"dropout": torch.ones((), dtype=torch.int64)}, "int64"),
    ],
)
def test_wrong_factors(factors: dict[str, Tensor], message: str) -> None:
    layer = Dropout(0.5)
    with pytest.raises(ModelError, match=message) as caught:
        set_factors(layer, factors)
    three_parts(caught.value)
    assert layer.factor is None


# Recomputation


class Checkpointed(nn.Module):
    def __init__(self, drop: nn.Module, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.drop, self.options = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), drop, options

    def block(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x).tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return checkpoint(self.block, x, **self.options) if self.options else self.block(x)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return torch.autograd.grad(out.square().sum(), model.stem.weight)[0]


OPTIONS = [{"use_reentrant": kind, "preserve_rng_state": keep} for kind in (False, True) for keep in (True, False)]


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_recomputation_sees_the_mask_of_the_forward_pass(name: str, options: dict[str, bool]) -> None:
    x = torch.randn(IMAGES)
    found = []
    for chosen in ({}, options):
        model = Checkpointed(LAYERS[name](0.5), **chosen)
        streams = streams_for(model)
        streams.begin(1, 0, 0, 8)
        found.append(gradient(model, x))
        streams.begin(2, 0, 0, 8)
        found.append(gradient(model, x))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_reentrant_checkpoints_too(options: dict[str, bool]) -> None:
    found, x = [], torch.randn(IMAGES)
    for chosen in ({}, options):
        model = Checkpointed(Dropout(0.5), **chosen)
        streams_for(model).begin(1, 0, 0, 8)
        model(x).square().sum().backward()
        found.append(model.stem.weight.grad)
    assert torch.equal(found[0], found[1])


def test_the_trap_torchs_own_dropout_and_ours_without_streams_need_the_generators_state() -> None:
    """preserve_rng_state=False gives torch's dropout another mask in the recomputation: a wrong gradient, silently."""
    x = torch.randn(IMAGES)
    for layer in (nn.Dropout(0.5), Dropout(0.5)):
        found = {}
        for keep in (None, True, False):
            options = {} if keep is None else {"use_reentrant": False, "preserve_rng_state": keep}
            model = Checkpointed(layer, **options)
            torch.manual_seed(5)
            found[keep] = gradient(model, x)
        assert torch.equal(found[None], found[True]) and not torch.equal(found[None], found[False])


def test_a_layer_that_is_called_twice_is_fine_until_it_is_recomputed() -> None:
    class Shared(Checkpointed):
        def block(self, x: Tensor) -> Tensor:
            return self.drop(self.drop(self.body(x)))

    x = torch.randn(IMAGES)
    model = Shared(Dropout(0.5))
    streams_for(model).begin(0, 0, 0, 8)
    gradient(model, x)
    model = Shared(Dropout(0.5), use_reentrant=False)
    streams_for(model).begin(0, 0, 0, 8)
    with pytest.raises(ModelError, match="'drop' is recomputed") as caught:
        gradient(model, x)
    assert "called 2 times" in three_parts(caught.value)[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("whole", [True, False], ids=["checkpoint in the compiled", "compiled in the checkpoint"])
def test_recomputation_and_compiling(whole: bool, calls: int) -> None:
    """Compiled, a layer may also be called twice and recomputed: its calls stand in the trace."""

    class Repeated(Checkpointed):
        def block(self, x: Tensor) -> Tensor:
            x = self.body(x).tanh()
            for _ in range(calls):
                x = self.drop(x)
            return x.tanh()

    x, found = torch.randn(IMAGES), []
    for compiling in (False, True):
        options = {"use_reentrant": False, "preserve_rng_state": False} if compiling else {}
        model: Any = Repeated(Dropout(0.5), **options)
        run_it: Any = model
        if compiling and whole:
            run_it = torch.compile(model, backend="aot_eager", fullgraph=True)
        elif compiling:
            model.block = torch.compile(model.block, backend="aot_eager", fullgraph=True)
        streams = streams_for(model)
        for step in range(3):
            streams.begin(step, 0, 0, 8)
            out = run_it(x)
            found.append(torch.autograd.grad(out.square().sum(), model.stem.weight)[0])
    for eager, compiled in zip(found[:3], found[3:]):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_blocks_that_are_compiled_one_by_one_share_their_code_and_no_mask() -> None:
    model = nn.Sequential(*(nn.Sequential(Dropout(0.5), nn.Tanh(), StochasticDepth(0.5)) for _ in range(12)))
    streams, x = streams_for(model), ones(4, 64)
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for step in range(2):
        streams.begin(step, 0, 0, 4)
        wanted = [block.forward(x) for block in model]
        streams.begin(step, 0, 0, 4)
        outs = [block(x) for block in model]
        assert all(torch.equal(a, b) for a, b in zip(outs, wanted))
        assert len({tuple(out.flatten().tolist()) for out in outs}) > 9
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    )  # one where a view begins its storage, one for all others


# Precisions and compiling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_precisions_and_compiling(name: str, dtype: torch.dtype) -> None:
    """In every precision the mask is the same, and compiled the numbers are those of eager."""
    layer = LAYERS[name](0.4).to(dtype)
    x = torch.randn(IMAGES).to(dtype)
    streams = streams_for(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for step in range(2):
        streams.begin(step, 0, 0, 8)
        out = layer(x)
        streams.begin(step, 0, 0, 8)
        again = compiled(x)
        assert out.dtype == again.dtype == dtype and torch.equal(out, again)
        wide = run(LAYERS[name](0.4).to(dtype).float(), x.float(), step=step)
        torch.testing.assert_close(out.float(), wide, rtol=0.02, atol=0.02)
        streams = streams_for(layer)


def test_compiled_no_graph_break_and_no_second_compilation() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 1), *(make(0.3) for make in LAYERS.values()), nn.Flatten(), nn.Linear(120, 4), Dropout(0.2)
    )
    factor = torch.ones(())
    set_factors(model, {"dropout": factor, "stochastic_depth": factor})
    streams = streams_for(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    x, seen = torch.randn(IMAGES), []
    for step in range(6):
        factor.fill_((step + 1) / 6)
        for index in range(2):
            streams.begin(step, index, 8 * index, 8)
            out = compiled(x)
            out.sum().backward()
            streams.begin(step, index, 8 * index, 8)
            assert torch.equal(out, model(x))
            seen.append(out.detach())
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]
    assert len({tuple(out.flatten().tolist()) for out in seen}) == len(seen)


def test_compiled_without_streams_draws_anew() -> None:
    layer = Dropout(0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = ones(4, 64)
    assert not torch.equal(compiled(x), compiled(x))
    assert abs(float((compiled(ones(64, 64)) == 0).float().mean()) - 0.5) < 0.05


def test_under_autocast_the_input_decides() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Dropout(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model, torch.randn(4, 6)).dtype == torch.bfloat16


# Corners and bad input


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_rate_zero_and_no_samples_are_the_identity(name: str) -> None:
    x = torch.randn(IMAGES)
    layer = LAYERS[name](0.5)
    if name == "connect":
        layer = layer.get_submodule("drop_connect")
    assert layer.eval()(x) is x
    layer.train().p = 0.0
    assert layer(x) is x
    layer.p = 0.5
    assert name == "connect" or layer(x[:0]).shape == (0, *IMAGES[1:])
    assert layer.state_dict() == {} and re.search(r"p=0\.5", repr(layer))


def test_no_step_reads_the_device_back() -> None:
    from thalweg.testing import no_reads

    model = nn.Sequential(*(make(0.3) for make in LAYERS.values()))
    factor = torch.ones(())
    set_factors(model, {"dropout": factor, "stochastic_depth": factor})
    streams = streams_for(model)
    x = torch.randn(IMAGES, requires_grad=True)
    with no_reads():
        for index in range(2):
            streams.begin(0, index, 0, 8)
            model(x).sum().backward()


@given(p=st.one_of(st.floats(max_value=-1e-12), st.floats(min_value=1.0), st.just(math.nan), st.just(True), st.text()))
@settings(max_examples=30, deadline=None)
def test_rates_outside_the_range_are_refused(p: Any) -> None:
    for kind in (Dropout, SpatialDropout, AlphaDropout, FeatureAlphaDropout, DropBlock, StochasticDepth, DropConnect):
        with pytest.raises(ModelError, match=kind.__name__) as caught:
            kind(p)
        three_parts(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DropBlock(0.1, size=0),
        lambda: DropBlock(0.1, size=2.5),  # type: ignore[arg-type]
        lambda: DropBlock(0.1)(ones(2, 3, 4)),
        lambda: SpatialDropout(0.1)(ones(2, 3)),
        lambda: FeatureAlphaDropout(0.1)(ones(2, 3, 1, 1, 1, 1)),
        lambda: StochasticDepth(0.1, mode="rows"),
        lambda: drop_connect(nn.LSTM(2, 2), 0.1),
        lambda: drop_connect(with_drop_connect(0.1), 0.1),
        lambda: drop_connect(nn.Linear(2, 2), 1.0),
        lambda: streams_for(Dropout(0.1)).begin(0, 0, 0, 0),
        lambda: streams_for(Dropout(0.1)).begin(0, 0, -1, 2),
    ],
)
def test_wrong_use(wrong: Callable[[], Any]) -> None:
    with pytest.raises(ModelError) as caught:
        wrong()
    three_parts(caught.value)
