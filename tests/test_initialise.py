"""What layers begin with where the recipe says so: against formulas in float64, and through whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thalweg
from thalweg.core import ModelError, Recipe, RecipeError, Split
from thalweg.engine.initialise import filters_that_whiten, make_dirac, make_orthogonal

EIGHT = {"train.steps": 2, "train.batch": 8, "train.epochs": None, "precision": "fp32", "optimizer.lr": 1e-3}


class Small(nn.Module):
    def __init__(self, filters: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, filters, 2, stride=2, padding=1, bias=False)
        self.inner = nn.Conv2d(filters, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.stem((images - 0.3) / 0.2))
        return self.head(torch.relu(self.inner(x)).mean((2, 3)))


def data(num: int = 16) -> Split:
    images = torch.rand(num, 1, 6, 8, generator=torch.Generator().manual_seed(3))
    images[..., 1:] += images[..., :-1]  # neighbours hang together
    return Split(train={"images": images, "labels": torch.arange(num) % 3})


def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch["images"]), batch["labels"])


def trained(changes: dict[str, Any], net: Any = Small, **words: Any) -> thalweg.Result:
    return thalweg.train(net, loss, data(), {k: v for k, v in {**EIGHT, **changes}.items() if v is not None}, **words)


def whitened_slowly(images: np.ndarray, size: int, filters: int, eps: float) -> np.ndarray:
    """One patch after the other, in float64; rows up to their sign."""
    patches = []
    for image in (images.astype(np.float64) - 0.3) / 0.2:
        for y in range(image.shape[1] - size + 1):
            for x in range(image.shape[2] - size + 1):
                patches.append(image[:, y : y + size, x : x + size].ravel())
    centred = np.array(patches) - np.mean(patches, axis=0)
    second = sum(np.outer(p, p) for p in centred) / len(centred)
    values, vectors = np.linalg.eigh(second)
    first = np.argsort(values)[::-1][: filters // 2]
    return np.array([vectors[:, k] / np.sqrt(values[k] + eps * np.mean(np.diag(second))) for k in first])


def test_a_stem_whitens_what_it_reads_and_stays_so() -> None:
    result = trained({"initialise.whiten": ["stem"], "initialise.whiten_samples": 16, "initialise.whiten_eps": 0.01})
    got = result.model.stem.weight.detach().flatten(1).double().numpy()
    wanted = whitened_slowly(data().train["images"].numpy(), 2, 8, 0.01)
    np.testing.assert_array_equal(got[4:], -got[:4])
    signs = np.sign((got[:4] * wanted).sum(1, keepdims=True))
    np.testing.assert_allclose(got[:4] * signs, wanted, rtol=2e-4, atol=2e-5)
    assert not result.model.stem.weight.requires_grad
    assert "stem.weight" not in {row.name for row in result.plan.parameters}
    assert any(d.path == "initialise.whiten" and d.value == ["stem"] for d in result.plan.decisions)


def test_only_the_samples_asked_for_are_looked_at() -> None:
    one, two = (trained({"initialise.whiten": ["stem"], "initialise.whiten_samples": n}) for n in (8, 16))
    assert not torch.equal(one.model.stem.weight, two.model.stem.weight)


def test_filters_that_train_begin_as_those_that_do_not() -> None:
    free = trained({"initialise.whiten": ["stem"], "initialise.whiten_freeze": False, "optimizer.lr": 1e-12})
    kept = trained({"initialise.whiten": ["stem"]})
    torch.testing.assert_close(free.model.stem.weight, kept.model.stem.weight, rtol=0, atol=1e-9)
    assert "stem.weight" in {row.name for row in free.plan.parameters}


def test_outputs_of_whitening_filters_are_uncorrelated_with_variance_one() -> None:
    mix = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    second = mix @ mix.T
    filters = filters_that_whiten(second, 12, 1e-12)[:6]
    torch.testing.assert_close(filters @ second @ filters.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_resumed_run_measures_nothing_and_keeps_the_frozen_filters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"initialise.whiten": ["stem"], "train.steps": 4, "checkpoint.every": 2}
    whole = trained(changes, folder=tmp_path / "run").model.state_dict()
    monkeypatch.setattr("thalweg.engine.initialise.filters_that_whiten", None)
    resumed = trained(changes, folder=tmp_path / "run", resume=2)
    assert resumed.records[0].step == 3
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    assert not resumed.model.stem.weight.requires_grad


@pytest.mark.parametrize(("filters", "channels"), [(6, 4), (3, 5), (4, 4)])
def test_dirac_hands_channels_on_and_leaves_the_rest(filters: int, channels: int) -> None:
    layer = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
    before = layer.weight.detach().clone()
    make_dirac(layer.weight)
    some, images = min(filters, channels), torch.randn(2, channels, 5, 5)
    assert torch.equal(layer(images)[:, :some], images[:, :some])
    assert torch.equal(layer.weight[some:], before[some:])


def test_dirac_in_groups() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
    make_dirac(layer.weight, 2)
    images = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(images), images)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 3, 2, 2), (5, 1, 2)])
def test_orthogonal_rows_or_columns_of_the_length_asked_for(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape, dtype=torch.float64)
    make_orthogonal(weight, 1.5, torch.Generator().manual_seed(0))
    flat = weight.flatten(1)
    gram = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
    torch.testing.assert_close(gram, 1.5**2 * torch.eye(len(gram), dtype=torch.float64))


def test_names_are_patterns_and_the_seed_decides() -> None:
    still = {"optimizer.lr": 1e-12, "initialise.dirac": ["in*"], "initialise.orthogonal": ["head"]}
    one, same, other = (trained({**still, "seed": seed}).model for seed in (1, 1, 2))
    assert torch.equal(one.head.weight, same.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    torch.testing.assert_close(one.head.weight @ one.head.weight.T, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.inner.weight[0, 0, 1, 1], torch.tensor(1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.9])
def test_data_that_does_not_vary_cannot_be_whitened(value: float) -> None:
    flat = Split(train={"images": torch.full((16, 1, 6, 8), value), "labels": torch.arange(16) % 3})
    still = {"train.steps": 2, "train.batch": 8, "precision": "fp32", "initialise.whiten": ["0"]}
    net = lambda: nn.Sequential(nn.Conv2d(1, 8, 2), nn.Flatten(), nn.Linear(8 * 35, 3))
    with pytest.raises(ModelError) as err:
        thalweg.train(net, loss, flat, still)
    assert "nothing to whiten" in err.value.asked and "16 samples" in err.value.numbers and err.value.remedy


def test_a_layer_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ModelError) as err:
        trained({"initialise.whiten": ["stem"], "initialise.orthogonal": ["s*", "inner"]})
    assert "stem would begin in 2 ways" in err.value.asked
    assert "initialise.orthogonal and initialise.whiten" in err.value.numbers and err.value.remedy


def test_weights_that_are_given_stay(tmp_path: Path) -> None:
    net = Small()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    result = trained({"initialise.whiten": ["stem"], "weights": str(tmp_path / "net.pt")})
    assert torch.equal(result.model.stem.weight, net.stem.weight) and not result.model.stem.weight.requires_grad
    assert any(d.path == "initialise" and "weights are given" in d.reason for d in result.plan.decisions)


@pytest.mark.parametrize(
    ("changes", "net", "asked", "numbers", "remedy"),
    [
        ({"initialise.whiten": ["stam"]}, Small, "names 'stam'", "has 2 that could be: stem, inner", "patterns"),
        ({"initialise.dirac": ["head"]}, Small, "initialise.dirac names 'head'", "stem, inner", "patterns"),
        ({"initialise.whiten": ["stem"]}, lambda: Small(10), "given to stem", "10 filters in 1 groups", "up to 8"),
        ({"initialise.whiten": ["stem"]}, lambda: Small(5), "given to stem", "5 filters", "even number"),
    ],
)
def test_what_cannot_begin_so_is_refused(changes: Any, net: Any, asked: str, numbers: str, remedy: str) -> None:
    with pytest.raises(ModelError) as err:
        trained(changes, net)
    assert asked in err.value.asked and numbers in err.value.numbers and remedy in err.value.remedy


def test_a_layer_that_no_pass_comes_by_cannot_whiten() -> None:
    net = Small()
    net.spare = nn.Conv2d(1, 8, 2)
    with pytest.raises(ModelError) as err:
        trained({"initialise.whiten": ["spare"]}, net)
    assert "given to spare" in err.value.asked and "does not come by it" in err.value.numbers


@pytest.mark.parametrize(("name", "value"), [("whiten_samples", 0), ("whiten_eps", 0.0), ("gain", -1.0)])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"initialise\.{name}={value}"):
        Recipe().override({f"initialise.{name}": value})


def test_a_step_of_ones_own_loop_refuses_it() -> None:
    with pytest.raises(RecipeError, match=r"initialise\.whiten is out of TrainStep's reach"):
        thalweg.TrainStep(Small(), loss, Recipe().override({"initialise.whiten": ["stem"]}))
