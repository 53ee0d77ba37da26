"""A run that is refused, and a step that is finished, leave the user's model as it was: dtypes, hooks, forward functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thalweg
from tests.conftest import three_parts
from tests.models import mean_loss, points, small_gpt
from thalweg.core import ModelError, ThalwegError

RUN = {"train.steps": 2, "train.batch": 16, "optimizer.lr": 0.01}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def look(model: nn.Module) -> dict[str, Any]:
    """What a refused run may not change."""
    return {
        "tensors": {name: (x.dtype, x.detach().clone()) for name, x in model.state_dict(keep_vars=True).items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forwards": [m.__dict__.get("forward") for m in model.modules()],
    }


def same(before: dict[str, Any], model: nn.Module) -> None:
    after = look(model)
    assert after["hooks"] == before["hooks"] and after["forwards"] == before["forwards"]
    for name, (dtype, x) in before["tensors"].items():
        assert after["tensors"][name][0] == dtype, name
        assert torch.equal(after["tensors"][name][1], x), name


REFUSED: list[dict[str, Any]] = [
    {"precision": "bf16-pure", "optimizer.release_gradients": "one-pass"},  # clips
    {"precision": "bf16-pure", "memory_budget": "1MiB"},
    {"precision": "bf16-pure", "optimizer.offload": True},
    {"precision": "bf16", "islands": ["1"], "memory_budget": "1MiB"},
    {"precision": "bf16-pure", "memory_budget": "2GiB", "optimizer.release_gradients": "one-pass"},
    {"precision": "bf16-pure", "evaluate.best": "acuracy"},
]


@pytest.mark.parametrize("changes", REFUSED, ids=[" ".join(map(str, c.values())) for c in REFUSED])
def test_a_refused_run_leaves_the_model_as_it_was(changes: dict[str, Any]) -> None:
    model = net()
    before = look(model)
    data = thalweg.Split(train=points(64), test=points(16, seed=1))
    with pytest.raises(ThalwegError) as err:
        thalweg.train(model, mean_loss, data, {**RUN, **changes})
    three_parts(err.value)
    same(before, model)
    if "evaluate.best" not in changes:
        with pytest.raises(ThalwegError) as err:
            thalweg.TrainStep(model, mean_loss, {**RUN, **changes, "train.micro_batch": None}, steps=2)(points(16))
        three_parts(err.value)
        same(before, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_of_the_users_own_leaves_it_too(dtype: torch.dtype) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 1 or dtype == torch.bfloat16:
            raise KeyError("mine")
        return mean_loss(model, batch)

    model = net().to(dtype)
    before = look(model)
    with pytest.raises(KeyError):
        thalweg.train(model, loss, points(64), {**RUN, "precision": "bf16-pure"})
    same(before, model)


@pytest.mark.parametrize("changes", [{"precision": "bf16-pure"}, {"precision": "bf16", "islands": ["logits", "1"]}])
def test_a_finished_step_gives_a_plain_model_and_the_next_one_may_have_it(changes: dict[str, Any]) -> None:
    model = net()
    before = look(model)
    step = thalweg.TrainStep(model, mean_loss, {**RUN, **changes}, steps=4)
    step(points(16))
    other = thalweg.TrainStep(model, mean_loss, {**RUN, **changes}, steps=4)
    with pytest.raises(ModelError) as err:
        other(points(16))
    three_parts(err.value)
    assert "finish()" in err.value.remedy
    assert step.finish() is model
    after = look(model)
    assert (after["hooks"], after["forwards"]) == (before["hooks"], before["forwards"])
    with pytest.raises(ThalwegError, match="finished"):
        step(points(16))
    thalweg.TrainStep(model, mean_loss, {**RUN, **changes}, steps=4)(points(16))


def test_a_finished_step_recomputes_no_more() -> None:
    model = small_gpt()
    from tests.models import ragged_text, text_loss

    batch = ragged_text(16)
    step = thalweg.TrainStep(model, text_loss, {**RUN, "precision": "fp32", "recompute": "blocks"}, steps=4)
    step(batch)
    with pytest.raises(ModelError) as err:
        thalweg.TrainStep(model, text_loss, {**RUN, "precision": "fp32", "recompute": "blocks"}, steps=4)(batch)
    assert "finish()" in err.value.remedy
    step.finish()
    assert all("forward" not in module.__dict__ for module in model.modules())
    thalweg.TrainStep(model, text_loss, {**RUN, "precision": "fp32", "recompute": "blocks"}, steps=4)(batch)


def test_a_model_that_mixes_dtypes_runs_under_autocast_from_its_first_pass() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    for precision in ("bf16", "auto"):
        result = thalweg.train(Mixed(), mean_loss, points(64), {**RUN, "precision": precision})
        assert result.plan.recipe.precision == "bf16"
        assert [p.dtype for p in result.model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_buffers_that_bf16_pure_rounds_are_told() -> None:
    model = net()
    model.register_buffer("positions", torch.arange(1000.0))
    result = thalweg.train(model, mean_loss, points(64), {**RUN, "precision": "bf16-pure"})
    assert any("buffers in bfloat16, such as 'positions'" in d.reason for d in result.plan.decisions)


def test_steps_in_pieces_add_up_in_float32_in_bf16_pure() -> None:
    """A loop of one's own may give longer batches later than at first."""
    step = thalweg.TrainStep(net(), mean_loss, {**RUN, "precision": "bf16-pure", "train.micro_batch": 16}, steps=4)
    step(points(16))
    step(points(64))
    assert step._built().state.arenas[0].grads.dtype == torch.float32
