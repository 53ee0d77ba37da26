"""Mixup and cutmix over windows: any split, real shares, whoever is mixed with whom, and what is refused."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.conftest import three_parts
from thalweg.core import DataError, LossError, Recipe, RecipeError, Split, Task
from thalweg.engine import Loop, build, resolve
from thalweg.regularize import Mixing, checking, cross_entropy, soft_target_error, soft_targets
from thalweg.regularize.labels import smoothed

CLASSES = 5
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


def batch_of(num: int, *, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (6, 7), seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num, 2, *size, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "images": images,
        "labels": torch.randint(0, CLASSES, (num,), generator=generator),
        "ids": torch.arange(num),
    }


def cut(batch: Any, sizes: list[int]) -> list[Any]:
    pieces = {name: values.split(sizes) for name, values in batch.items()}
    return [{name: values[i] for name, values in pieces.items()} for i in range(len(sizes))]


def told_apart(num: int, size: tuple[int, int] = (6, 7)) -> Any:
    """Sample i is filled with the value i, so that what it was mixed with can be read off."""
    images = torch.arange(num, dtype=torch.float64).view(-1, 1, 1, 1).expand(num, 1, *size).contiguous()
    return {"images": images, "labels": torch.arange(num)}


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 2**63 - 1), st.sampled_from(["mixup", "cutmix"])
)
def test_any_split_gives_the_same_samples(sizes: list[int], key: int, kind: str) -> None:
    batch = batch_of(sum(sizes))
    mixing = Mixing(num_classes=CLASSES, **{kind: 0.8})
    (whole,) = mixing([batch], key)
    parts = mixing(cut(batch, sizes), key)
    assert [len(p["images"]) for p in parts] == [len(p["labels"]) for p in parts] == sizes
    for name in batch:
        assert torch.equal(torch.cat([p[name] for p in parts]), whole[name])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_targets_are_mixed_by_the_real_share(kind: str, per_sample: bool) -> None:
    """Read off the pixels: their mean is share * own + (1 - share) * partner's, for mixup and cutmix alike."""
    num = 40
    batch = told_apart(num)
    mixing = Mixing(num_classes=num, per_sample=per_sample, **{kind: 1.0})
    for key in range(10):
        (mixed,) = mixing([batch], key)
        targets = mixed["labels"]
        own = targets.diagonal()
        others = targets - torch.diag(own)
        partner = others.argmax(1)
        torch.testing.assert_close(targets.sum(1), torch.ones(num, dtype=torch.float64), **EXACT)
        wanted = own * torch.arange(num) + (1 - own) * partner
        clear = others.amax(1) > 0  # a box may be empty
        torch.testing.assert_close(mixed["images"].mean((1, 2, 3))[clear], wanted[clear], **EXACT)
        if kind == "cutmix":
            values = mixed["images"].flatten(1)
            assert ((values == torch.arange(num).view(-1, 1)) | (values == partner.view(-1, 1)))[clear].all()
        if kind == "mixup":
            assert clear.all() and len(set(partner.tolist())) == num  # one partner each, never oneself
            assert (own.std() < 1e-9) != per_sample


def test_boxes_are_cut_at_the_border_and_counted_after() -> None:
    """Without counting again the mean share would be the drawn one; boxes at the border are smaller than that."""
    num, size = 2000, (8, 8)
    (mixed,) = Mixing(num_classes=num, cutmix=1.0)([told_apart(num, size)], 3)
    own = mixed["labels"].diagonal()
    kept = (mixed["images"].flatten(1) == torch.arange(num).view(-1, 1)).double().mean(1)
    torch.testing.assert_close(own, kept, **EXACT)
    assert own.mean() > 0.6  # 0.5 drawn
    boxes = mixed["images"][:, 0] != torch.arange(num).view(-1, 1, 1)
    assert boxes.any(0).all()  # every pixel is in some box
    rows, columns = boxes.any(2), boxes.any(1)
    assert torch.equal(boxes, rows[:, :, None] & columns[:, None, :])  # rectangles


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_drawn_from_beta(alpha: float) -> None:
    num = 3000
    (mixed,) = Mixing(num_classes=num, mixup=alpha)([told_apart_flat(num)], 11)
    own = mixed["labels"].diagonal().double()
    assert abs(own.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(num)
    spread = 1 / (4 * (2 * alpha + 1))
    assert abs(own.var().item() / spread - 1) < 0.1


def told_apart_flat(num: int) -> Any:
    return {"images": torch.arange(num, dtype=torch.float32).view(-1, 1), "labels": torch.arange(num)}


def test_share_and_switch_are_frequencies() -> None:
    batch = told_apart(4)
    mixing = Mixing(num_classes=4, mixup=1.0, cutmix=1.0, share=0.5, switch=0.25)
    found = {"kept": 0, "cut": 0, "blended": 0}
    for key in range(400):
        (mixed,) = mixing([batch], key)
        whole = bool((mixed["images"] == mixed["images"].round()).all())
        same = torch.equal(mixed["images"], batch["images"])
        found["kept" if same else "cut" if whole else "blended"] += 1
    assert abs(found["kept"] - 200) < 45 and abs(found["cut"] - 50) < 30 and abs(found["blended"] - 150) < 45
    always = Mixing(num_classes=4, mixup=1.0, cutmix=1.0, switch=0.0)
    assert all(not torch.equal(always([batch], k)[0]["images"].round(), batch["images"]) for k in range(5))


def test_the_key_names_everything_and_torchs_stream_is_left_alone() -> None:
    batch = batch_of(8)
    mixing = Mixing(num_classes=CLASSES, mixup=0.4)
    before = torch.get_rng_state()
    (one,), (two,), (other,) = mixing([batch], 5), mixing([batch], 5), mixing([batch], 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one["images"], two["images"]) and not torch.equal(one["images"], other["images"])
    assert not torch.equal(mixing([batch], 5 + (1 << 40))[0]["images"], one["images"])  # all 63 bits count


def test_the_stream_is_frozen() -> None:
    """These numbers are part of every mixed run's result: a change breaks resuming and must be said."""
    (mixed,) = Mixing(num_classes=4, mixup=1.0)([told_apart(4)], 123456789012345)
    (boxed,) = Mixing(num_classes=4, cutmix=1.0)([told_apart(4)], 123456789012345)
    assert [round(v, 6) for v in mixed["images"][:, 0, 0, 0].tolist()] == FROZEN_MIXUP
    assert [round(v, 6) for v in boxed["labels"].diagonal().tolist()] == FROZEN_CUTMIX


FROZEN_MIXUP = [0.703989, 1.716047, 0.251365, 2.426008]
FROZEN_CUTMIX = [0.904762, 0.404762, 0.619048, 0.785714]


@pytest.mark.parametrize("num", [0, 1])
def test_too_few_to_mix_are_soft_as_they_are(num: int) -> None:
    batch = batch_of(num)
    (mixed,) = Mixing(num_classes=CLASSES, mixup=1.0)([batch], 0)
    assert torch.equal(mixed["images"], batch["images"])
    assert torch.equal(mixed["labels"], soft_targets(batch["labels"], CLASSES, dtype=torch.float64))


def test_what_is_given_stays_as_it_was() -> None:
    batch = batch_of(6)
    kept = {name: values.clone() for name, values in batch.items()}
    for kind in ("mixup", "cutmix"):
        (mixed,) = Mixing(num_classes=CLASSES, **{kind: 1.0})([batch], 1)
        assert all(torch.equal(batch[name], kept[name]) for name in batch)
        assert mixed["ids"] is batch["ids"]


def test_tuples_lists_and_named_tuples_keep_their_kind() -> None:
    batch = batch_of(4)
    pair = namedtuple("pair", "x y")
    for given_ in (
        (batch["images"], batch["labels"]),
        [batch["images"], batch["labels"]],
        pair(batch["images"], batch["labels"]),
    ):
        (mixed,) = Mixing(num_classes=CLASSES, mixup=1.0, inputs=0, targets=1)([given_], 2)
        assert type(mixed) is type(given_) and mixed[1].shape == (4, CLASSES)


def test_soft_targets_go_in_too_and_ignored_ones_take_their_weight_away() -> None:
    batch = batch_of(6)
    mixing = Mixing(num_classes=CLASSES, mixup=1.0)
    (hard,) = mixing([batch], 4)
    (soft,) = mixing([{**batch, "labels": soft_targets(batch["labels"], CLASSES, dtype=torch.float64)}], 4)
    torch.testing.assert_close(soft["labels"], hard["labels"], **EXACT)
    batch["labels"][:] = -100
    (none,) = mixing([batch], 4)
    loss = cross_entropy(torch.zeros(6, CLASSES, dtype=torch.float64), none["labels"], label_smoothing=0.1)
    assert loss.weight.item() == 0 and loss.total.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_keep_their_dtype_and_targets_are_wide(dtype: torch.dtype) -> None:
    for kind in ("mixup", "cutmix"):
        (mixed,) = Mixing(num_classes=CLASSES, **{kind: 1.0})([batch_of(6, dtype=dtype)], 1)
        assert mixed["images"].dtype == dtype and mixed["labels"].dtype == torch.float32


def test_gradients_do_not_depend_on_the_split() -> None:
    """Contract C1 with mixing, smoothing and ragged micro-batches: 1 x N, N x 1 and between, in float64."""
    batch = batch_of(12)
    mixing = Mixing(num_classes=CLASSES, mixup=0.4, cutmix=1.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(84, CLASSES)).double()
    found = []
    for sizes in ([12], [1] * 12, [5, 4, 3]):
        model.zero_grad()
        losses = [
            cross_entropy(model(part["images"]), part["labels"], label_smoothing=0.1)
            for part in mixing(cut(batch, sizes), 9)
        ]
        sum(loss.total for loss in losses).backward()
        found.append(model[1].weight.grad / sum(loss.weight for loss in losses))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **EXACT)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_run_with_all_of_it_does_not_depend_on_the_split(micro_batch: int) -> None:
    """Through the engine: augmentation, mixing, smoothing and penalties together; six updates in float64."""
    whole, parts = trained(12), trained(micro_batch)
    assert not torch.equal(whole, trained(12, **{"regularize.mixup": 0.0, "regularize.cutmix": 0.0}))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)


def trained(micro_batch: int, **changes: Any) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, CLASSES)).double()
    loss = lambda model, batch: cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=0.1)
    recipe = {
        "precision": "fp32",
        "train.steps": 6,
        "train.batch": 12,
        "train.micro_batch": micro_batch,
        "optimizer.rule": "sgd",
        "optimizer.lr": 0.1,
        "checkpoint.every": 0,
        "regularize.mixup": 0.4,
        "regularize.cutmix": 1.0,
        "regularize.augment": ["crop(1)", "flip", "randaugment(1, 5)"],
        "regularize.penalties": {"l1": 1e-3, "orthogonal": 1e-3, "spectral": 1e-3},
        **changes,
    }
    batch = batch_of(48)
    data = {"images": batch["images"], "labels": batch["labels"]}
    resolved = resolve(Task(model=model, loss=loss, data=Split(train=data)), Recipe().override(recipe))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    Loop(resolved.plan, step, resolved.feed, []).run(until=6)
    return torch.cat([p.detach().flatten() for p in resolved.model.parameters()])


def test_two_samples_are_timms_pair() -> None:
    """With two samples the partner is timm's (the batch reversed): its targets, smoothing inside, are ours, smoothed after."""
    timm = timm_mixup()
    batch = batch_of(2)
    for key in range(5):
        (mixed,) = Mixing(num_classes=CLASSES, mixup=1.0, per_sample=False)([batch], key)
        x, y = batch["images"], mixed["images"]
        share = ((y - x.flip(0)) / (x - x.flip(0))).median().item()
        torch.testing.assert_close(y, share * x + (1 - share) * x.flip(0), **EXACT)
        wanted = timm.mixup_target(batch["labels"], CLASSES, share, 0.1).double()
        torch.testing.assert_close(smoothed(mixed["labels"], 0.1), wanted, rtol=0, atol=1e-6)


def test_cutmix_shares_are_distributed_as_timms() -> None:
    timm, size, num = timm_mixup(), (9, 12), 4000
    state = np.random.get_state()
    np.random.seed(0)
    theirs = np.array([timm.cutmix_bbox_and_lam((3, *size), lam)[1] for lam in np.random.beta(1.0, 1.0, num)])
    np.random.set_state(state)
    batch = {"images": torch.zeros(num, 1, *size), "labels": torch.arange(num)}
    (mixed,) = Mixing(num_classes=num, cutmix=1.0)([batch], 0)
    ours = mixed["labels"].diagonal().double().numpy()
    points = np.linspace(0, 1, 21)
    apart = np.abs([(ours <= p).mean() - (theirs <= p).mean() for p in points]).max()
    assert apart < 1.95 * math.sqrt(2 / num)  # Kolmogorov and Smirnov, 0.1 %


def timm_mixup() -> Any:
    """timm's file alone: the package imports torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    one = importlib.util.spec_from_file_location("timm_mixup", Path(spec.origin).parent / "data" / "mixup.py")
    assert one is not None and one.loader is not None
    module = importlib.util.module_from_spec(one)
    one.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": -0.1},
        {"cutmix": math.inf},
        {"mixup": math.nan},
        {"mixup": 1.0, "share": 1.5},
        {"mixup": 1.0, "switch": -0.5},
        {},
    ],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError) as caught:
        Mixing(num_classes=3, **options)
    three_parts(caught.value)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"images": torch.zeros(4, 8, dtype=torch.int64)}, "int64"),
        ({"images": torch.zeros(4, 8)}, r"\(4, 8\)"),
        ({"labels": torch.zeros(4)}, "float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "4 and 3"),
        ({"labels": torch.zeros(4, CLASSES + 1)}, "float32"),
        ({"images": "none"}, "labels"),
    ],
)
def test_what_cannot_be_mixed(change: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        Mixing(num_classes=CLASSES, cutmix=1.0)([{**batch_of(4), **change}], 0)
    parts = three_parts(caught.value)
    assert re.search(told, " ".join(parts))


def test_labels_out_of_range_are_found_while_checking() -> None:
    batch = batch_of(4)
    batch["labels"][0] = CLASSES
    with checking(), pytest.raises(DataError, match="out of range"):
        Mixing(num_classes=CLASSES, mixup=1.0)([batch], 0)


def test_a_loss_for_integers_only_is_named() -> None:
    (mixed,) = Mixing(num_classes=CLASSES, mixup=1.0)([batch_of(4)], 0)
    with pytest.raises(Exception) as caught:
        nn.functional.nll_loss(torch.zeros(4, CLASSES), mixed["labels"])
    err = soft_target_error(caught.value)
    assert isinstance(err, LossError)
    assert "soft targets" in three_parts(err)[0] and type(caught.value).__name__ in err.numbers


def test_without_reading_back() -> None:
    """On another device nothing may wait: the maths runs on 'meta', where no value can be read."""
    batch = {
        "images": torch.zeros(4, 1, 6, 6, device="meta"),
        "labels": torch.zeros(4, dtype=torch.int64, device="meta"),
    }
    for kind in ("mixup", "cutmix"):
        (mixed,) = Mixing(num_classes=CLASSES, **{kind: 1.0})([batch], 0)
        assert mixed["images"].device.type == "meta" and mixed["labels"].shape == (4, CLASSES)


def test_cost_is_independent_of_python_loops() -> None:
    """As many torch calls for 64 samples as for 4."""

    class Count(TorchFunctionMode):
        num = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num += 1
            return func(*args, **(kwargs or {}))

    found = []
    for num in (4, 64):
        batch: Any = batch_of(num)
        with Count() as count:
            Mixing(num_classes=CLASSES, cutmix=1.0)([batch], 0)
        found.append(count.num)
    assert found[0] == found[1]
