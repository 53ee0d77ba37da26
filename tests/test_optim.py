"""The parameter table, the arena, and the faces for anyone's loop."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import thalweg
from tests.conftest import three_parts
from thalweg.core import ModelError, ParameterRow, Recipe, RecipeError
from thalweg.core.recipe import DECAY_FORMS, SLOT_FORMS
from thalweg.optim import Arena, make_arenas, named_trainable, parameter_table, plain_name
from thalweg.optim.arena import How
from thalweg.optim.codecs import CODECS
from thalweg.rules import DECAYS
from thalweg.rules.schedule_free import evaluation_weights


class RMSNorm1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 4))


class Odd(nn.Module):
    """Names and shapes that peers decay by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm1 = RMSNorm1()
        self.group = nn.GroupNorm(2, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.position = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 11)
        self.head.weight = self.embed.weight  # tied


def decaying(model: nn.Module, *no_decay: str) -> set[str]:
    return {row.name for row in parameter_table(model, no_decay or ("bias", "norm", "1d")) if row.decays}


def test_default_table_decays_matrices_alone() -> None:
    assert decaying(Odd()) == {"embed.weight", "conv.weight"}
    assert decaying(Odd(), "bias", "norm", "1d", "embedding") == {"conv.weight"}
    assert decaying(Odd(), "conv.*", "1d") == {"embed.weight", "norm1.gain"}


def test_tied_weights_count_once_and_wrappers_do_not_rename() -> None:
    names = [name for name, _ in named_trainable(torch.compile(Odd(), backend="eager"))]
    assert names.count("embed.weight") == 1 and "head.weight" not in names
    assert all("_orig_mod" not in name for name in names)
    assert plain_name("module._orig_mod.a.b") == "a.b"


def test_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="heads") as caught:
        parameter_table(Odd(), ("bias", "heads.*"))
    three_parts(caught.value)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ModelError) as caught:
        named_trainable(nn.Linear(2, 2).requires_grad_(False))
    assert "2 parameters, 0 of them" in three_parts(caught.value)[1]


def arena_of(model: nn.Module, **how: object) -> Arena:
    optimizer = Recipe().override({"optimizer.weight_decay": 0.1}).optimizer
    rows = parameter_table(model, optimizer=optimizer)
    return make_arenas(named_trainable(model), rows, optimizer, How(average=True, **how))[0]  # type: ignore[arg-type]


def test_arena_keeps_values_strides_and_alignment() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 3), nn.Linear(1, 1)).to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    strides = {name: p.stride() for name, p in model.named_parameters()}
    arena = arena_of(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.stride() == strides[name]
        assert p.untyped_storage().data_ptr() == arena.params.untyped_storage().data_ptr()
        assert arena.places[name][0] * 4 % 1024 == 0
        assert p.grad is not None and p.grad.stride() == p.stride()
    assert model[0].weight.stride()[1] == 1, "channels-last is kept"


def test_arena_gradients_come_back_when_replaced() -> None:
    model = nn.Linear(3, 2)
    arena = arena_of(model)
    model.zero_grad(set_to_none=True)
    model(torch.ones(1, 3)).sum().backward()
    arena.hold_gradients()
    assert arena.view(arena.grads, "weight").eq(1).all() and model.weight.grad is not None
    assert model.weight.grad.untyped_storage().data_ptr() == arena.grads.untyped_storage().data_ptr()


def test_scalar_empty_and_strided_parameters_live_in_an_arena() -> None:
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(2.0))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.strided = nn.Parameter(torch.arange(12.0).view(3, 4)[:, ::2])
    arena = arena_of(model)
    assert torch.equal(model.strided, torch.arange(12.0).view(3, 4)[:, ::2]) and model.scalar.eq(2)
    assert arena.params.numel() == 512, "blocks of 256 for the scalar and the strided one"


FACES = [thalweg.optim.SGD, thalweg.optim.Adam, thalweg.optim.AdamW]
each_face = pytest.mark.parametrize("face", FACES, ids=lambda f: f.__name__)


def train_a_little(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=draw)).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@each_face
def test_face_equals_torch(face: type[torch.optim.Optimizer]) -> None:
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.05, "weight_decay": 0.1}
    if face is thalweg.optim.SGD:
        options["momentum"] = 0.9
    train_a_little(ours, face(ours.parameters(), **options))
    train_a_little(theirs, getattr(torch.optim, face.__name__)(theirs.parameters(), **options))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


@each_face
def test_face_state_dict_pickle_and_deepcopy_go_on_to_the_bit(face: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(4, 3)
    optimizer = face(model.parameters(), lr=0.05)
    train_a_little(model, optimizer)
    copies = []
    for way in ("state_dict", "pickle", "deepcopy"):
        twin = copy.deepcopy(model)
        if way == "state_dict":
            other = face(twin.parameters(), lr=0.05)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            both = (
                pickle.loads(pickle.dumps((model, optimizer))) if way == "pickle" else copy.deepcopy((model, optimizer))
            )
            twin, other = both
        copies.append((twin, other))
    train_a_little(model, optimizer, seed=1)
    for twin, other in copies:
        train_a_little(twin, other, seed=1)
        assert torch.equal(weights(twin), weights(model))


@each_face
def test_face_counts_updates_by_parameter(face: type[torch.optim.Optimizer]) -> None:
    """A parameter that joins late begins its own bias correction, as if its optimizer were new."""
    late, fresh = (nn.Parameter(torch.ones(3)) for _ in range(2))
    early = nn.Parameter(torch.ones(3))
    both, alone = face([early, late], lr=0.1), face([fresh], lr=0.1)
    for step in range(4):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if step >= 2 else None
        both.step()
    for _ in range(2):
        fresh.grad = torch.ones(3)
        alone.step()
    assert torch.equal(late, fresh)


def test_face_takes_closures_groups_hooks_and_tensor_rates() -> None:
    model = nn.Linear(4, 3)
    optimizer = thalweg.optim.AdamW([{"params": [model.weight], "lr": 0.0}], lr=torch.tensor(0.1), betas=(0.8, 0.9))
    optimizer.add_param_group({"params": [model.bias]})
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    before = model.weight.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0 and seen == [1]
    assert torch.equal(model.weight, before), "its group has rate 0"
    assert optimizer.param_groups[1]["b1"] == 0.8


def test_face_works_with_torch_schedulers_and_grad_scaler() -> None:
    model = nn.Linear(4, 3)
    optimizer = thalweg.optim.SGD(model.parameters(), lr=1.0)
    schedule = thalweg.optim.scheduler(optimizer, "warmup(2) >> linear(to=0.5)", steps=4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        schedule.step()
    assert rates == [0.5, 1.0, 0.75, 0.5]
    scaler, before = torch.amp.GradScaler("cpu"), model.weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(model(torch.full((1, 4), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before) and scaler.get_scale() == 2.0**15


def test_face_refuses_what_it_would_get_wrong() -> None:
    with pytest.raises(ModelError, match="complex"):
        thalweg.optim.AdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ModelError, match="sparse"):
        thalweg.optim.AdamW(embedding.parameters()).step()
    with pytest.raises(RecipeError, match="Did you mean"):
        thalweg.optim.SGD([nn.Parameter(torch.ones(2))], momentun=0.9)


def test_rows_are_plain_values() -> None:
    rows = parameter_table(nn.Linear(2, 3), ("bias",))
    why = {"rule": "adamw", "rule_reason": "the recipe's rule"}
    assert rows == (
        ParameterRow("weight", (3, 2), True, "2 dimensions", **why),
        ParameterRow("bias", (3,), False, "a bias", **why),
    )


@pytest.mark.parametrize("how", [{}, {"average": 0.9}], ids=["its own", "kept average"])
def test_averaged_holds_what_to_evaluate(how: dict[str, float]) -> None:
    """Schedule-free rules have weights of their own to ship; a kept average goes before them."""
    p = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = thalweg.optim.ScheduleFreeAdamW([p], lr=0.1, **how)
    for k in range(3):
        p.grad = torch.full_like(p, k - 0.5)
        optimizer.step()
    live, state = p.detach().clone(), optimizer.state[p]
    wanted = state["average"] if how else evaluation_weights(live, state["schedule_free.z"], 0.9)
    again = thalweg.optim.ScheduleFreeAdamW([p], **how)
    again.load_state_dict(optimizer.state_dict())
    for one in (optimizer, again):
        with one.averaged():
            assert torch.equal(p, wanted) and not torch.equal(p, live)
        assert torch.equal(p, live)


def test_recipes_name_the_forms_that_are_there() -> None:
    """Recipes know neither torch nor the rules, and name what these have once more."""
    assert set(DECAY_FORMS) == set(DECAYS)
    assert set(SLOT_FORMS) == set(CODECS)


def test_positions_and_tokens_are_no_hidden_matrices() -> None:
    """Three dimensions make a batch of matrices of an expert layer, not of a positional embedding."""

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 16, 8))
            self.experts = nn.Parameter(torch.zeros(4, 8, 8))

    optimizer = Recipe.from_toml('optimizer.rule = "muon"').optimizer
    rows = {row.name: row for row in parameter_table(Vision(), optimizer=optimizer)}
    assert (rows["pos_embed"].rule, rows["experts"].rule) == ("adamw", "muon")
    assert rows["pos_embed"].rule_reason.endswith("a positional, class or mask token")
