"""Which rule, rate and decay each parameter gets: patterns, groups, depths, and names from other people's models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thalweg
from tests.conftest import three_parts
from tests.models import assert_same_bits, ragged_text, small_gpt, text_loss
from thalweg.checkpoint import Snapshot
from thalweg.core import ParameterRow, Recipe, RecipeError
from thalweg.optim import parameter_table
from thalweg.optim.batch import matrix_shape
from thalweg.rules import RULES


def table(model: nn.Module, **optimizer: Any) -> dict[str, ParameterRow]:
    """Rows by name; the recipe's rate is 0.01."""
    recipe = Recipe().override({f"optimizer.{k}": v for k, v in {"lr": 0.01, "weight_decay": 0.1, **optimizer}.items()})
    return {row.name: row for row in parameter_table(model, optimizer=recipe.optimizer)}


# ---------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    "pattern,hit",
    [
        ("head.weight", {"head.weight"}),
        ("blocks.*.up.bias", {"blocks.0.up.bias", "blocks.1.up.bias"}),
        ("type:Embedding", {"tokens.weight", "positions.weight"}),
        ("shape:17x16", {"tokens.weight", "head.weight"}),
        ("shape:48x*", {"blocks.0.qkv.weight", "blocks.1.qkv.weight"}),
    ],
)
def test_patterns_of_names_types_and_shapes(pattern: str, hit: set[str]) -> None:
    rows = table(small_gpt(), groups={pattern: {"lr_scale": 0.5}})
    assert {name for name, row in rows.items() if row.lr == 0.5} == hit
    assert {row.lr for name, row in rows.items() if name not in hit} == {1.0}


def test_pattern_of_dimensions() -> None:
    rows = table(small_gpt(), groups={"ndim:1": {"lr_scale": 0.5}})
    assert all((row.lr == 0.5) == (len(row.shape) == 1) for row in rows.values())


@pytest.mark.parametrize(
    "groups,words",
    [
        ({"heads.*": {"lr": 1.0}}, ("heads.*", "no parameter matches")),
        ({"type:Conv2d": {"lr": 1.0}}, ("type:Conv2d", "no parameter matches")),
        ({"kind:Linear": {"lr": 1.0}}, ("kind:", "no kind of pattern")),
        ({"head.*": {"lr": 1.0}, "ndim:2": {"lr": 2.0}}, ("Two groups", "'head.*' and 'ndim:2'")),
        ({"head.*": {"learning_rate": 1.0}}, ("learning_rate", "no key")),
        ({"head.*": {"lr": -1.0}}, ("lr=-1.0", "not possible")),
        ({"head.*": {"lr": True}}, ("lr=True", "not possible")),
        ({"head.*": {"weight_decay": "much"}}, ("weight_decay", "not possible")),
        ({"head.*": {"options": 0.9}}, ("options", "not possible")),
        ({"head.*": {"fold": "roll"}}, ("fold", "not possible")),
        ({"head.*": 0.1}, ("is a table", "0.1")),
        ({"head.*": {"rule": "adamm"}}, ("adamm", "adam")),
        ({"head.*": {"options": {"b9": 0.1}}}, ("b9", "b1")),
        ({"ndim:1": {"rule": "muon"}}, ("muon", "1 dimensions")),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(groups: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        table(small_gpt(), groups=groups)
    text = " ".join(three_parts(caught.value))
    assert all(word in text for word in words), text


def test_rates_of_groups_are_factors_on_the_recipes() -> None:
    rows = table(
        small_gpt(),
        groups={
            "head.*": {"lr": 0.002},
            "tokens.*": {"lr_scale": 3.0},
            "positions.*": {"lr": 0.002, "lr_scale": 3.0},
            "type:LayerNorm": {"rule": "lion"},
            "blocks.*.qkv.*": {"rule": "lion", "lr": 0.05, "options": {"b2": 0.5}, "weight_decay": 0.3},
        },
    )
    assert rows["head.weight"].lr == pytest.approx(0.2)
    assert rows["tokens.weight"].lr == 3.0
    assert rows["positions.weight"].lr == pytest.approx(0.6)
    assert rows["norm.weight"].lr == pytest.approx(RULES["lion"].lr / 0.01), "another rule has its own rate"
    qkv = rows["blocks.0.qkv.weight"]
    assert (qkv.rule, qkv.lr, qkv.options, qkv.weight_decay) == ("lion", pytest.approx(5.0), {"b2": 0.5}, 0.3)
    assert qkv.rule_reason == qkv.decay_reason == "matches 'blocks.*.qkv.*'"


def test_a_group_can_decay_what_is_exempt_and_exempt_what_decays() -> None:
    rows = table(small_gpt(), groups={"head.*": {"weight_decay": 0.0}, "norm.*": {"weight_decay": 0.2}})
    assert not rows["head.weight"].decays and rows["norm.weight"].decays
    assert rows["norm.weight"].weight_decay == 0.2


def test_a_rate_of_zero_cannot_be_scaled() -> None:
    with pytest.raises(RecipeError, match="lr=0") as caught:
        table(small_gpt(), lr=0.0, groups={"head.*": {"lr": 0.1}})
    three_parts(caught.value)


# ---------------------------------------------------------------------- what never decays


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class LayerScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, size))


class WideNorm(nn.GroupNorm):
    """A group normalization with a gain of two dimensions; its class says what it is."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.weight = nn.Parameter(torch.ones(4, 1))


class Gains(nn.Module):
    """The same gain in a class whose name says nothing: it cannot be told from a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(3, 4, 5))
        self.up_bias = nn.Parameter(torch.ones(3, 5))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_like = LlamaRMSNorm(4)
        self.scale = LayerScale(4)
        self.wide = WideNorm()
        self.unknown = Gains()
        self.experts = Experts()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 4)


def test_gains_and_biases_never_decay_by_default() -> None:
    rows = table(Zoo())
    assert {name for name, row in rows.items() if row.decays} == {
        "unknown.gain",
        "experts.up",
        "conv.weight",
        "linear.weight",
    }
    assert "normalization" in rows["scale.gamma"].decay_reason and "bias" in rows["experts.up_bias"].decay_reason
    assert not table(Zoo(), groups={"unknown.*": {"weight_decay": 0.0}})["unknown.gain"].decays, "said by hand"


TOKENS = (
    "cls_token",
    "pos_embed",
    "class_embedding",
    "dist_token",
    "reg_token",
    "mask_token",
    "relative_position_bias_table",
    "positional_embedding",
)


class Named(nn.Module):
    """Positions and tokens as timm, Hugging Face, torchvision and CLIP name them."""

    def __init__(self) -> None:
        super().__init__()
        for name in TOKENS:
            setattr(self, name, nn.Parameter(torch.zeros(1, 3, 4)))
        self.wpe, self.wte = nn.Embedding(5, 4), nn.Embedding(9, 4)
        self.embeddings = nn.Module()
        self.embeddings.position_embeddings = nn.Embedding(5, 4)
        self.embeddings.word_embeddings = nn.Embedding(9, 4)
        self.attention = nn.Module()
        self.attention.relative_attention_bias = nn.Embedding(8, 2)
        self.class_embed = nn.Linear(4, 3)
        self.position_mlp = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4))
        self.composition = nn.Linear(4, 4)
        self.expose = nn.Linear(4, 4)


def test_positions_and_tokens_never_decay_whoever_named_them() -> None:
    rows = table(Named())
    kept = {name for name, row in rows.items() if row.decay_reason == "a positional, class or mask token"}
    assert kept == {
        *TOKENS,
        "wpe.weight",
        "embeddings.position_embeddings.weight",
        "attention.relative_attention_bias.weight",
    }
    assert all(rows[name].decays for name in ("class_embed.weight", "position_mlp.0.weight", "composition.weight"))
    assert (
        rows["wte.weight"].decays and rows["embeddings.word_embeddings.weight"].decays and rows["expose.weight"].decays
    )


def test_tied_weights_are_one_row_under_every_wrapper() -> None:
    model = small_gpt()
    model.head.weight = model.tokens.weight
    plain = table(model, layer_decay=0.5, rule="muon")
    assert "head.weight" not in plain and plain["tokens.weight"].rule == "adamw"
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        nn.DataParallel(torch.compile(model, backend="eager")),
    ):
        assert table(wrapped, layer_decay=0.5, rule="muon") == plain


# ---------------------------------------------------------------------- depths


class ViT(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(depth)))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)


def depth_of(row: ParameterRow, top: int) -> float:
    return top - torch.log2(torch.tensor(1 / row.lr)).item()


def test_layer_decay_of_a_vision_transformer() -> None:
    rows = table(ViT(), layer_decay=0.5)
    depths = {name: depth_of(row, 4) for name, row in rows.items()}
    assert {depths[name] for name in ("cls_token", "pos_embed", "patch_embed.weight", "patch_embed.bias")} == {0}
    for k in range(3):
        assert {depth for name, depth in depths.items() if name.startswith(f"blocks.{k}.")} == {k + 1}
    assert {depths[name] for name in ("norm.weight", "head.weight", "head.bias")} == {4}


def test_layer_decay_of_a_language_model_multiplies_with_groups() -> None:
    rows = table(small_gpt(), layer_decay=0.5, groups={"tokens.*": {"lr_scale": 4.0}})
    assert rows["tokens.weight"].lr == 4 * 0.5**3 and rows["positions.weight"].lr == 0.5**3
    assert rows["blocks.0.qkv.weight"].lr == 0.25 and rows["blocks.1.qkv.weight"].lr == 0.5
    assert rows["norm.weight"].lr == rows["head.weight"].lr == 1.0


def test_layer_decay_without_blocks_counts_the_models_children() -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(2, 2), nn.Linear(2, 2)
    rows = table(model, layer_decay=0.5)
    assert rows["first.weight"].lr == 0.5 and rows["second.bias"].lr == 1.0


# ---------------------------------------------------------------------- rules of matrices


def test_muon_takes_hidden_matrices_alone() -> None:
    rows = table(small_gpt(), rule="muon", lr=0.02, otherwise_lr=0.001)
    taken = {name for name, row in rows.items() if row.rule == "muon"}
    assert taken == {f"blocks.{k}.{part}.weight" for k in (0, 1) for part in ("qkv", "out", "up", "down")}
    for name, word in (("tokens.weight", "embedding"), ("head.weight", "output"), ("norm.weight", "1 dimensions")):
        assert word in rows[name].rule_reason and rows[name].lr == pytest.approx(0.05)


def test_convolutions_are_folded_flat_and_experts_batched() -> None:
    rows = table(Zoo(), rule="muon")
    fold = {name: matrix_shape(row.shape, row.fold) for name, row in rows.items()}
    assert fold["conv.weight"] == (4, 27) and fold["experts.up"] == (3, 4, 5)
    line = nn.Sequential(nn.Conv1d(3, 4, 5), nn.Linear(4, 4))
    row = table(line, rule="muon")["0.weight"]
    assert matrix_shape(row.shape, row.fold) == (4, 15), "a kernel of three dimensions is one matrix too"
    other = table(Zoo(), rule="muon", groups={"experts.up": {"fold": "flatten"}})["experts.up"]
    assert matrix_shape(other.shape, other.fold) == (3, 20)


def test_the_one_linear_layer_of_a_convolutional_network_is_its_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    rows = table(model, rule="muon")
    assert rows["0.weight"].rule == "muon" and rows["2.weight"].rule == "adamw"
    assert table(nn.Linear(4, 2), rule="muon")["weight"].rule == "muon", "there is nothing else"


# ---------------------------------------------------------------------- from a recipe to weights

RECIPES: dict[str, dict[str, Any]] = {
    **{
        rule: {"optimizer.rule": rule}
        for rule in ("muon", "soap", "adafactor", "prodigy", "schedule_free_adamw", "lion")
    },
    "int8": {"optimizer.rule": "adamw", "optimizer.slots": "int8"},
    "stages": {"optimizer.rule": "muon", "optimizer.stages": {"cautious": {}}, "optimizer.weight_decay": 0.1},
    "layer_decay": {"optimizer.layer_decay": 0.5, "optimizer.groups": {"head.*": {"lr_scale": 2.0}}},
}
#: Rates for a model of 16 channels and 40 steps; the published ones are for others.
RATES = {"lion": 3e-3, "adamw": 1e-2, "soap": 1e-2, "adafactor": 1e-1, "schedule_free_adamw": 2e-2}


def batches() -> list[dict[str, Tensor]]:
    data = ragged_text(32)
    return [{name: values[k : k + 8] for name, values in data.items()} for k in range(0, 32, 8)]


def train_step(name: str) -> thalweg.TrainStep:
    changes = {"schedule.lr": "constant()", "precision": "fp32", "device": "cpu", **RECIPES[name]}
    rule = changes.get("optimizer.rule", "adamw")
    if rule in RATES:
        changes["optimizer.lr"] = RATES[rule]
    if rule == "prodigy":
        changes["optimizer.options"] = {"d0": 1e-3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = small_gpt()
    return thalweg.TrainStep(model, text_loss, changes)


def bits(snapshot: Snapshot) -> dict[str, Tensor]:
    return {f"{group}/{name}": t.clone() for group, tensors in snapshot.groups.items() for name, t in tensors.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_and_resume_to_the_bit(name: str) -> None:
    step, losses = train_step(name), []
    half: Snapshot | None = None
    for number in range(40):
        if number == 15:
            found = step.snapshot()
            half = Snapshot(
                {g: {n: t.clone() for n, t in mine.items()} for g, mine in found.groups.items()}, found.facts
            )
        losses.append(float(step(batches()[number % 4]).loss))
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4]), losses
    assert half is not None
    again = train_step(name)
    again.load(half, batches()[0])
    for number in range(15, 40):
        again(batches()[number % 4])
    assert_same_bits(bits(step.snapshot()), bits(again.snapshot()))
