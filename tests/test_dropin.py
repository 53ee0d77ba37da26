"""Our optimizers in other people's programs: plain PyTorch, Lightning, Accelerate, the Hugging Face Trainer, checkpoints."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import thalweg.optim
from tests.conftest import three_parts
from thalweg.core import RecipeError
from thalweg.rules import RULES

os.environ["HF_HUB_OFFLINE"] = "1"

#: A rule of each kind: element by element, matrices with AdamW for the rest, one number for all, weights that are averaged.
FACES: dict[str, Callable[..., Any]] = {
    "element": lambda ps, **o: thalweg.optim.Lion(ps, **{"lr": 3e-3, **o}),
    "matrix": lambda ps, **o: thalweg.optim.Muon(ps, **{"lr": 0.02, "aux_lr": 3e-3, **o}),
    "shared": lambda ps, **o: thalweg.optim.Prodigy(ps, **{"d0": 1e-3, **o}),
    "averaging": lambda ps, **o: thalweg.optim.ScheduleFreeAdamW(ps, **{"lr": 5e-3, **o}),
}
each_kind = pytest.mark.parametrize("kind", FACES)


@pytest.fixture
def others_warnings() -> Iterator[None]:
    """Other people's packages warn of themselves; ours still may not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module=r"thalweg\.")
        yield
        gc.collect()  # what they leave open is closed here, and not in another test


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.mix(self.embed(x)))))
        return out


def net(seed: int = 5) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def samples(num: int = 24) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(7)
    x = torch.randint(0, 7, (num, 8), generator=draw)
    return [(row, row % 3) for row in x]


def loss_of(model: nn.Module, number: int) -> Tensor:
    x, y = samples()[number % 24]
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Any, first: int, last: int, *, after: Callable[[], Any] = lambda: None) -> None:
    for number in range(first, last):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
        after()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def same_as(model: nn.Module, other: nn.Module) -> None:
    assert torch.equal(weights(model), weights(other))


# ---------------------------------------------------------------------- plain PyTorch: schedulers

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=12, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.8)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch_set_the_rates_that_they_set_for_torch(name: str) -> None:
    ours_model, theirs_model = net(), net()
    ours = thalweg.optim.AdamW(ours_model.parameters(), lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(theirs_model.parameters(), lr=0.01, weight_decay=0.1)
    for model, optimizer in ((ours_model, ours), (theirs_model, theirs)):
        schedule = SCHEDULERS[name](optimizer)
        train(model, optimizer, 0, 8, after=schedule.step)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 0.01
    torch.testing.assert_close(weights(ours_model), weights(theirs_model), rtol=1e-5, atol=1e-6)


@each_kind
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_and_rules_go_on_together_after_a_resume(kind: str, name: str) -> None:
    straight, resumed = net(), net()
    optimizer = FACES[kind](straight.parameters())
    schedule = SCHEDULERS[name](optimizer)
    train(straight, optimizer, 0, 8, after=schedule.step)

    first = FACES[kind](resumed.parameters())
    first_schedule = SCHEDULERS[name](first)
    train(resumed, first, 0, 4, after=first_schedule.step)
    saved = copy.deepcopy((first.state_dict(), first_schedule.state_dict()))
    second = FACES[kind](resumed.parameters())
    second_schedule = SCHEDULERS[name](second)
    second.load_state_dict(saved[0])
    second_schedule.load_state_dict(saved[1])
    train(resumed, second, 4, 8, after=second_schedule.step)
    same_as(straight, resumed)


def test_plateaus_lower_the_rate() -> None:
    model = net()
    optimizer = thalweg.optim.Lion(model.parameters(), lr=0.01)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    for loss in (1.0, 1.0, 1.0, 1.0):
        schedule.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.005
    before = weights(model)
    train(model, optimizer, 0, 1)
    assert float((weights(model) - before).abs().max()) == pytest.approx(0.005, rel=1e-4)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("cycle", ["one_cycle", "cyclic"])
def test_cycles_of_momentum_are_those_of_torch(name: str, cycle: str) -> None:
    """OneCycleLR and CyclicLR move ``betas`` or ``momentum`` of the groups; the kernel is made once, not for each value."""
    made = {
        "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=12),
        "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.01, step_size_up=4),
    }[cycle]
    models, optimizers = [net(), net()], []
    programs = set()
    for model, room in zip(models, (torch.optim, thalweg.optim)):
        extra = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(room, name)(model.parameters(), lr=0.001, weight_decay=0.0, **extra)
        schedule = made(optimizer)
        for number in range(10):
            train(model, optimizer, number, number + 1)
            schedule.step()
            programs |= {cohort.program for mine in getattr(optimizer, "_cohorts", []) for cohort in mine}
        optimizers.append(optimizer)
    theirs, ours = optimizers
    key = "momentum" if name == "SGD" else "betas"
    assert ours.param_groups[0][key] == theirs.param_groups[0][key]
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-5, atol=1e-6)
    assert len(programs) == 2, "one before the momentum moved, one from then on"


def test_decay_that_follows_the_schedule_knows_the_peak_of_a_cycle() -> None:
    """Independent decay shrinks weights by wd at the peak rate, whatever rate the optimizer was built with."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = thalweg.optim.AdamW([p], lr=1e-4, weight_decay=0.1, decay_form="independent")
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10)
    shrunk = []
    for _ in range(9):
        before = float(p.detach())
        p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
        shrunk.append(1 - float(p.detach()) / before)
    assert max(shrunk) == pytest.approx(0.1)


def test_a_rule_without_momentum_says_so_to_the_scheduler() -> None:
    optimizer = thalweg.optim.Adagrad(net().parameters())
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)


@each_kind
def test_moving_momentum_resumes_to_the_bit(kind: str) -> None:
    """A warm-up of momentum by hand, as in recipes of Muon, or a cycle of betas."""

    def warm(optimizer: Any, number: int) -> None:
        value = 0.85 + 0.01 * number
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (value, *group["betas"][1:])
            else:
                group["momentum"] = value

    def go(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for number in range(first, last):
            warm(optimizer, number)
            train(model, optimizer, number, number + 1)

    straight, resumed = net(), net()
    go(straight, FACES[kind](straight.parameters()), 0, 8)
    first = FACES[kind](resumed.parameters())
    go(resumed, first, 0, 4)
    second = FACES[kind](resumed.parameters())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    go(resumed, second, 4, 8)
    same_as(straight, resumed)
    still = net()
    go_still = FACES[kind](still.parameters())
    train(still, go_still, 0, 8)
    assert not torch.equal(weights(still), weights(straight)), "momentum did move"


@pytest.mark.parametrize("rule", [name for name in RULES if {"b1", "b2", "b3", "momentum"} & {*RULES[name].defaults}])
def test_every_rule_takes_rates_that_move(rule: str) -> None:
    """A decay rate as a tensor on the device, which is what one that moves becomes, is the same maths as a number."""
    found = []
    for moving in (False, True):
        draw = torch.Generator().manual_seed(1)
        ps = [nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64)) for s in ((4, 6), (5,))]
        optimizer = thalweg.optim.face_of(rule)(ps, lr=0.01, weight_decay=0.1)
        group = optimizer.param_groups[0]
        if moving:
            group["moving"] = tuple(n for n in ("b1", "b2", "b3", "momentum") if isinstance(group.get(n), float))
        for _ in range(6):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64)
            optimizer.step()
        found.append(ps)
    for number, tensor in zip(*found):
        torch.testing.assert_close(number.detach(), tensor.detach(), rtol=1e-9, atol=1e-11)


def test_options_set_by_either_name_count() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = thalweg.optim.AdamW([{"params": [p], "betas": (0.5, 0.9)}])
    group = optimizer.param_groups[0]
    assert (group["b1"], group["b2"], group["betas"]) == (0.5, 0.9, (0.5, 0.9))
    p.grad = torch.ones(2)
    optimizer.step()
    group["b1"] = 0.6
    optimizer.step()
    assert group["betas"] == (0.6, 0.9)
    group["betas"] = (0.7, 0.8)
    saved = optimizer.state_dict()["param_groups"][0]
    assert (saved["b1"], saved["b2"]) == (0.7, 0.8)


# ---------------------------------------------------------------------- plain PyTorch: scaling, clipping, hooks


def scaled_step(
    scaler: Any, model: nn.Module, optimizer: Any, number: int, *, poison: bool = False, clip: float = 0
) -> None:
    optimizer.zero_grad()
    loss = loss_of(model, number)
    scaler.scale(loss * float("inf") if poison else loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def counts(optimizer: Any) -> list[float]:
    return [float(s["step"]) for s in optimizer.state_dict()["state"].values()]


@each_kind
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_grad_scaler_equals_unscaling_by_hand(kind: str, clip: float) -> None:
    """A power of two divides exactly: with and without a scaler the weights are the same; with one, an overflow skips."""
    scaled, plain = net(), net()
    with_scaler, without = FACES[kind](scaled.parameters()), FACES[kind](plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(6):
        scaled_step(scaler, scaled, with_scaler, number, clip=clip)
        if number == 2:
            before, counted = weights(scaled), counts(with_scaler)
            state = copy.deepcopy(with_scaler.state_dict()["state"])
            scaled_step(scaler, scaled, with_scaler, number, poison=True, clip=clip)
            assert scaler.get_scale() == 512.0
            assert torch.equal(weights(scaled), before) and counts(with_scaler) == counted
            for mine, kept in zip(with_scaler.state_dict()["state"].values(), state.values()):
                for name, value in kept.items():
                    assert not isinstance(value, Tensor) or torch.equal(mine[name], value), name
    for number in range(6):
        without.zero_grad()
        loss_of(plain, number).backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        without.step()
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-5, atol=1e-6)


def test_grad_scaler_and_closures() -> None:
    model = net()
    optimizer, scaler = thalweg.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(RecipeError, match="closure") as caught:
        scaler.step(optimizer, closure)
    three_parts(caught.value)
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert off.step(optimizer, closure) is not None


def test_grad_scaler_with_half_precision_autocast() -> None:
    model = net()
    optimizer = thalweg.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for number in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, number % 4)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@each_kind
def test_clipping_of_torch_and_ours_agree(kind: str) -> None:
    outside, inside = net(), net()
    exact = (
        {"precision": "fp32"} if kind == "matrix" else {}
    )  # in bf16 the last digit of a clipped gradient decides roundings
    theirs, ours = FACES[kind](outside.parameters(), **exact), FACES[kind](inside.parameters(), clip=0.05, **exact)
    for number in range(4):
        for model, optimizer in ((outside, theirs), (inside, ours)):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            if model is outside:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    torch.testing.assert_close(weights(outside), weights(inside), rtol=1e-4, atol=2e-5)


@each_kind
def test_hooks_closures_and_late_groups(kind: str) -> None:
    model = net()
    head = list(model.head.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer = FACES[kind](body)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, tree: {**tree, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, tree: {k: v for k, v in tree.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    before = [p.detach().clone() for p in head]
    optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(head, before)), "not in a group yet"
    optimizer.add_param_group({"params": head, "lr": optimizer.param_groups[0]["lr"]})
    for _ in range(15):
        loss = optimizer.step(closure)
    assert float(loss.detach()) < first
    assert float(optimizer.state[head[0]]["step"]) == 15 and float(optimizer.state[body[0]]["step"]) == 17
    assert seen == ["pre", "post"] * 17
    tree = optimizer.state_dict()
    assert tree["note"] == 1 and seen[-1] == "saving"
    optimizer.load_state_dict(tree)
    assert seen[-1] == "loaded"


def test_compiled_models_and_torchs_weight_average(others_warnings: None) -> None:
    """``torch.compile``d, with an average of torch beside ours: both average the same weights."""
    model = net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = thalweg.optim.Muon(compiled.parameters(), lr=0.02, aux_lr=3e-3)
    average = torch.optim.swa_utils.AveragedModel(model)
    first = float(loss_of(model, 0).detach())
    kept = []
    for number in range(12):
        train(compiled, optimizer, number % 3, number % 3 + 1)
        average.update_parameters(model)
        kept.append(weights(model))
    assert float(loss_of(model, 0).detach()) < first
    torch.testing.assert_close(weights(average.module), torch.stack(kept).mean(0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- Lightning


@each_kind
def test_lightning(others_warnings: None, tmp_path: Path, kind: str) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

        def configure_optimizers(self) -> Any:
            optimizer = FACES[kind](self.parameters())
            return [optimizer], [{"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, T_max=20), "interval": "step"}]

    def fit(module: Any, epochs: int, where: Path, resume: Path | None = None) -> Any:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            default_root_dir=where,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(samples(), batch_size=2)
        trainer.fit(module, loader, ckpt_path=resume)
        assert trainer.global_step == 6 * epochs, "12 batches, two to an update"
        return trainer

    straight, parted = Module(), Module()
    start = weights(straight)
    fit(straight, 2, tmp_path)
    fit(parted, 1, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module()
    fit(resumed, 2, tmp_path, tmp_path / "half.ckpt")
    same_as(straight, resumed)
    assert not torch.equal(weights(straight), start)


# ---------------------------------------------------------------------- Accelerate


@each_kind
def test_accelerate(others_warnings: None, tmp_path: Path, kind: str) -> None:
    accelerate = pytest.importorskip("accelerate")

    def begin() -> tuple[Any, ...]:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net()
        optimizer = FACES[kind](model.parameters())
        schedule = lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
        loader = torch.utils.data.DataLoader(samples(), batch_size=2)
        return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)

    def go(accelerator: Any, model: Any, optimizer: Any, loader: Any, schedule: Any, first: int, last: int) -> None:
        for number, (x, y) in enumerate(loader):
            if first <= number < last:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

    straight = begin()
    start = weights(straight[1])
    go(*straight, 0, 12)
    parted = begin()
    go(*parted, 0, 6)
    parted[0].save_state(str(tmp_path / "state"))
    resumed = begin()
    resumed[0].load_state(str(tmp_path / "state"))
    go(*resumed, 6, 12)
    same_as(straight[1], resumed[1])
    assert not torch.equal(weights(straight[1]), start)
    assert counts(straight[2].optimizer)[0] == 6, "two micro-batches to an update"


# ---------------------------------------------------------------------- the Hugging Face Trainer


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
@each_kind
def test_hugging_face_trainer(others_warnings: None, tmp_path: Path, kind: str, given: str) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()

    def build(folder: Path, steps: int) -> Any:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        )
        with torch.no_grad():
            draw = torch.Generator().manual_seed(1)
            for p in model.parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            weight_decay=0.1,
            save_steps=3,
            save_strategy="steps",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="constant",
            learning_rate=0.01,
            seed=3,
        )
        data = [{"input_ids": x, "labels": x} for x, _ in samples()]
        how: dict[str, Any] = {}
        if given == "optimizers":
            optimizer = FACES[kind](model.parameters())
            how["optimizers"] = (optimizer, lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k)))
        else:
            face = type(FACES[kind](net().parameters()))
            how["optimizer_cls_and_kwargs"] = (face, {"lr": 0.01})
        return transformers.Trainer(model=model, args=arguments, train_dataset=data, **how)

    straight = build(tmp_path / "straight", 6)
    start = weights(straight.model)
    straight.train()
    parted = build(tmp_path / "parted", 3)
    parted.train()
    resumed = build(tmp_path / "parted", 6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    same_as(straight.model, resumed.model)
    assert not torch.equal(weights(straight.model), start)
    if given == "optimizer_cls_and_kwargs":
        assert [group["weight_decay"] for group in straight.optimizer.param_groups] == [0.1, 0.0], (
            "the Trainer's groups"
        )


# ---------------------------------------------------------------------- torch's distributed checkpoints, in one process


@pytest.mark.parametrize("flat", [False, True])
@each_kind
def test_distributed_checkpoint_round_trip(others_warnings: None, tmp_path: Path, kind: str, flat: bool) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as by_name

    options = by_name.StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, parted = net(), net()
    train(straight, FACES[kind](straight.parameters()), 0, 8)
    first = FACES[kind](parted.parameters())
    train(parted, first, 0, 4)
    saved = {
        "model": by_name.get_model_state_dict(parted),
        "optimizer": by_name.get_optimizer_state_dict(parted, first, options=options),
    }
    checkpoint.save(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)

    resumed = net(seed=6)
    second = FACES[kind](resumed.parameters())
    empty = {
        "model": by_name.get_model_state_dict(resumed),
        "optimizer": by_name.get_optimizer_state_dict(resumed, second, options=options),
    }
    checkpoint.load(empty, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    by_name.set_model_state_dict(resumed, empty["model"])
    by_name.set_optimizer_state_dict(resumed, second, empty["optimizer"], options=options)
    assert counts(second) == counts(first)
    train(resumed, second, 4, 8)
    same_as(straight, resumed)
