"""Whatever a recipe schedules reaches the update: each value against a loop by hand in float64."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thalweg
from tests.conftest import run_cli, three_parts
from thalweg.core import Loss, Recipe, RecipeError, Split, StopReason, Task, ThalwegError
from thalweg.data import image_size, resized
from thalweg.data.order import Order
from thalweg.engine import evaluate as _evaluate  # noqa: F401 - the room must import
from thalweg.engine.feedback import HEARD, listen
from thalweg.engine.stopping import EarlyStop
from thalweg.run import train_task
from thalweg.schedules import parse

STEPS, NUM, BATCH = 12, 40, 8
LIST: dict[str, Any] = {
    "train.steps": STEPS,
    "train.batch": BATCH,
    "train.clip": 0.0,
    "precision": "fp32",
    "optimizer.rule": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.options": {"momentum": 0.5},
    "optimizer.no_decay": ["bias"],
    "optimizer.decay_form": "decoupled",
    "schedule.lr": "constant()",
}


def data(num: int = NUM) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(num, 5, generator=draw, dtype=torch.float64)
    return {"x": x, "y": x.sum(1, keepdim=True).tanh() + 0.1 * torch.randn(num, 1, generator=draw, dtype=torch.float64)}


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def mse(model: nn.Module, batch: dict[str, Tensor], scale: float | Tensor = 1.0) -> Loss:
    return Loss(scale * (model(batch["x"]) - batch["y"]).square().sum(), len(batch["x"]))


def train(changes: dict[str, Any], **words: Any) -> thalweg.Result:
    return thalweg.train(model, mse, words.pop("data", data()), {**LIST, **changes}, **words)


def by_hand(
    steps: int = STEPS,
    *,
    lr: Any = lambda t, name: 0.1,
    momentum: Any = lambda t, name: 0.5,
    decay: Any = lambda t, name: 0.0,
    clip: Any = lambda t: 0.0,
    sizes: list[int] | None = None,
    seen: list[dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """SGD with momentum and decoupled decay on the same windows, a parameter at a time."""
    net, whole = model(), data()
    order = Order(NUM, BATCH, seed=0, keep_last=True, sizes=sizes)
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for t in range(steps):
        _, picked = order.window(t)
        batch = {k: v[torch.from_numpy(picked)] for k, v in whole.items()}
        net.zero_grad()
        (mse(net, batch).total / len(picked)).backward()
        with torch.no_grad():
            grads = {name: p.grad for name, p in net.named_parameters()}
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            factor = min(1.0, clip(t) / float(norm)) if clip(t) else 1.0
            for name, p in net.named_parameters():
                velocity[name].mul_(momentum(t, name)).add_(grads[name] * factor)
                rate = lr(t, name)
                p.sub_(rate * velocity[name] + rate * decay(t, name) * p)
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return {name: p.detach() for name, p in net.named_parameters()}


def same(result: thalweg.Result, wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, p in result.model.named_parameters():
        assert torch.allclose(p, wanted[name], rtol=tolerance, atol=tolerance), name


def scale_of(text: str, t: int, peak: float = 1.0) -> float:
    return parse(text).at(t, STEPS, peak=peak)


# --- one value after another -----------------------------------------------------------------------------------------


def test_the_rate_follows_its_schedule() -> None:
    text = "warmup(4) >> cosine(to=0.1)"
    same(train({"schedule.lr": text}), by_hand(lr=lambda t, name: 0.1 * scale_of(text, t)))


def test_weight_decay_follows_its_own() -> None:
    text = "linear(to=0.25)"
    result = train({"optimizer.weight_decay": 0.3, "schedule.weight_decay": text})
    same(result, by_hand(decay=lambda t, name: 0.0 if name.endswith("bias") else 0.3 * scale_of(text, t)))
    assert [r.values["weight_decay"] for r in result.records] == pytest.approx(
        [0.3 * scale_of(text, t) for t in range(STEPS)]
    )


def test_an_option_of_the_rule_is_given_as_the_value_itself() -> None:
    text = "warmup(6, start=0.2) >> linear(to=0.1)"
    result = train({"schedule.options": {"momentum": text}})
    same(result, by_hand(momentum=lambda t, name: scale_of(text, t, 0.5)))
    assert [r.values["options.momentum"] for r in result.records][5] == 0.5


def test_clipping_follows_its_own() -> None:
    text = "linear(to=0.1)"
    result = train({"train.clip": 0.5, "schedule.clip": text})
    same(result, by_hand(clip=lambda t: 0.5 * scale_of(text, t)))
    assert any(r.grad_norm > r.values["clip"] for r in result.records)


def test_a_group_has_schedules_of_its_own() -> None:
    """Gradual unfreezing: the first layer stands still for half the run."""
    text = "constant(50%, value=0) >> constant(value=0.5)"
    groups = {"0.*": {"schedule": {"lr": text, "momentum": "constant(value=0.25)"}}}
    result = train({"optimizer.groups": groups})

    seen: list[dict[str, Tensor]] = []
    by_hand(lr=lambda t, name: 0.1 * (scale_of(text, t) if name.startswith("0") else 1.0), seen=seen)
    assert torch.equal(seen[5]["0.weight"], seen[0]["0.weight"])  # of the loop by hand
    wanted = by_hand(
        lr=lambda t, name: 0.1 * (scale_of(text, t) if name.startswith("0") else 1.0),
        momentum=lambda t, name: 0.25 if name.startswith("0") else 0.5,
    )
    same(result, wanted)


def test_group_strengths_keep_their_own_base_under_one_schedule() -> None:
    groups = {"0.*": {"weight_decay": 0.5}}
    recipe = {"optimizer.weight_decay": 0.1, "optimizer.groups": groups, "schedule.weight_decay": "linear(to=0)"}
    result = train(recipe)

    def strength(t: int, name: str) -> float:
        base = 0.5 if name.startswith("0") else 0.0 if name.endswith("bias") else 0.1
        return base * scale_of("linear(to=0)", t)

    same(result, by_hand(decay=strength))


def test_arguments_of_the_loss_move() -> None:
    result = train({"schedule.loss": {"scale": "linear(to=0)"}})
    factors = [scale_of("linear(to=0)", t) for t in range(STEPS)]
    assert [r.values["loss.scale"] for r in result.records] == pytest.approx(factors)
    assert result.records[-1].loss == 0.0 and result.records[-1].grad_norm == 0.0
    plain = train({})
    assert result.records[0].loss == plain.records[0].loss
    assert result.records[1].loss == pytest.approx(plain.records[1].loss * factors[1])


def test_strengths_of_penalties_move() -> None:
    recipe = {"regularize.penalties": {"l1": 0.1}, "schedule.penalties": {"l1": "constant(value=0)"}}
    same(train(recipe), by_hand())
    with_penalty = train({"regularize.penalties": {"l1": 0.1}})
    assert with_penalty.records[0].loss > train({}).records[0].loss


def test_the_decay_of_the_average_moves() -> None:
    text = "linear(to=0.5)"
    recipe = {"regularize.average": 0.9, "schedule.average": text}
    seen: list[dict[str, Tensor]] = []
    by_hand(seen=seen)
    average = dict(model().named_parameters())
    average = {name: p.detach().clone() for name, p in average.items()}
    for t, weights in enumerate(seen, start=1):
        decay = min(scale_of(text, t - 1, 0.9), (1 + t) / (10 + t))
        average = {name: decay * a + (1 - decay) * weights[name] for name, a in average.items()}
    same(train(recipe), average)


# --- how much a step takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 2])
def test_a_growing_batch_takes_every_sample_once_an_epoch(micro: int | None) -> None:
    text = "warmup(6, start=0.25) >> hold()"
    factors = [scale_of(text, t) for t in range(STEPS)]
    unit = micro or 1
    sizes = [max(1, round(BATCH * factor / unit)) * unit for factor in factors]
    result = train({"schedule.batch": text, **({"train.micro_batch": micro} if micro else {})})
    same(result, by_hand(sizes=sizes), 1e-11)
    order = Order(NUM, BATCH, seed=0, keep_last=True, sizes=sizes)
    first = [i for t in range(STEPS) for i in order.window(t)[1] if order.epoch_of(t) == 0]
    assert sorted(first) == list(range(NUM)) and [r.epoch for r in result.records][-1] == 1
    taken = [r.weight for r in result.records]
    assert taken[: len(sizes) // 2] == sizes[: len(sizes) // 2] and taken[0] < BATCH


def test_sequences_grow() -> None:
    tokens = torch.randint(0, 7, (32, 17))
    shapes: list[tuple[int, ...]] = []

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Loss:
        shapes.append(tuple(batch["tokens"].shape))
        logits = net(batch["tokens"][:, :-1])
        return thalweg.regularize.cross_entropy(logits, batch["tokens"][:, 1:])

    def net() -> nn.Module:
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))

    recipe = {"train.steps": 4, "train.batch": 8, "schedule.sequence": "constant(2, value=0.5) >> constant(value=1)"}
    result = thalweg.train(net, loss, {"tokens": tokens}, {"precision": "fp32", **recipe})
    assert [r.weight for r in result.records] == [8 * 7, 8 * 7, 8 * 16, 8 * 16]
    assert {s[1] for s in shapes} == {8, 17}


def image_run(changes: dict[str, Any], images: Tensor, side: int = 1) -> list[tuple[Any, ...]]:
    """(height, width, dtype) of what the loss of each training step sees."""
    shapes: list[tuple[Any, ...]] = []

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            shapes.append((*batch["images"].shape[2:], batch["images"].dtype))
        pixels = batch["images"].float() / 255
        return net(nn.functional.adaptive_avg_pool2d(pixels, side) if side else pixels).square().mean()

    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(1))
    net(torch.zeros(1, 1, side or images.shape[2], side or images.shape[3]))
    recipe = {"train.steps": 3, "train.batch": 4, "precision": "fp32", "compile": "off", "optimizer.lr": 0.0, **changes}
    thalweg.train(net, loss, Split(train={"images": images}, test={"images": images}), recipe)
    return shapes[-3:]


def test_images_grow_by_their_schedule_and_keep_their_kind() -> None:
    images = torch.randint(0, 256, (8, 1, 20, 28), dtype=torch.uint8)
    growing = {"schedule.image_size": "constant(2, value=0.5) >> constant(value=1)"}
    byte = torch.uint8
    assert image_run(growing, images) == [(8, 16, byte), (8, 16, byte), (20, 28, byte)]
    assert image_run(growing, images.float())[0] == (8, 16, torch.float32)
    assert image_run({"schedule.image_size": "constant(value=0.01)"}, images)[0][:2] == (4, 4)


def test_small_images_are_means_of_what_they_cover() -> None:
    images = torch.arange(16, dtype=torch.float32).view(1, 1, 4, 4).repeat_interleave(3, 2).repeat_interleave(3, 3)
    (batch,) = resized([(4, 4)], 0)(0, [(images, torch.zeros(1))])
    inner, wanted = batch[0][0, 0, 1:3, 1:3], torch.tensor([[5.0, 6.0], [9.0, 10.0]])
    torch.testing.assert_close(inner, wanted, rtol=0, atol=1e-4)
    whole = (images, torch.zeros(1))
    assert resized([(12, 12)], 0)(5, [whole])[0] is whole


def test_a_model_that_takes_one_size_alone_is_refused_before_the_run() -> None:
    images = torch.randint(0, 256, (8, 1, 20, 28), dtype=torch.uint8)
    with pytest.raises(thalweg.core.DataError) as err:
        image_run({"schedule.image_size": "constant(2, value=0.5) >> constant(value=1)"}, images, side=0)
    asked, numbers, remedy = three_parts(err.value)
    assert "8 x 16 pixels" in asked and "RuntimeError" in numbers and "schedule.image_size" in remedy


def test_images_do_not_grow_beyond_their_size() -> None:
    with pytest.raises(RecipeError, match="rises above the size of the images"):
        image_run({"schedule.image_size": "constant(value=1.5)"}, torch.zeros(8, 1, 20, 28))


@pytest.mark.parametrize(("text", "step"), [("constant(value=0)", 1), ("linear()", 3)])
def test_images_of_no_pixels_are_refused(text: str, step: int) -> None:
    with pytest.raises(RecipeError) as err:
        image_run({"schedule.image_size": text}, torch.zeros(8, 1, 20, 28))
    asked, numbers, remedy = three_parts(err.value)
    assert (
        "leaves nothing" in asked and numbers == f"It is 0 times 20 x 28 pixels at step {step}." and "above 0" in remedy
    )


def test_every_size_of_the_run_goes_through_the_model_before_it(recwarn: pytest.WarningsRecorder) -> None:
    """8 and 16 pixels are whole patches, and 12 are not; held-out images of 20 pixels neither."""

    def patched(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        images = batch["images"]
        return net(images.reshape(len(images), -1, 64).mean(1)).square().mean()

    def go(text: str, side: int, **held_out: Any) -> None:
        images = {"images": torch.zeros(8, 1, side, side)}
        recipe = {
            "train.steps": 4,
            "train.batch": 4,
            "precision": "fp32",
            "compile": "off",
            "schedule.image_size": text,
        }
        thalweg.train(nn.Linear(64, 1), patched, Split(train=images, **held_out), recipe)

    go("constant(2, value=0.5) >> constant(value=1)", 16)
    for text, side, held_out, size in (
        ("constant(1, value=0.5) >> constant(1, value=0.75) >> constant(value=1)", 16, {}, "12 x 12"),
        ("constant(value=0.8)", 20, {"test": {"images": torch.zeros(2, 1, 20, 20)}}, "20 x 20"),
    ):
        with pytest.raises(thalweg.core.DataError) as err:
            go(text, side, **held_out)
        asked, _, remedy = three_parts(err.value)
        assert f"{size} pixels" in asked and "It takes smaller ones" in remedy
    assert not recwarn


def test_data_that_is_one_tensor_has_no_images_and_is_not_asked_for_them(recwarn: pytest.WarningsRecorder) -> None:
    assert image_size(torch.zeros(2, 3, 4, 5), "images") is None and image_size(torch.zeros(1, 2, 3, 4, 5), 0) is None
    assert not recwarn


def test_lengths_in_examples_tokens_and_epochs_are_counted_from_the_data() -> None:
    rates = {
        "warmup(48 examples) >> hold()": 6,
        "warmup(2 epochs) >> hold()": 10,
        "warmup(50%) >> hold()": 6,
        "warmup(3 steps) >> hold()": 3,
    }
    for text, updates in rates.items():
        records = train({"schedule.lr": text}).records
        assert [r.lr for r in records].index(0.1) == updates - 1, text
    # four windows of 2 and then of 8: 40 examples are 4 + 4 updates
    batch = "constant(4, value=0.25) >> constant(value=1)"
    growing = train({"schedule.lr": "warmup(40 examples) >> hold()", "schedule.batch": batch}).records
    assert [r.weight for r in growing[:6]] == [2, 2, 2, 2, 8, 8] and [r.lr for r in growing].index(0.1) == 7


@pytest.mark.parametrize("last", ["keep", "drop"])
def test_epochs_are_whole_however_the_batch_changes(last: str) -> None:
    """An epoch's short last window is not taken for a whole one."""
    recipe = {
        "train.batch": 16,
        "train.last": last,
        "train.steps": 16,
        "schedule.lr": "hold(4 epochs) >> constant(value=0.5)",
    }
    fixed = [r.lr for r in train(recipe).records].index(0.05)
    same = [r.lr for r in train({**recipe, "schedule.batch": "hold()"}).records].index(0.05)
    growing = train({**recipe, "schedule.batch": "constant(3, value=0.5) >> constant(value=1)"}).records
    assert fixed == same == (12 if last == "keep" else 8)
    assert growing[[r.lr for r in growing].index(0.05)].epoch == 4


def test_groups_tell_their_own_rate() -> None:
    groups = {"0.*": {"lr_scale": 0.5, "schedule": {"lr": "linear(to=0)"}}}
    records = train({"optimizer.groups": groups}).records
    assert records[0].values["groups.0.*.lr"] == pytest.approx(0.05)
    muon = {
        "optimizer.rule": "muon",
        "optimizer.options": {},
        "optimizer.groups": {"0.*": {"schedule": {"b2": "hold()"}}},
    }
    with pytest.raises(RecipeError) as err:
        train(muon)
    assert "rule" in three_parts(err.value)[2]


def test_tokens_are_counted_where_a_weight_is_a_token() -> None:
    tokens = torch.randint(0, 7, (32, 9))

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Loss:
        return thalweg.regularize.cross_entropy(net(batch["tokens"][:, :-1]), batch["tokens"][:, 1:])

    task = Task(
        model=lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)),
        loss=loss,
        data={"tokens": tokens},
        unit="tokens",
    )
    recipe = Recipe().override({"train.steps": 6, "train.batch": 4, "schedule.lr": "warmup(96 tokens) >> hold()"})
    assert [r.lr for r in train_task(task, recipe).records].index(1e-3) == 2


# --- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["swa", "window"])
def test_plain_means_of_weights(form: str) -> None:
    recipe = {"regularize.average_form": form, "regularize.average_start": "4", "regularize.average_every": "3"}
    seen: list[dict[str, Tensor]] = []
    by_hand(seen=seen)
    taken = [3, 6, 9] if form == "swa" else [6, 9]
    wanted = {name: torch.stack([seen[k][name] for k in taken]).mean(0) for name in seen[0]}
    same(train({**recipe, **({"regularize.average_window": 2} if form == "window" else {})}), wanted)


@pytest.mark.parametrize("form", ["swa", "window"])
def test_before_they_begin_the_weights_themselves_are_evaluated(form: str) -> None:
    recipe = {"regularize.average_form": form, "regularize.average_start": "11", "train.steps": 12, "evaluate.every": 4}
    split = Split(train=data(), test=data(16))
    seen: list[dict[str, Tensor]] = []
    by_hand(seen=seen)
    result = train(recipe, data=split)
    net = model()
    net.load_state_dict(seen[3])
    with torch.no_grad():
        value = mse(net, data(16))
    assert result.evaluations[0].metrics["loss"] == pytest.approx(float(value.total) / 16, rel=1e-12)


def test_averages_are_saved_under_their_own_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for form in ("swa", "window"):
        result = train(
            {"regularize.average_form": form, "regularize.average_start": "2", "regularize.average_every": "2"},
            folder=tmp_path / form,
        )
        (newest,) = sorted((tmp_path / form / "checkpoints").iterdir())[-1:]
        saved, live = load_file(newest / "average.safetensors"), load_file(newest / "weights.safetensors")
        for name, p in result.model.named_parameters():
            assert torch.equal(saved[name], p) and not torch.equal(live[name], p)


def test_what_moves_is_drawn_in_the_report(tmp_path: Path) -> None:
    train({"schedule.options": {"momentum": "linear(to=0.25)"}}, folder=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Scheduled: options.momentum" in page
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert lines[-1]["values"] == {"options.momentum": 0.25}


# --- schedules that listen -------------------------------------------------------------------------------------------


def heard(values: list[float], **options: Any) -> list[float]:
    """The factor after each value, for the product's own arithmetic."""
    given = {"factor": 0.5, "patience": 3, "min_delta": 0.0, "rest": 0, "least": 0.0, **options}
    state = torch.tensor([1.0, math.inf, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    factors = []
    for value in values:
        state = listen(state, torch.tensor(value, dtype=torch.float64), given)
        factors.append(float(state[HEARD.index("factor")]))
    return factors


def test_patience_counts_what_people_count() -> None:
    """torch's patience=2 fires on the fourth equal value; here the second one without improvement lowers the rate."""
    assert heard([1.0, 1.0, 1.0, 1.0], patience=2) == [1.0, 1.0, 0.5, 0.5]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0.0)
    rates = []
    for _ in range(4):
        torchs.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(("patience", "rest", "delta"), [(1, 0, 0.0), (2, 0, 0.0), (3, 2, 0.0), (2, 1, 0.05)])
def test_plateau_is_torchs_with_one_more_patience(patience: int, rest: int, delta: float) -> None:
    draw = torch.Generator().manual_seed(patience)
    values = (torch.rand(60, generator=draw, dtype=torch.float64) + torch.linspace(1, 0, 60)).tolist()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience - 1, threshold=delta, threshold_mode="abs", cooldown=rest, min_lr=1e-3
    )
    wanted = []
    for value in values:
        torchs.step(value)
        wanted.append(optimizer.param_groups[0]["lr"])
    got = heard(values, patience=patience, rest=rest, min_delta=delta, least=1e-3)
    assert got == pytest.approx(wanted) and wanted[-1] < 1.0


def test_nan_is_never_better_and_a_fall_stops_at_least() -> None:
    assert heard([1.0, math.nan, math.nan, 0.5], patience=2) == [1.0, 1.0, 0.5, 0.5]
    assert heard([1.0] * 9, patience=1, least=0.3) == [1.0, 0.5, *[0.3] * 7]


def test_a_plateau_of_evaluations_lowers_the_rate_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    recipe = {
        "schedule.lr": "warmup(2) >> plateau(factor=0.5, patience=1, min_delta=1000)",
        "evaluate.every": 2,
        "checkpoint.every": 5,
        "checkpoint.keep_last": 9,
    }
    split = Split(train=data(), test=data(16))
    whole = train(recipe, data=split, folder=tmp_path / "whole")
    # The first evaluation, after the warm-up's last update, is not heard; the next becomes the best; each later one lowers.
    assert [round(r.lr, 6) for r in whole.records] == [
        0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125,
    ]  # fmt: skip
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = train(recipe, data=split, folder=tmp_path / "cut", resume=5)
    assert [r.lr for r in cut.records] == [r.lr for r in whole.records[5:]]
    for a, b in zip(whole.model.parameters(), cut.model.parameters()):
        assert torch.equal(a, b)


def test_a_plateau_of_the_loss_follows_a_transcription() -> None:
    text = "loss_plateau(factor=0.5, patience=2, smooth=0.5, min_delta=0.01)"
    records = train({"schedule.lr": text, "optimizer.lr": 0.9}).records
    factor, best, bad, mean = 1.0, math.inf, 0, 0.0
    for t, record in enumerate(records, start=1):
        assert record.lr == pytest.approx(0.9 * factor)
        mean = 0.5 * mean + 0.5 * record.loss
        smooth = mean / (1 - 0.5**t)
        if smooth < best - 0.01:
            best, bad = smooth, 0
        else:
            bad += 1
        if bad >= 2:
            factor, bad = factor * 0.5, 0
    assert factor < 1.0


def test_a_skipped_step_is_not_heard() -> None:
    poisoned = data()
    order = Order(NUM, BATCH, seed=0, keep_last=True)
    poisoned["x"][int(order.window(3)[1][0])] = math.inf
    text = "loss_plateau(factor=0.5, patience=1, smooth=0, min_delta=1000)"
    records = train({"schedule.lr": text, "train.steps": 5}, data=poisoned).records
    assert [r.skipped for r in records] == [False, False, False, True, False]
    assert records[3].lr == records[4].lr == 0.025


# --- early stopping --------------------------------------------------------------------------------------------------


def test_early_stopping_counts_and_knows_nan() -> None:
    stop = EarlyStop(patience=2, goal="max", min_delta=0.1)
    assert [stop.tell(v) for v in (0.5, 0.55, 0.7, math.nan, 0.75)] == [False, False, False, False, True]
    again = EarlyStop(patience=2, goal="max", min_delta=0.1)
    again.restore(json.loads(json.dumps(EarlyStop(patience=2, goal="max").facts())))
    assert [again.tell(math.nan), again.tell(math.nan)] == [False, True]
    assert not any(EarlyStop(patience=0, goal="min").tell(1.0) for _ in range(5))


def test_a_run_that_stops_early_leaves_its_best_weights(tmp_path: Path) -> None:
    """The rate grows until the run diverges: the best evaluation lies in the middle."""
    recipe = {
        "train.steps": 40,
        "schedule.lr": "constant(4, value=0.5) >> linear(to=30)",
        "evaluate.every": 2,
        "evaluate.patience": 3,
        "checkpoint.every": 3,
        "checkpoint.keep_last": 99,
    }
    split = Split(train=data(), test=data(16))
    whole = train(recipe, data=split, folder=tmp_path / "run")
    assert whole.reason is StopReason.STOPPED_EARLY and len(whole.records) < 40
    losses = [e.metrics["loss"] for e in whole.evaluations]
    assert losses.index(min(losses)) == len(losses) - 4
    with torch.no_grad():
        value = mse(whole.model, data(16))
    assert float(value.total) / 16 == pytest.approx(min(losses), rel=1e-12)
    import shutil

    before = 3 * ((2 * (len(losses) - 1)) // 3)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    cut = train(recipe, data=split, folder=tmp_path / "cut", resume=before)
    assert cut.reason is StopReason.STOPPED_EARLY and cut.records[-1].step == whole.records[-1].step
    for a, b in zip(whole.model.parameters(), cut.model.parameters()):
        assert torch.equal(a, b)


# --- a run that goes on from another ---------------------------------------------------------------------------------


def test_cooling_down_from_a_checkpoint_is_the_run_that_had_it_from_the_start(tmp_path: Path) -> None:
    task = Task(model=model, loss=mse, data=data())
    recipe = Recipe().override(
        {
            **LIST,
            "schedule.lr": "warmup(3) >> hold()",
            "optimizer.weight_decay": 0.1,
            "schedule.weight_decay": "linear(to=0.5)",
            "regularize.average_form": "window",
            "regularize.average_every": "2",
        }
    )
    train_task(task, recipe, folder=tmp_path / "stable")
    before = {p: p.read_bytes() for p in (tmp_path / "stable").rglob("*") if p.is_file()}
    cooled = thalweg.continue_run(task, tmp_path / "stable", tmp_path / "cooled", steps=4)
    assert {p: p.read_bytes() for p in (tmp_path / "stable").rglob("*") if p.is_file()} == before
    straight = train_task(
        Task(model=model, loss=mse, data=data()),
        recipe.override(
            {
                "train.steps": 16,
                "schedule.lr": "first(warmup(3) >> hold(), 12, of=12) >> cooldown(4)",
                "schedule.weight_decay": "first(linear(to=0.5), 12, of=12) >> hold()",
                "regularize.average_start": "9",
            }
        ),
    )
    assert [r.lr for r in cooled.records] == [r.lr for r in straight.records[12:]]
    assert cooled.records[-1].lr == 0.0 and cooled.records[0].lr == pytest.approx(0.1 * (1 - math.sqrt(1 / 4)))
    for a, b in zip(cooled.model.parameters(), straight.model.parameters()):
        assert torch.equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "cooled" / "records.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 17))


def test_a_run_goes_on_for_longer_from_an_earlier_step(tmp_path: Path) -> None:
    task = Task(model=model, loss=mse, data=data())
    recipe = Recipe().override({**LIST, "checkpoint.every": 4, "checkpoint.keep_last": 9})
    train_task(task, recipe, folder=tmp_path / "a")
    longer = thalweg.continue_run(task, tmp_path / "a", tmp_path / "b", steps=3, then="hold()", at=8)
    assert [r.step for r in longer.records] == [9, 10, 11] and {r.lr for r in longer.records} == {0.1}
    for bad in (
        {"steps": 0},
        {"steps": 3, "at": 5},
        {"steps": 3, "then": "cooldown(4)"},
        {"steps": 3, "then": "cool()"},
    ):
        with pytest.raises(ThalwegError) as err:
            thalweg.continue_run(task, tmp_path / "a", tmp_path / "c", **bad)  # type: ignore[arg-type]
        three_parts(err.value)
        assert not (tmp_path / "c").exists()
    with pytest.raises(ThalwegError):
        thalweg.continue_run(task, tmp_path / "a", tmp_path / "b", steps=3)


def test_cooling_down_on_the_command_line(tmp_path: Path) -> None:
    first = run_cli("train", "digits", "--quiet", "--set", "train.steps=6", "--set", "schedule.lr=hold()", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    more = run_cli("train", "digits", "--quiet", "--from", "runs/digits", "--more", "3", cwd=tmp_path)
    assert more.returncode == 0 and "runs/digits-2/report.html" in more.stdout, more.stderr
    wrong = ["--more 3", "--from runs/digits", "--from runs/no --more 3", "--from runs/digits --more x"]
    for words in (*wrong, "--from runs/digits --more 3 --set seed=1", "--from runs/digits --more 3 --then cool()"):
        told = run_cli("train", "digits", *words.split(), cwd=tmp_path)
        assert told.returncode == 2 and told.stderr.startswith("error:") and "Traceback" not in told.stderr


# --- what is refused, before any work ---------------------------------------------------------------------------------

BAD = {
    "warm-up longer than the run": {"schedule.lr": "warmup(100)"},
    "a negative rate": {"schedule.lr": "linear(to=-0.1)"},
    "a rate in words": {"schedule.lr": "fast"},
    "tokens of data without": {"schedule.lr": "warmup(100 tokens) >> hold()"},
    "an option that the rule does not have": {"schedule.options": {"b2": "linear(to=0.5)"}},
    "an option that decides what is computed": {"schedule.options": {"nesterov": "linear()"}},
    "an option out of its range": {"schedule.options": {"momentum": "linear(to=1.5)"}},
    "an option that is switched off": {"optimizer.options": {"momentum": 0.0}, "schedule.options": {"momentum": "hold()"}},
    "a decay that is switched off": {"schedule.weight_decay": "linear()"},
    "an average that is switched off": {"schedule.average": "linear()"},
    "a decay of the average of 1": {"regularize.average": 0.9, "schedule.average": "linear(to=1)"},
    "clipping that is switched off": {"schedule.clip": "linear()"},
    "clipping to nothing": {"train.clip": 1.0, "schedule.clip": "linear(to=0)"},
    "no dropout": {"schedule.dropout": "linear()"},
    "no stochastic depth": {"schedule.stochastic_depth": "linear()"},
    "an argument that the loss does not have": {"schedule.loss": {"smooth": "linear()"}},
    "a penalty that is not there": {"schedule.penalties": {"l1": "linear()"}},
    "a batch above the batch": {"schedule.batch": "constant(value=2)"},
    "a batch counted in epochs": {"schedule.batch": "warmup(1 epochs, start=0.5) >> hold()"},
    "a batch that listens": {"schedule.batch": "plateau()"},
    "sequences of data without": {"schedule.sequence": "constant(value=0.5)", "data": {"x": torch.zeros(8), "y": torch.zeros(8)}},
    "images of data without": {"schedule.image_size": "constant(value=0.5)"},
    "a group's unknown value": {"optimizer.groups": {"0.*": {"schedule": {"b2": "linear()"}}}},
    "a group's schedule that is none": {"optimizer.groups": {"0.*": {"schedule": {"lr": "linar()"}}}},
    "no number": {"schedule.options": {"momentum": 0.5}},
    "an average's start that is no length": {"regularize.average_form": "swa", "regularize.average_start": "soon"},
    "an unknown scheduler of torch": {"schedule.lr": "torch.CosineLR()"},
    "two averages": {"regularize.average": 0.9, "regularize.average_form": "swa"},
    "patience below 0": {"evaluate.patience": -1},
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_bad_input_is_refused_before_any_work(why: str, tmp_path: Path) -> None:
    changes = dict(BAD[why])
    given = changes.pop("data", None)

    def flat(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (net(batch["x"].double()[:, None].expand(-1, 5)) - batch["y"][:, None]).square().mean()

    with pytest.raises(RecipeError) as err:
        thalweg.train(model, flat if given else mse, given or data(), {**LIST, **changes}, folder=tmp_path / "run")
    three_parts(err.value)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_epochs_of_a_stream_are_refused() -> None:
    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield {k: v[0] for k, v in data().items()}

    with pytest.raises(RecipeError) as err:
        train({"schedule.lr": "warmup(1 epochs) >> hold()"}, data=Endless())
    assert "stream" in three_parts(err.value)[1]


def test_what_is_out_of_a_steps_reach_is_refused() -> None:
    for changes in ({"schedule.batch": "linear()"}, {"regularize.mixup": 0.2}, {"evaluate.patience": 2}):
        with pytest.raises(RecipeError) as err:
            thalweg.TrainStep(model(), mse, {**LIST, **changes}, steps=5)
        three_parts(err.value)
    with pytest.raises(RecipeError):
        thalweg.TrainStep(model(), mse, {**LIST, "train.steps": None, "schedule.lr": "warmup(3)"})


def test_a_step_of_ones_own_loop_follows_every_schedule() -> None:
    text = "warmup(6, start=0.2) >> linear(to=0.1)"
    step = thalweg.TrainStep(model(), mse, {**LIST, "schedule.options": {"momentum": text}}, steps=STEPS)
    order, whole = Order(NUM, BATCH, seed=0, keep_last=True), data()
    for t in range(STEPS):
        picked = torch.from_numpy(order.window(t)[1])
        step({k: v[picked] for k, v in whole.items()})
    wanted = by_hand(momentum=lambda t, name: scale_of(text, t, 0.5))
    for name, p in step.model.named_parameters():
        assert torch.allclose(p, wanted[name], rtol=1e-12, atol=1e-12)


def test_a_run_is_not_changed_by_what_it_does_not_use() -> None:
    """Sharing one recipe object between two runs: nothing of the first is seen in the second."""
    recipe = Recipe().override({**LIST, "schedule.loss": {"scale": "linear(to=0)"}})
    first = thalweg.train(model, mse, data(), copy.deepcopy(recipe))
    second = thalweg.train(model, mse, data(), recipe)
    assert [r.loss for r in first.records] == [r.loss for r in second.records]
