"""Recomputation: the same gradients, statistics and streams to the bit, less kept, and a model that stays what it was."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.recompute import Alive
from tests.models import make_step, ragged_text, run_steps, small_gpt, state_bits, text_loss
from tests.test_dropout_models import timm_models  # noqa: F401
from thalweg import TrainStep
from thalweg.core import ModelError, RecipeError
from thalweg.engine.blocks import repeated_blocks
from thalweg.engine.recompute import recompute, recomputed
from thalweg.regularize import Dropout, StochasticDepth, Streams, connect

HOWS = ("blocks", "ops")


class Block(nn.Module):
    """Everything at once: products, normalization, an in-place activation, dropout in the middle and at the end."""

    def __init__(self, width: int = 8, norm: str = "layer", drop: str = "none") -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        makes: dict[str, Callable[[], nn.Module]] = {
            "none": nn.Identity,
            "torch": lambda: nn.Dropout(0.3),
            "keyed": lambda: Dropout(0.3),
        }
        self.inside, self.behind = makes[drop](), makes[drop]()
        self.depth = StochasticDepth(0.3) if drop == "keyed" else nn.Identity()

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        y = F.relu(self.up(self.norm(x)), inplace=True)
        return x + self.depth(self.behind(self.down(self.inside(y))))


class Plain(Block):
    """Nothing in place, so that no result of a product is lost."""

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        return x + self.behind(self.down(self.inside(F.gelu(self.up(self.norm(x))))))


class Net(nn.Module):
    """A row of blocks; ``kind`` makes one."""

    def __init__(self, kind: Callable[[], nn.Module] = Block, num: int = 3, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(kind() for _ in range(num))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made(kind: Callable[[], nn.Module] = Block, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(kind, **options)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def points(num: int = 16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"x": torch.randn(num, 6, generator=draw), "y": torch.randint(0, 3, (num,), generator=draw)}


def gradients(model: nn.Module, how: str, forward: Callable[[], Tensor] | None = None) -> list[Tensor]:
    """Gradients of one pass, and what torch's generator says afterwards."""
    batch = points()
    for p in model.parameters():
        p.grad = None
    with recomputed(model, how):
        torch.manual_seed(3)
        total = loss_of(model, batch) if forward is None else forward()
        total.backward()
    assert not any("forward" in module.__dict__ for module in model.modules())
    return [*(p.grad.clone() for p in model.parameters() if p.grad is not None), torch.rand(3)]


def assert_same(mine: list[Tensor], other: list[Tensor]) -> None:
    assert len(mine) == len(other) > 2
    for a, b in zip(mine, other):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("drop", ["none", "torch", "keyed"])
def test_a_run_is_the_same_run(drop: str, norm: str, precision: str, how: str) -> None:
    """Over micro-batches: rows, weights, slots and running statistics to the bit."""
    changes = {"train.batch": 8, "train.micro_batch": 4, "precision": precision}
    found = []
    for one in ("none", how):
        step, feed = make_step(made(lambda: Block(norm=norm, drop=drop)), loss_of, points(), **changes, recompute=one)
        found.append((run_steps(step, feed, 2), state_bits(step)))
        assert ("forward" in step.state.model.blocks[0].__dict__) == (one != "none")
    (rows, bits), (rows_again, bits_again) = found
    assert rows == rows_again
    assert bits.keys() == bits_again.keys()
    for name, value in bits.items():
        assert torch.equal(value, bits_again[name]), name


@pytest.mark.parametrize("how", HOWS)
def test_sharpness_takes_its_second_pass_too(how: str) -> None:
    changes = {"train.batch": 8, "train.micro_batch": 4, "regularize.sharpness": 0.05}
    bits = []
    for one in ("none", how):
        model = made(lambda: Block(norm="batch", drop="keyed"))
        step, feed = make_step(model, loss_of, points(), **changes, recompute=one)
        run_steps(step, feed, 2)
        bits.append(state_bits(step))
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])


@pytest.mark.parametrize("how", HOWS)
def test_a_language_model_in_a_loop_of_its_own(how: str) -> None:
    batch = ragged_text(8)
    found = []
    for one in ("none", how):
        torch.manual_seed(0)
        recipe = {"precision": "bf16", "schedule.lr": "constant()", "train.micro_batch": 4, "recompute": one}
        step = TrainStep(small_gpt(0.1), text_loss, recipe)
        losses = [float(step(batch).loss) for _ in range(3)]
        found.append((losses, [p.detach().clone() for p in step.model.parameters()]))
        assert any("recompute" in decision.path for decision in step.plan.decisions) == (one != "none")
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


# ---------------------------------------------------------------------- what is kept


def alive_after_forward(how: str, width: int = 64) -> tuple[int, int]:
    """(bytes kept for the backward pass, bytes at the peak) of six blocks."""
    model = made(lambda: Plain(width, drop="torch"), num=6, width=width)
    batch = points(256)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with recomputed(model, how), Alive() as alive:
        total = loss_of(model, batch)
        kept = alive.now
        total.backward()
    return kept, alive.peak


def test_less_is_kept_and_the_peak_is_lower() -> None:
    none, ops, blocks = (alive_after_forward(how) for how in ("none", "ops", "blocks"))
    assert blocks[0] < 0.4 * none[0]
    assert blocks[0] < ops[0] < 0.8 * none[0]
    assert blocks[1] < 0.55 * none[1]
    assert ops[1] < 0.85 * none[1]


@pytest.mark.parametrize("how", HOWS)
def test_nothing_stays_alive_without_the_garbage_collector(how: str) -> None:
    model = made(lambda: Block(drop="torch"))
    batch = points()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with recomputed(model, how), Alive() as alive:
        total = loss_of(model, batch)
        total.backward()
        del total
        assert alive.now == 0
        loss_of(model, batch)  # a forward pass whose backward pass never comes
        assert alive.now == 0


def products_run(how: str, **block: Any) -> int:
    """Products of matrices in a forward and backward pass."""
    model = made(lambda: Plain(**block))
    seen = 0

    class Count(Alive):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal seen
            seen += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    with recomputed(model, how), Count():
        loss_of(model, points()).backward()
    return seen


@pytest.mark.parametrize("drop", ["none", "torch"])
def test_no_product_runs_that_nobody_needs(drop: str) -> None:
    """The last product of a block is not run again, whatever dropout stands behind it; with "ops" none is."""
    plain = products_run("none", drop=drop)
    assert products_run("ops", drop=drop) == plain
    assert products_run("blocks", drop=drop) == plain + 3  # one of two products in each of three blocks


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("mode", ["evaluation", "without gradients"])
def test_only_training_with_gradients_recomputes(mode: str, how: str) -> None:
    model = made()
    if mode == "evaluation":
        model.eval()
    shapes: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return x

    counts = []
    for one in ("none", how):
        with (
            recomputed(model, one),
            torch.set_grad_enabled(mode == "evaluation"),
            saved_tensors_hooks(pack, lambda x: x),
        ):
            model(points()["x"])
        counts.append(len(shapes))
    assert counts[1] == 2 * counts[0]


# ---------------------------------------------------------------------- blocks of all kinds


class Odd(nn.Module):
    """Keyword and other arguments, nested tensors; a tuple comes back, one part of it from no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, state: dict[str, Any], *, scale: float, mask: Tensor | None = None) -> Any:
        y = self.drop(torch.tanh(self.a(x) * scale)) + state["more"][0]
        y = y if mask is None else y.masked_fill(mask, 0)
        return self.b(y), {"more": [torch.sin(y)]}


class OddNet(Net):
    def __init__(self) -> None:
        super().__init__(Odd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        state = {"more": [x.sin()]}
        for k, block in enumerate(self.blocks):
            x, state = block(x, state, scale=1.5, mask=x > 1 if k else None)
        return self.head(x + state["more"][0])


class Shared(Net):
    """One block, called as often as there are blocks; its dropout is keyed."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in [self.blocks[0], *self.blocks, self.blocks[0]]:
            x = block(x)
        return self.head(x)


class Inner(Block):
    """A block that checkpoints by itself."""

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        return torch.sin(checkpoint(super().forward, torch.cos(x), use_reentrant=False))


class Penalty(Block):
    """A block that differentiates in its forward pass."""

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        y = super().forward(x).tanh()
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y + slope


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["odd", "inner", "penalty", "frozen"])
def test_blocks_of_all_kinds(name: str, how: str) -> None:
    torch.manual_seed(0)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "odd": OddNet,
        "inner": lambda: Net(lambda: Inner(drop="torch")),
        "penalty": lambda: Net(lambda: Penalty(drop="none")),
        "frozen": lambda: Net(lambda: Block(drop="torch")),
    }
    model = kinds[name]()
    if name == "frozen":
        model.first.requires_grad_(False)
        model.blocks[0].requires_grad_(False)  # type: ignore[union-attr]
    assert_same(gradients(model, how), gradients(model, "none"))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("drop", ["torch", "keyed"])
def test_a_block_that_is_called_several_times(drop: str, how: str) -> None:
    torch.manual_seed(0)
    model = Shared(lambda: Block(drop=drop))
    streams = Streams(0, "cpu", by_sample=True)
    connect(model, streams)
    found = []
    for one in (how, "none"):
        streams.begin(0, 0, 0, 16)
        found.append(gradients(model, one))
    assert_same(*found)


def test_one_block_under_two_names_is_run_again_once() -> None:
    model = made()
    model.blocks[2] = model.blocks[0]
    assert list(repeated_blocks(model)) == ["blocks.0", "blocks.1"]
    assert_same(gradients(model, "blocks"), gradients(model, "none"))


@pytest.mark.parametrize("how", HOWS)
def test_a_graph_that_is_retained_can_be_used_twice(how: str) -> None:
    model = made(lambda: Block(drop="torch"))
    found = []
    for one in (how, "none"):
        with recomputed(model, one):
            torch.manual_seed(3)
            total = loss_of(model, points())
            for p in model.parameters():
                p.grad = None
            total.backward(retain_graph=True)
            total.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_same(*found)


@pytest.mark.parametrize("how", HOWS)
def test_gradients_of_gradients(how: str) -> None:
    model = made()

    def forward() -> Tensor:
        x = points()["x"].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        return slope.square().sum()

    assert_same(gradients(model, how, forward), gradients(model, "none", forward))


@pytest.mark.parametrize("how", HOWS)
def test_a_backward_pass_under_another_autocast(how: str) -> None:
    """The second run computes in the precision of the first, whatever is on when the backward pass runs."""
    model = made(lambda: Block(drop="torch"))

    def run(one: str) -> list[Tensor]:
        with recomputed(model, one):
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = loss_of(model, points())
            full = loss_of(model, points())
            with torch.autocast("cpu", dtype=torch.float16):
                return list(torch.autograd.grad(half + full, list(model.parameters())))

    assert_same(run(how), run("none"))


# ---------------------------------------------------------------------- the model stays what it was


def test_names_modes_hooks_and_access_stay() -> None:
    model = made()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    calls: list[str] = []
    model.blocks[1].register_forward_hook(lambda module, args, output: calls.append("after"))
    model.blocks[1].register_forward_pre_hook(lambda module, args: calls.append("before"))
    made_ = recompute(model, "blocks")
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    assert model.blocks[1].up.weight is dict(model.named_parameters())["blocks.1.up.weight"]
    loss_of(model, points()).backward()
    assert calls == ["before", "after"]
    assert made_.idle() == []
    made_.release()
    assert set(model.blocks[0].__dict__) == set(Block().__dict__)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_recomputes_with_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = made(lambda: Block(drop="torch"))
    wanted = gradients(model, "none")
    with recomputed(model, "blocks"):
        twin = copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert twin.blocks[0].__dict__["forward"].module is twin.blocks[0]  # type: ignore[index]
    torch.manual_seed(3)
    loss_of(twin, points()).backward()
    for p, want in zip(twin.parameters(), wanted):
        assert p.grad is not None and torch.equal(p.grad, want)


def test_a_replica_runs_its_own_forward_function() -> None:
    """What nn.DataParallel does on each device."""
    model = made()
    with recomputed(model, "blocks"):
        replica = model.blocks[0]._replicate_for_data_parallel()
        replica._modules = dict(model.blocks[1]._modules)
        x = torch.randn(4, 8)
        assert torch.equal(replica(x), model.blocks[1](x))
        assert not torch.equal(replica(x), model.blocks[0](x))


def test_a_forward_function_of_the_instance_comes_back() -> None:
    model = made()
    mine = model.blocks[0].forward
    model.blocks[0].forward = lambda x: 2 * mine(x)  # type: ignore[method-assign]
    theirs = model.blocks[0].__dict__["forward"]
    wanted = loss_of(model, points())
    with recomputed(model, "blocks"):
        assert torch.equal(loss_of(model, points()), wanted)
    assert model.blocks[0].__dict__["forward"] is theirs


def test_a_run_takes_it_off_again() -> None:
    import thalweg

    model = made()
    recipe = {"train.steps": 2, "train.batch": 8, "precision": "fp32", "recompute": "blocks", "evaluate.every": 0}
    result = thalweg.train(model, loss_of, points(), recipe)
    assert not any("forward" in module.__dict__ for module in result.model.modules())
    told = [decision for decision in result.plan.decisions if "recompute" in decision.path]
    assert "3 Block, blocks.0 to blocks.2" in str(told[0].value)


def test_training_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from tests.test_recompute import made, gradients\n"
        "for how in ('blocks', 'ops'): gradients(made(), how)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


# ---------------------------------------------------------------------- finding blocks


def test_blocks_of_known_models(timm_models: Callable[[str], Any]) -> None:  # noqa: F811
    vit = timm_models("vision_transformer").VisionTransformer(embed_dim=16, depth=3, num_heads=2)
    assert list(repeated_blocks(vit)) == ["blocks.0", "blocks.1", "blocks.2"]
    resnet = timm_models("resnet")
    found = list(repeated_blocks(resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2])))
    assert found == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    swin = timm_models("swin_transformer").SwinTransformer(embed_dim=8, depths=(2, 1), num_heads=(2, 2))
    assert list(repeated_blocks(swin)) == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]


class Stage(nn.Module):
    """Blocks behind each other, as Swin and ConvNeXt have them: four stages, and blocks in each."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))


def test_blocks_of_stages_count_and_not_the_stages() -> None:
    class Net50(nn.Module):
        """As a ResNet has them: a Sequential for each stage, some with one block."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.layer1, self.layer2 = nn.Sequential(Block()), nn.Sequential(Block(), nn.ReLU(), Block())

    assert list(repeated_blocks(nn.Sequential(Stage(), Stage()))) == [f"{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
    assert list(repeated_blocks(Net50())) == ["layer1.0", "layer2.0", "layer2.2"]


def test_experts_and_wrappers() -> None:
    class Expert(nn.Sequential):
        pass

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    model = nn.Sequential(Mixture(), Mixture())
    assert list(repeated_blocks(model)) == ["0", "1"]
    assert list(repeated_blocks(nn.DataParallel(model))) == ["module.0", "module.1"]
    assert list(repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == []


def test_transformers_gpt2_with_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, 11, (2, 8))

    def forward(cached: bool) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=cached).loss
        return loss

    assert list(repeated_blocks(model)) == [f"transformer.h.{k}" for k in range(3)]
    for how in HOWS:
        plain = lambda: forward(False)
        assert_same(gradients(model, how, plain), gradients(model, "none", plain))
        # A cache lies in memory in another way the second time, and on some processors products round by that.
        cached = lambda: forward(True)
        for mine, theirs in zip(gradients(model, how, cached), gradients(model, "none", cached), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------- compiled


def compiled_run(how: str, *, whole: bool) -> tuple[int, list[Tensor]]:
    """(bytes saved by autograd but for parameters, gradients) of a compiled model; ``whole``: changed after it was compiled."""
    torch._dynamo.reset()
    model = made(lambda: Plain(32), width=32)
    compiled: Any = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with recomputed(compiled if whole else model, how):
        with saved_tensors_hooks(pack, lambda x: x):
            total = loss_of(compiled, points(256))
        total.backward()
    kept = sum(size for place, size in sizes.items() if place not in own)
    return kept, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at every input's
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, when inductor is imported
@pytest.mark.parametrize(("how", "most"), [("compiled", 0.6), ("blocks", 0.4), ("ops", 0.8)])
def test_a_compiled_model_keeps_less(how: str, most: float) -> None:
    plain, wanted = compiled_run("none", whole=True)
    kept, found = compiled_run(how, whole=how == "compiled")
    assert kept < most * plain
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at every input's
def test_a_module_that_was_compiled_in_place_keeps_its_call() -> None:
    model = made()
    model.blocks[1].compile(backend="eager")
    call = model.blocks[1]._compiled_call_impl
    with recomputed(model, "compiled") as changed:
        assert list(changed.places) == ["blocks.1"]
        loss_of(model, points()).backward()
        assert changed.idle() == []
    assert model.blocks[1]._compiled_call_impl is call


# ---------------------------------------------------------------------- refused


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        self.seen += 1
        return super().forward(x) * self.seen


class Changing(Block):
    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        y = super().forward(x)
        with torch.no_grad():
            x.mul_(2)
        return y


class Growing(Block):
    """Its second run has another shape than its first."""

    def __init__(self) -> None:
        super().__init__()
        self.past: list[Tensor] = []

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        self.past.append(x.detach())
        return super().forward(torch.cat([x, *self.past]))[: len(x)]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [(Counting, "buffer 'seen'"), (Changing, "changed in place"), (Growing, "The second time it saved")],
)
def test_what_would_be_another_run_is_refused(kind: Callable[[], nn.Module], numbers: str, how: str) -> None:
    model = made(kind)
    with recomputed(model, how), pytest.raises(ModelError, match=r"The block 'blocks\.[02]'") as caught:
        loss_of(model, points()).backward()
    assert numbers in caught.value.numbers
    assert "recompute='none'" in caught.value.remedy


def test_a_model_without_blocks_is_refused_before_any_work() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for how in HOWS:
        with pytest.raises(ModelError, match="no repeated blocks") as caught:
            make_step(model, loss_of, points(), recompute=how)
        assert "nn.ModuleList" in caught.value.numbers and "Linear, ReLU" in caught.value.numbers


def test_blocks_that_are_never_called_are_refused() -> None:
    class Apart(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block.down(block.up(block.norm(x)))
            return self.head(x)

    with pytest.raises(ModelError, match="never calls its blocks") as caught:
        make_step(Apart(), loss_of, points(), recompute="blocks")
    assert "3 of 3" in caught.value.numbers


def test_twice_is_refused_and_an_unknown_word_too() -> None:
    model = made()
    with recomputed(model, "blocks"), pytest.raises(ModelError, match="recomputes already"):
        recompute(model, "ops")
    with pytest.raises(ModelError, match="not compiled"):
        recompute(model, "compiled")
    with pytest.raises(RecipeError, match="recompute"):
        make_step(model, loss_of, points(), recompute="some")
