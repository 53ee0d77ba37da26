"""Image transforms against slow one-image references (and Pillow where it is installed), and what they are a function of."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import three_parts
from thalweg.core import DataError, RecipeError, seed_for
from thalweg.data import uniforms
from thalweg.data.feeds import _Draw, make_feed
from thalweg.data.sources import as_source
from thalweg.regularize import TRANSFORMS, pipeline
from thalweg.regularize import images as ops
from thalweg.regularize.policies import OPERATIONS, parse

#: One use of every transform; that each registered name is in it is a test.
TEXTS = (
    "flip",
    "flip(alternate=1)",
    "crop(2)",
    "crop(2, reflect=true)",
    "random_resized_crop(0.3)",
    "cutout(3)",
    "cutout(2, fill=0.5)",
    "erase(p=0.7)",
    "erase(p=0.7, noise=true)",
    "rotate(30)",
    "shear(0.3)",
    "translate(0.2)",
    "zoom(0.7, 1.4)",
    "brightness(0.5)",
    "contrast(0.5)",
    "color(0.5)",
    "sharpness(0.8)",
    "posterize(3, p=0.5)",
    "solarize(0.4, p=0.5)",
    "invert",
    "autocontrast",
    "equalize",
    "randaugment(2, 9)",
)


def draws(samples: Any, key: int = 7) -> Callable[[int], Tensor]:
    """As a feed gives them: a function of (key, sample, place)."""
    return _Draw(key, np.asarray(samples, dtype=np.int64), 0, key + 100)


def some(
    num: int = 6, channels: int = 3, size: tuple[int, int] = (9, 8), *, seed: int = 0, byte: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (num, channels, *size), generator=generator)
    return levels.to(torch.uint8) if byte else levels.to(torch.float32) / 255


def test_every_transform_is_tested() -> None:
    assert {text.split("(")[0] for text in TEXTS} == set(TRANSFORMS)


@pytest.mark.parametrize("byte", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_a_function_of_the_sample_alone(text: str, byte: bool) -> None:
    """Whatever else is in the batch, in whatever order: the same image comes out, in range, of the same kind."""
    images, transform = some(size=(21, 20), byte=byte), parse(text)
    kept = images.clone()
    whole = transform(images, draws(range(6)))
    assert whole.dtype == images.dtype and whole.shape == images.shape and torch.equal(images, kept)
    assert byte or (whole.min() >= 0 and whole.max() <= 1 + 1e-6)
    order = [4, 0, 5, 2]
    some_of_them = transform(images[order], draws(order))
    assert torch.equal(some_of_them, whole[order])
    for i in range(6):
        assert torch.equal(transform(images[i : i + 1], draws([i]))[0], whole[i])
    others = transform(images, draws(range(6), key=8))
    assert not torch.equal(others, whole) or not torch.equal(transform(images, draws(range(6), key=9)), whole)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_any_number_of_channels_and_torchs_stream_left_alone(text: str, channels: int) -> None:
    before = torch.get_rng_state()
    assert parse(text)(some(channels=channels), draws(range(6))).isfinite().all()
    assert torch.equal(torch.get_rng_state(), before)
    assert pipeline([text])({"images": some(0)}, draws([]))["images"].shape == (0, 3, 9, 8)


@pytest.mark.parametrize("byte", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "flip(0)",
        "crop(0)",
        "crop(0, reflect=1)",
        "random_resized_crop(1, 1, 1)",
        "cutout(0)",
        "erase(0)",
        "erase(1, 0, 0)",
        "rotate(0)",
        "shear(0)",
        "translate(0)",
        "zoom(1, 1)",
        "brightness(0)",
        "contrast(0)",
        "color(0)",
        "sharpness(0)",
        "posterize(8)",
        "posterize(2, p=0)",
        "solarize(p=0)",
        "invert(0)",
        "autocontrast(0)",
        "equalize(0)",
    ],
)
def test_identity_is_exact(text: str, byte: bool) -> None:
    images = some(byte=byte)
    assert torch.equal(parse(text)(images, draws(range(6))), images)


def test_randaugment_of_magnitude_0_changes_little_and_of_10_much() -> None:
    images = torch.full((200, 3, 8, 8), 0.5)
    images[:, :, ::2] = 0.25
    for name, (change, low, _, _) in OPERATIONS.items():
        if name not in ("autocontrast", "equalize"):  # they have no magnitude
            assert torch.equal(change(images, torch.full((200,), float(low))), images), name
    calm, wild = (parse(f"randaugment(1, {m})")(images, draws(range(200))) for m in (0, 10))
    assert (calm - images).abs().mean() < (wild - images).abs().mean() / 2


def test_randaugment_draws_each_operation_and_sign_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}

    def noted(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, s: (seen.setdefault(name, []).append(s), x)[1]

    for name, (_, low, high, signed) in list(OPERATIONS.items()):
        monkeypatch.setitem(OPERATIONS, name, (noted(name), low, high, signed))
    num = 14 * 400
    out = parse("randaugment(1, 5)")(some(num, 1, (1, 1)), draws(range(num)))
    assert torch.equal(out, some(num, 1, (1, 1)))  # each image came back to its place
    for name, (_, low, high, signed) in OPERATIONS.items():
        strengths = torch.cat(seen[name])
        assert abs(len(strengths) - 400) < 100, name
        wanted = low + (high - low) / 2
        torch.testing.assert_close(strengths.abs() if signed else strengths, torch.full_like(strengths, abs(wanted)))
        if signed:
            assert abs((strengths > 0).double().mean() - 0.5) < 0.1, name


# --- slow references, one image, one pixel ---------------------------------------------------------------------------


def shifted_slowly(image: np.ndarray, down: int, right: int, reflect: bool) -> np.ndarray:
    out = np.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            i, j = y - down, x - right
            if reflect:
                i, j = abs(i), abs(j)
                i, j = (height - 1) - abs(height - 1 - i), (width - 1) - abs(width - 1 - j)
            if 0 <= i < height and 0 <= j < width:
                out[:, y, x] = image[:, i, j]
    return out


def warped_slowly(image: np.ndarray, matrix: np.ndarray, border: bool) -> np.ndarray:
    """Bilinear: a pixel is the sum of the four around where it comes from; outside there is 0, or the edge."""
    channels, height, width = image.shape
    out = np.zeros((channels, height, width))
    for y in range(height):
        for x in range(width):
            at = matrix @ np.array([x - (width - 1) / 2, y - (height - 1) / 2, 1.0])
            u, v = at[0] + (width - 1) / 2, at[1] + (height - 1) / 2
            if border:
                u, v = min(max(u, 0), width - 1), min(max(v, 0), height - 1)
            for j in (math.floor(u), math.floor(u) + 1):
                for i in (math.floor(v), math.floor(v) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        out[:, y, x] += (1 - abs(u - j)) * (1 - abs(v - i)) * image[:, i, j]
    return out


def equalized_slowly(channel: np.ndarray) -> np.ndarray:
    """Pillow's: ImageOps.equalize."""
    counts = np.bincount(channel.ravel(), minlength=256)
    present = counts[counts > 0]
    step = (present.sum() - present[-1]) // 255
    if len(present) <= 1 or step == 0:
        return channel
    table, n = [], step // 2
    for count in counts:
        table.append(min(n // step, 255))
        n += count
    return np.array(table)[channel].astype(channel.dtype)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("byte", [False, True])
def test_shifts(reflect: bool, byte: bool) -> None:
    images = some(25, byte=byte)
    moves = torch.tensor([(a, b) for a in range(-2, 3) for b in range(-2, 3)])
    out = ops.shifted(images, moves[:, 0], moves[:, 1], 2, reflect=reflect)
    for image, (down, right), got in zip(images, moves.tolist(), out, strict=True):
        assert np.array_equal(got.numpy(), shifted_slowly(image.numpy(), down, right, reflect))


def test_crop_moves_every_way_equally_often_and_like_by_hand() -> None:
    num = 9 * 300
    images = torch.zeros(num, 1, 5, 5)
    images[:, :, 2, 2] = 1
    out = parse("crop(1)")(images, draws(range(num)))[:, 0, 1:4, 1:4]
    assert (out.flatten(1).sum(1) == 1).all()
    assert ((out.sum(0) - 300).abs() < 80).all()


def test_flip_is_of_columns_half_of_the_time() -> None:
    images = some(1000, 1, (2, 3))
    out = parse("flip")(images, draws(range(1000)))
    turned = torch.tensor([bool(torch.equal(o, i.flip(-1))) for o, i in zip(out, images, strict=True)])
    same = torch.tensor([bool(torch.equal(o, i)) for o, i in zip(out, images, strict=True)])
    assert (turned | same).all() and abs(int(turned.sum()) - 500) < 70


def test_alternating_flips_show_each_image_both_ways_in_two_epochs() -> None:
    images = some(400, 1, (2, 3))
    transform = parse("flip(alternate=1)")
    first, second, third = (transform(images, _Draw(epoch, np.arange(400), epoch, 5)) for epoch in range(3))
    assert torch.equal(first, third) and torch.equal(second, first.flip(-1))
    turned = (first != images).flatten(1).any(1)
    assert abs(int(turned.sum()) - 200) < 50
    seldom = parse("flip(0.1, alternate=1)")(images, _Draw(0, np.arange(400), 0, 5))
    assert int((seldom != images).flatten(1).any(1).sum()) < 80


def test_alternating_flips_follow_the_epochs_of_a_run() -> None:
    source, seen = as_source({"images": some(8), "place": torch.arange(8)}), []
    feed = make_feed(
        source,
        batch=8,
        micro_batch=4,
        seed=3,
        keep_last=True,
        device=torch.device("cpu"),
        augment=pipeline(["flip(alternate=1)"]),
    )
    for window in feed.windows(0, 2):
        batch = {name: torch.cat([part[name] for part in window]) for name in window[0]}
        seen.append(batch["images"][batch["place"].argsort()])
    assert torch.equal(seen[1], seen[0].flip(-1)) and not torch.equal(seen[0], some(8))


def test_alternating_flips_need_the_epoch() -> None:
    with pytest.raises(DataError) as err:
        parse("flip(alternate=1)")(some(2), lambda num: torch.zeros(2, num))
    assert "has to know the epoch" in err.value.asked and "a function" in err.value.numbers
    assert "regularize.augment" in err.value.remedy


MATRICES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], Any]]] = {
    "rotation": (
        lambda s: ops.rotation(60 * s),
        lambda s: [[math.cos(a := math.radians(60 * s)), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]],
    ),
    "shearing": (lambda s: ops.shearing(s, -s / 2), lambda s: [[1, s, 0], [-s / 2, 1, 0]]),
    "translation": (lambda s: ops.translation(3 * s, -2 * s), lambda s: [[1, 0, -3 * s], [0, 1, 2 * s]]),
    "zooming": (lambda s: ops.zooming(1 + s / 2), lambda s: [[1 / (1 + s / 2), 0, 0], [0, 1 / (1 + s / 2), 0]]),
}


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_warps(name: str, border: bool) -> None:
    images = some(5).double()
    strengths = torch.tensor([-1.0, -0.4, 0.0, 0.3, 1.0], dtype=torch.float64)
    ours, slow = MATRICES[name]
    out = ops.warped(images, ours(strengths), border=border)
    for image, strength, got in zip(images.numpy(), strengths.tolist(), out.numpy(), strict=True):
        np.testing.assert_allclose(got, warped_slowly(image, np.array(slow(strength)), border), atol=1e-10)
    assert torch.equal(out[2], images[2])


def test_a_quarter_turn_is_exact_and_counter_clockwise() -> None:
    images = some(2, size=(8, 8)).double()
    turned = ops.warped(images, ops.rotation(torch.tensor([90.0, 180.0], dtype=torch.float64)))
    torch.testing.assert_close(turned[0], images[0].rot90(1, (1, 2)), rtol=0, atol=1e-12)
    torch.testing.assert_close(turned[1], images[1].rot90(2, (1, 2)), rtol=0, atol=1e-12)


def test_random_resized_crop_shows_a_part_within_its_limits() -> None:
    """Coordinates as pixel values: what is shown can be read off its corners."""
    num, size = 500, 32
    line = torch.arange(size, dtype=torch.float32).expand(num, 1, size, size) / (size - 1)
    both = torch.cat((line, line.transpose(2, 3)), 1)
    out = parse("random_resized_crop(0.3, 0.8)")(both, draws(range(num))) * (size - 1)
    wide = (out[:, 0, 16, 24] - out[:, 0, 16, 8]) / 16
    tall = (out[:, 1, 24, 16] - out[:, 1, 8, 16]) / 16
    area, aspect = wide * tall, wide / tall
    assert area.min() > 0.29 and area.max() < 0.81 and abs(area.mean() - 0.55) < 0.03
    assert aspect.min() > 0.74 and aspect.max() < 1.35 and abs(aspect.log().mean()) < 0.02
    left, right = out[:, 0, 16, 0], out[:, 0, 16, -1]
    assert left.min() >= -1e-4 and right.max() <= size - 1 + 1e-4
    assert abs((left + (size - 1 - right) > 1e-3).double().mean() - 1) < 0.02


def test_cutout_centres_anywhere_and_is_cut_at_the_border() -> None:
    num = 4000
    out = parse("cutout(4)")(torch.ones(num, 2, 6, 6), draws(range(num)))
    gone = out == 0
    assert torch.equal(gone[:, 0], gone[:, 1])
    rows, columns = gone[:, 0].any(2).sum(1), gone[:, 0].any(1).sum(1)
    assert torch.equal(gone[:, 0].flatten(1).sum(1), rows * columns)  # rectangles
    for sides in (rows, columns):  # centres 0 to 5: from 2 before to 1 behind
        shares = torch.bincount(sides, minlength=5).double() / num
        assert ((shares - torch.tensor([0, 0, 1 / 6, 2 / 6, 3 / 6])).abs() < 0.035).all()


def test_erase_boxes_have_their_area_and_lie_anywhere() -> None:
    num = 3000
    out = parse("erase(0.6, 0.1, 0.3)")(torch.ones(num, 1, 20, 20), draws(range(num)))[:, 0]
    gone = (out == 0).flatten(1).double().mean(1)
    hit = gone > 0
    assert abs(hit.double().mean() - 0.6) < 0.04
    assert gone[hit].min() > 0.07 and gone[hit].max() < 0.34 and abs(gone[hit].mean() - 0.2) < 0.015
    centre = (out == 0)[:, :, 10].any(1).double().mean()
    edge = (out == 0)[:, :, 0].any(1).double().mean()
    assert 0.01 < edge < centre
    rows, columns = (out == 0).any(2).sum(1)[hit], (out == 0).any(1).sum(1)[hit]
    assert torch.equal((out == 0).flatten(1).sum(1)[hit], rows * columns)
    assert (rows / columns).log().mean().abs() < 0.05 and (rows / columns).max() > 2.5


def test_erase_with_noise_is_uniform_noise_in_the_box_alone() -> None:
    images = torch.full((500, 1, 12, 12), 2.0)  # out of range, so that noise can be told apart
    out = parse("erase(1, 0.2, 0.3, noise=1)")(images, draws(range(500)))
    noise = out[out != 2.0]
    assert abs(noise.mean() - 0.5) < 0.02 and abs(noise.var() - 1 / 12) < 0.01
    byte = parse("erase(1, 0.2, 0.3, noise=1)")(torch.zeros(50, 1, 12, 12, dtype=torch.uint8), draws(range(50)))
    assert byte.max() > 240


def test_colours_by_formula() -> None:
    images = some(4).double()
    factor = torch.tensor([0.0, 0.5, 1.0, 1.7], dtype=torch.float64)
    grey = (images * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)).sum(1, keepdim=True)
    f = factor.view(-1, 1, 1, 1)
    exact = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(ops.brightened(images, factor), (f * images).clamp(0, 1), **exact)
    torch.testing.assert_close(ops.coloured(images, factor), (grey + f * (images - grey)).clamp(0, 1), **exact)
    mean = grey.mean((2, 3), keepdim=True)
    torch.testing.assert_close(ops.contrasted(images, factor), (mean + f * (images - mean)).clamp(0, 1), **exact)
    smooth = images.clone()
    for y in range(1, 8):
        for x in range(1, 7):
            around = images[:, :, y - 1 : y + 2, x - 1 : x + 2].sum((2, 3)) + 4 * images[:, :, y, x]
            smooth[:, :, y, x] = around / 13
    torch.testing.assert_close(ops.sharpened(images, factor), (smooth + f * (images - smooth)).clamp(0, 1), **exact)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    torch.testing.assert_close(ops.autocontrasted(images), (images - low) / (high - low), **exact)
    torch.testing.assert_close(ops.inverted(images), 1 - images, **exact)
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert torch.equal(ops.autocontrasted(flat), flat) and torch.equal(ops.equalized(flat), flat)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 255), st.sampled_from([(3, 3), (20, 20), (40, 30)]))
def test_levels(seed: int, bits: int, threshold: int, size: tuple[int, int]) -> None:
    """Posterize, solarize, invert and equalize act on the 256 levels, and on floats as on these."""
    byte = (some(2, size=size, seed=seed).square() * 255).round().to(torch.uint8)  # unevenly spread
    plain = byte.to(torch.int64)
    wanted = {
        "posterized": plain & ~(2 ** (8 - bits) - 1),
        "solarized": torch.where(plain >= threshold, 255 - plain, plain),
        "inverted": 255 - plain,
        "equalized": torch.from_numpy(np.stack([[equalized_slowly(c) for c in i] for i in byte.numpy()])).to(
            torch.int64
        ),
    }
    options = {"posterized": (torch.tensor([bits] * 2),), "solarized": (torch.tensor([threshold / 255] * 2),)}
    for name, levels in wanted.items():
        change = getattr(ops, name)
        assert torch.equal(change(byte, *options.get(name, ())).to(torch.int64), levels), name
        floats = change(byte.to(torch.float32) / 255, *options.get(name, ()))
        assert torch.equal((floats * 255).round().to(torch.int64), levels), name


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")
@pytest.mark.parametrize("channels", [1, 3])
def test_pillows_images(channels: int) -> None:
    """Pillow cuts off fractions where we round: one level."""
    image_module, enhance, image_ops = (
        importlib.import_module(f"PIL.{n}") for n in ("Image", "ImageEnhance", "ImageOps")
    )
    images = some(3, channels, (24, 31), byte=True)
    factor = torch.tensor([0.3, 1.0, 1.6])
    pairs: dict[str, tuple[Tensor, Callable[[Any, float], Any], int]] = {
        "brightness": (ops.brightened(images, factor), lambda i, f: enhance.Brightness(i).enhance(f), 1),
        "contrast": (ops.contrasted(images, factor), lambda i, f: enhance.Contrast(i).enhance(f), 1),
        "color": (ops.coloured(images, factor), lambda i, f: enhance.Color(i).enhance(f), 1),
        "sharpness": (ops.sharpened(images, factor), lambda i, f: enhance.Sharpness(i).enhance(f), 2),
        "posterize": (ops.posterized(images, torch.tensor([3] * 3)), lambda i, f: image_ops.posterize(i, 3), 0),
        "solarize": (ops.solarized(images, torch.tensor([100 / 255] * 3)), lambda i, f: image_ops.solarize(i, 100), 0),
        "invert": (ops.inverted(images), lambda i, f: image_ops.invert(i), 0),
        "equalize": (ops.equalized(images), lambda i, f: image_ops.equalize(i), 0),
        "autocontrast": (ops.autocontrasted(images), lambda i, f: image_ops.autocontrast(i), 1),
    }
    for name, (ours, theirs, most) in pairs.items():
        for image, f, got in zip(images, factor.tolist(), ours, strict=True):
            array = image.permute(1, 2, 0).numpy()
            told = np.asarray(theirs(image_module.fromarray(array[:, :, 0] if channels == 1 else array), f))
            apart = np.abs(told.reshape(array.shape).astype(int) - got.permute(1, 2, 0).numpy().astype(int)).max()
            assert apart <= most, (name, f)


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_a_pipeline_through_a_feed_does_not_depend_on_batch_or_split() -> None:
    """(seed, epoch, sample) alone: other batches and micro-batches give each sample the same image in the same epoch."""
    data = {"images": some(12), "ids": torch.arange(12)}
    augment = pipeline(["crop(2)", "flip", "cutout(3)", "randaugment(2, 9)"])
    found = []
    for batch, micro in ((12, 12), (4, 2), (3, 1)):
        feed = make_feed(
            as_source(data),
            batch=batch,
            micro_batch=micro,
            seed=3,
            keep_last=True,
            device=torch.device("cpu"),
            augment=augment,
        )
        images: dict[int, Tensor] = {}
        for window in feed.windows(0, 12 // batch):
            for part in window:
                images.update(zip(part["ids"].tolist(), part["images"], strict=True))
        found.append(torch.stack([images[i] for i in range(12)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], data["images"])


def test_a_pipeline_is_its_transforms_in_order_over_one_stream() -> None:
    images, texts = some(), ["erase(1)", "flip", "crop(1)"]
    draw = draws(range(6))
    wanted = images
    for text in texts:
        wanted = parse(text)(wanted, draw)
    assert torch.equal(pipeline(texts)({"images": images}, draws(range(6)))["images"], wanted)


def test_own_functions_tuples_and_other_names() -> None:
    images, labels = some(), torch.arange(6)
    own = lambda x, draw: x * draw(1).view(-1, 1, 1, 1)
    out = pipeline([own, "flip(1)"], inputs=0)((images, labels), draws(range(6)))
    scale = torch.from_numpy(uniforms(7, np.arange(6), 1)).view(-1, 1, 1, 1)
    assert isinstance(out, tuple) and out[1] is labels
    torch.testing.assert_close(out[0], (images * scale).flip(-1))


@pytest.mark.parametrize(
    "text, told",
    [
        ("flp", "Did you mean flip"),
        ("crop", "pad"),
        ("crop(1, 2, 3)", "pad"),
        ("crop(a)", "'a' is no number"),
        ("crop(nan)", "'nan' is no number"),
        ("crop(1.5)", "whole"),
        ("crop(-1)", "0 or more"),
        ("crop(most=1)", "pad"),
        ("flip(2)", "0 to 1"),
        ("erase(0.5, 0.3, 0.2)", "0.3 to 1"),
        ("zoom(0, 1)", "low"),
        ("rotate(200)", "0 to 180"),
        ("posterize(0)", "1 to 8"),
        ("randaugment(0)", "whole"),
        ("randaugment(2, 11)", "0 to 10"),
        ("flip(", "name(number"),
        ("", "name(number"),
    ],
)
def test_texts_that_cannot_be_read(text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        pipeline([text])
    assert told in " ".join(three_parts(caught.value))


@pytest.mark.parametrize(
    "batch",
    [
        {"images": torch.zeros(3, 4)},
        {"images": torch.zeros(3, 1, 4, 4, dtype=torch.int64)},
        {"pixels": torch.zeros(3, 1, 4, 4)},
        (torch.zeros(3, 1, 4, 4),),
        torch.zeros(3, 1, 4, 4),
    ],
)
def test_batches_without_images(batch: Any) -> None:
    with pytest.raises(DataError) as caught:
        pipeline(["flip"])(batch, draws(range(3)))
    three_parts(caught.value)


def test_reflection_beyond_the_image() -> None:
    with pytest.raises(DataError) as caught:
        parse("crop(8, reflect=true)")(some(), draws(range(6)))
    assert "9 x 8" in three_parts(caught.value)[1]


def test_augmented_images_are_frozen() -> None:
    """Golden sums: the same (seed, epoch, sample) gives the same images in every version, or a change says so."""
    key = seed_for(0, "augment", 0)
    out = pipeline(["crop(2)", "flip", "cutout(3)"])({"images": some()}, draws(range(6), key))["images"]
    assert [round(v, 4) for v in out.sum((1, 2, 3)).tolist()] == GOLDEN


GOLDEN = [57.7922, 61.0627, 62.0314, 71.4157, 78.3843, 75.0471]
