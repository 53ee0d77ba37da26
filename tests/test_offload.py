"""Slots whose home is elsewhere: the same updates as without, a portion at a time.

On the CPU a recipe may not ask for it; the machinery is the same there, with the slots' home as another place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import assert_same_bits, make_step, mean_loss, mlp, points, run_steps, small_gpt, state_bits
from thalweg.core import Recipe, RecipeError
from thalweg.engine.release import check_release
from thalweg.optim import make_arenas, named_trainable, parameter_table
from thalweg.optim.arena import Arena, How, update
from thalweg.optim.offload import Offload
from thalweg.rules import RULES

SINGLE = [name for name in RULES if not RULES[name].is_global and "curvature" not in RULES[name].needs]


def arena_of(model: nn.Module, *, portion: int = 512, **changes: Any) -> Arena:
    """The one arena of a model; its slots come and go in portions of so many elements."""
    how = {name: changes.pop(name) for name in ("offload", "average", "way", "slots") if name in changes}
    optimizer = Recipe().override({"optimizer.weight_decay": 0.1, **changes}).optimizer
    arena = make_arenas(named_trainable(model), parameter_table(model, optimizer=optimizer), optimizer, How(**how))[0]
    cut(arena, portion)
    return arena


def cut(arena: Arena, portion: int) -> None:
    for segment in arena.segments:
        if isinstance(segment.update.run, Offload):
            segment.update.run.portion = portion


def trained(arena: Arena, steps: int = 3, skip: int | None = 1) -> dict[str, Tensor]:
    """What an arena keeps after some updates by drawn gradients, one of them skipped."""
    draw = torch.Generator().manual_seed(0)
    applied = 0
    for step in range(steps):
        for name in arena.places:
            view = arena.view(arena.grads, name)
            view.copy_(torch.randn(view.shape, generator=draw))
        skipped = torch.tensor(float(step == skip))
        numbers = {"lr": torch.tensor(0.01), "t": torch.tensor(applied + 1.0), "divisor": torch.tensor(2.0)}
        update([arena], **numbers, skipped=skipped, share=torch.tensor(0.1), due=step)
        applied += step != skip
        arena.grads.zero_()
    kept = {name: arena.view(arena.params, name).clone() for name in arena.places}
    kept |= {name: slot.clone() for name, slot in arena.slots().items()}
    return kept | {f"average/{name}": view.clone() for name, view in arena.average_views().items()}


def assert_same(changes: dict[str, Any], *, dtype: torch.dtype = torch.float32, portion: int = 512) -> None:
    states = []
    for offload in (True, False):
        torch.manual_seed(0)
        states.append(trained(arena_of(small_gpt().to(dtype), offload=offload, portion=portion, **changes)))
    assert_same_bits(*states)


@pytest.mark.parametrize("portion", [256, 1024, 1 << 22])
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("slots", ["full", "bf16", "bf16+error", "int8"])
def test_the_update_is_the_same_to_the_bit(slots: str, way: str, portion: int) -> None:
    assert_same({"slots": slots, "way": way, "average": True}, portion=portion)


@pytest.mark.parametrize("slots", ["full", "int8"])
def test_random_bits_of_rounding_are_drawn_by_the_same_numbers(slots: str) -> None:
    assert_same({"slots": slots, "way": "compiled"}, dtype=torch.bfloat16)


@pytest.mark.parametrize("rule", SINGLE)
def test_every_rule(rule: str) -> None:
    states = []
    for offload in (True, False):
        torch.manual_seed(0)
        states.append(trained(arena_of(small_gpt(), offload=offload, portion=1024, **{"optimizer.rule": rule}), skip=0))
    loose = 2e-4 if RULES[rule].reads == "matrix" else 1e-6  # products in bfloat16, in batches of another size
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=loose, msg=lambda m, n=name: f"{n}: {m}")


def test_noise_is_cut_as_the_parameters_are() -> None:
    assert_same({"optimizer.stages": {"gradient_noise": {}}})


def test_slots_are_at_home_between_updates_and_nbytes_says_where() -> None:
    model = mlp()
    away, near = arena_of(model, offload=True, average=True), arena_of(mlp(), average=True)
    bytes_away, bytes_near = away.nbytes(), near.nbytes()
    assert bytes_away["offloaded"] == bytes_near["slots"] + bytes_near["average"]
    assert bytes_away["slots"] == bytes_away["average"] == 0
    assert "offloaded" not in bytes_near
    homes = {slot.data_ptr() for slot in away.slots().values()}
    before = {name: slot.clone() for name, slot in away.slots().items()}
    trained(away)
    assert {slot.data_ptr() for slot in away.slots().values()} == homes
    assert all(not torch.equal(slot, before[name]) for name, slot in away.slots().items())


def test_no_more_than_a_portion_is_away_from_home() -> None:
    arena = arena_of(small_gpt(), offload=True, portion=512)
    trained(arena)
    assert arena.nbytes()["offloaded"] > 20 * 512 * 2 * 4
    assert arena.staging is not None
    assert arena.staging.nbytes() == 512 * 2 * 4, "two float32 slots; one place where nothing runs beside"


def refusal(**changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        make_step(mlp(), mean_loss, points(), **changes)
    return str(caught.value)


def test_on_the_cpu_it_is_refused() -> None:
    told = refusal(**{"optimizer.offload": True})
    assert "moves nothing" in told and "CPU's memory already" in told and "optimizer.offload=false" in told


def test_a_rule_that_measures_all_slots_at_once_is_refused() -> None:
    recipe = Recipe().override({"optimizer.rule": "prodigy", "optimizer.offload": True, "device": "cuda"})
    rows = parameter_table(mlp(), optimizer=recipe.optimizer)
    with pytest.raises(RecipeError) as caught:
        check_release(recipe, "cuda", rows, lambda *told: None)
    told = str(caught.value)
    assert "rule prodigy" in told and "from all of its slots at once" in told and "adamw" in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("changes", [{}, {"optimizer.slots": "int8"}, {"optimizer.rule": "muon"}], ids=str)
@pytest.mark.parametrize("release", ["off", "two-pass"])
def test_on_a_gpu_the_run_is_the_same_and_its_slots_lie_in_pinned_memory(changes: dict[str, Any], release: str) -> None:
    states = []
    for offload in (True, False):
        torch.manual_seed(0)
        told = {"device": "cuda", "train.batch": 16, "optimizer.offload": offload, "regularize.average": 0.9}
        told["optimizer.release_gradients"] = release
        step, feed = make_step(mlp(), mean_loss, points(), **told, **changes)
        for arena in step.state.arenas:
            cut(arena, 256)
        run_steps(step, feed, 6)
        if offload:
            slots = [slot for arena in step.state.arenas for slot in arena.slots().values()]
            assert all(slot.device.type == "cpu" and slot.is_pinned() for slot in slots)
        states.append({name: value.cpu() for name, value in state_bits(step).items()})
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-5, atol=1e-6)
