"""Layers that ranks compute together: the same run as on one rank, its checkpoints, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import three_parts
from tests.models import small_gpt
from tests.ranks_cases import text_task, train
from tests.tensor_cases import BOTH, CASES, PLAN, SAVED, Between
from tests.test_ranks import close, four  # noqa: F401  (a fixture)
from thalweg.core import Layout, ModelError, Recipe, RecipeError
from thalweg.engine.layout import check_layout
from thalweg.engine.tensor_plan import CutPiece, tensor_cuts


@pytest.mark.parametrize("name", list(CASES))
def test_cut_layers_are_the_same_run(name: str, four: Any) -> None:  # noqa: F811
    wanted = train(text_task(), CASES[name][1])
    assert len(set(wanted["losses"])) == len(wanted["losses"]) > 1
    found = [ranks["tensor"][name] for ranks in four[0] if ranks["tensor"][name]]
    assert len(found) == (4 if CASES[name][0] is BOTH else 2)
    close(found[0], wanted)
    assert len({one["digest"] for one in found}) == 1, "all ranks hold the same bits"
    assert any(norm > 0.3 for norm in wanted["norms"]), "the gradient is clipped by a norm over all parts"


def test_a_run_goes_on_in_one_process_and_the_other_way_round(four: Any, tmp_path: Path) -> None:  # noqa: F811
    ranks, folder = [found["tensor"] for found in four[0]], four[1]
    whole, alone = ranks[0]["cut"], ranks[0]["alone"]
    close(whole, alone)
    shutil.copytree(folder / "cut", tmp_path / "cut")
    again = train(text_task(), SAVED, tmp_path / "cut", resume=3)
    for resumed in (again, *(found["from alone"] for found in ranks)):
        assert resumed["steps"] == [4, 5, 6]
        later = {what: alone[what][3:] for what in ("losses", "norms", "steps", "weight")}
        close({**resumed, "metrics": []}, {**alone, **later, "metrics": []})
    assert ranks[0]["from alone"]["told"] == ["The run began on 1 ranks, and goes on with 4."]


def test_a_step_sends_as_much_whatever_the_accumulation(four: Any) -> None:  # noqa: F811
    for found in four[0]:
        sent = found["tensor"]["collectives", 8]
        assert sent == found["tensor"]["collectives", 2] == {"all_reduce": 5}, (
            "gradients of whole parameters and of parts, what was counted, the squares of parts, and a word between steps"
        )


def test_what_is_refused_and_why(four: Any) -> None:  # noqa: F811
    told, echo = (found["tensor"]["refused"] for found in four[0][:2])
    assert told["own plan"] == echo["own plan"] and len(told["own plan"]) == 2
    for name, words in {
        "dropout": (
            "ModelError: Random numbers are drawn inside layers that are cut",
            "drop (4, 12, 16)",
            "drop (4, 12, 8)",
        ),
        "functional": ("Random numbers are drawn", "(4, 12, 16)", "(4, 12, 8)"),
        "half": ("The model does not run with its layers cut", "", "a colwise layer is followed by a rowwise one"),
        "packed": ("'blocks.0.out' gives other values", "whole", "in parts"),
        "muon": ("is not possible where layers are cut", "reads a parameter's matrix", "parallel='fsdp'"),
        "int8": ("is not possible where layers are cut", "for each block", "full slots"),
    }.items():
        assert all(word in told[name] for word in words), (name, told[name])
        assert words[0].removeprefix("ModelError: ") in echo[name]


# ------------------------------------------------------------------------------------ without ranks


@pytest.mark.parametrize(("shape", "dim", "packs"), [((12, 4), 0, 1), ((12, 4), 0, 3), ((12,), 0, 3), ((6, 8), 1, 1)])
def test_parts_and_wholes(shape: tuple[int, ...], dim: int, packs: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    piece = CutPiece(shape, 2, dim, packs)
    parts = [piece.mine(whole, rank) for rank in range(2)]
    assert all(part.shape == piece.size for part in parts)
    assert torch.equal(piece.together(parts), whole)
    runs = whole.chunk(packs, 0)
    for rank, part in enumerate(parts):
        wanted = [run.chunk(2, dim)[rank] for run in runs]
        assert torch.equal(part, torch.cat(wanted)), "of each run, this rank's share"


def cuts_of(model: nn.Module, world: int = 2, **plan: str) -> Any:
    return tensor_cuts(model, Recipe().override({"tensor_plan": plan}), world)


def test_plans_of_models() -> None:
    gpt = {cut.name: (cut.dim, cut.packs, cut.gathers) for cut in cuts_of(small_gpt())}
    assert gpt["blocks.1.qkv"] == (0, 3, False) and gpt["blocks.0.down"] == (1, 1, False) and len(gpt) == 8
    told: list[tuple[str, Any, str]] = []
    tensor_cuts(small_gpt(), Recipe(), 2, lambda *words: told.append(words))
    assert told == [("tensor_plan", "head", "stays whole: 17 features that it gives are no multiple of 2")]
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    found = cuts_of(llama)
    assert len(found) == 2 * 7 + 1 and found[-1].name == "lm_head" and found[-1].gathers
    with pytest.raises(ModelError) as err:
        cuts_of(llama, 4)
    assert "num_key_value_heads=2" in three_parts(err.value)[1]


@pytest.mark.parametrize(
    ("model", "world", "plan", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), 2, {}, ("does not say which", "has no tp_plan", "tensor_plan = {")),
        (lambda: Between(0.0), 2, {"upp": "colwise"}, ("names 'upp'", "modules", "Did you mean up?")),
        (lambda: Between(0.0), 2, {"up": "columns"}, ("'up' = 'columns' is not known", "colwise:3", "tensor_plan")),
        (lambda: Between(0.0), 2, {"down": "rowwise:2"}, ("'rowwise:2' is not known", "colwise:3", "tensor_plan")),
        (lambda: Between(0.0), 2, {"tokens": "colwise"}, ("'tokens' cannot be cut", "It is a Embedding", "leave the layer")),
        (lambda: Between(0.0), 3, PLAN, ("'up' cannot be cut in 3 parts", "16 features that it gives are no mul", "divides")),
        (lambda: Between(0.0), 3, {"down": "rowwise"}, ("'down'", "16 features that it takes are no multiple of 3", "")),
        (lambda: Between(0.0), 2, {"head": "colwise_rep"}, ("cuts no layer", "1 patterns", "tensor_plan")),
        (lambda: small_gpt(), 4, {}, ("parallel.tensor=4 does not divide the heads", "heads=2; 2 / 4 = 0.50", "divides 2")),
    ],
)  # fmt: skip
def test_plans_that_do_not_go_with_a_model(model: Any, world: int, plan: Any, words: tuple[str, str, str]) -> None:
    with pytest.raises((ModelError, RecipeError)) as err:
        cuts_of(model(), world, **plan)
    for part, word in zip(three_parts(err.value), words):
        assert word in part


def test_a_weight_that_is_anothers_too_is_not_cut() -> None:
    model = Between(0.0)
    model.head.weight = model.tokens.weight
    told: list[Any] = []
    tensor_cuts(
        model, Recipe().override({"tensor_plan": {**PLAN, "head": "colwise_rep"}}), 2, lambda *words: told.append(words)
    )
    assert told == [("tensor_plan", "head", "stays whole: its weight is another layer's too")]
    model.down.weight = nn.Parameter(torch.zeros(16, 8).t())
    other = nn.Linear(16, 8)
    other.weight = model.down.weight
    model.other = other
    with pytest.raises(ModelError) as err:
        cuts_of(model, **PLAN)
    assert "another layer's too" in three_parts(err.value)[1]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"parallel": {"shard": 2, "tensor": 2}}, "shard=2"),
        ({"exact_reduce": True}, "exact_reduce=true"),
        ({"regularize.sharpness": 0.1}, "regularize.sharpness"),
        ({"regularize.precise": 2}, "regularize.precise"),
        ({"regularize.average_form": "window"}, "average_form='window'"),
        ({"regularize.penalties": {"l1": 1e-3}}, "regularize.penalties"),
        ({"recompute": "blocks"}, "recompute='blocks'"),
        ({"precision": "bf16-pure"}, "precision='bf16-pure'"),
        ({"memory_budget": "1GiB"}, "memory_budget"),
        ({"train.micro_batch": "auto"}, "train.micro_batch='auto'"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_cut_layers(changes: Any, word: str) -> None:
    recipe = Recipe().override({"parallel": {"tensor": 2}, **changes})
    shard = recipe.parallel.get("shard", 1) if isinstance(recipe.parallel, dict) else 1
    with pytest.raises(RecipeError) as err:
        check_layout(Layout(data=2, shard=shard, tensor=2), recipe)
    asked, numbers, remedy = three_parts(err.value)
    assert word in asked and "2 ranks compute each layer together" in numbers and remedy.startswith("Use ")
    check_layout(Layout(data=2, tensor=2), Recipe().override({"parallel": {"tensor": 2}}))
    check_layout(Layout(data=4), recipe)
