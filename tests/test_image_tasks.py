"""The tasks of small images: their net, their files, what is said where these are not what they should be."""

from __future__ import annotations

import io
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import three_parts
from thalweg.core import DataError, ModelError, RecipeError
from thalweg.recipes import find_task, recipe_for
from thalweg.recipes.models.quicknet import QuickNet


def test_the_net_takes_any_size_and_bytes_as_floats() -> None:
    net = QuickNet(3, 10, stem=8, patch=2, widths=(8, 12), mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.2, 0.3)).eval()
    byte = torch.randint(0, 256, (2, 3, 16, 20), dtype=torch.uint8)
    assert net(byte).shape == (2, 10)
    torch.testing.assert_close(net(byte), net(byte.float() / 255))
    assert QuickNet(1, 7, residual=True)(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    x = QuickNet(1, 7, scale=0.5).eval()
    twice = QuickNet(1, 7, scale=1.0).eval()
    twice.load_state_dict(x.state_dict())
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(2 * x(images), twice(images))


def test_a_net_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="has no block"):
        QuickNet(widths=())


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_fewer_images_than_none_are_refused(name: str) -> None:
    with pytest.raises(RecipeError) as err:
        find_task(name).data(limit=-1)
    assert "data.options.limit=-1" in three_parts(err.value)[0]


def test_fashion_mnist_is_read_as_bytes(shared_data: Path) -> None:
    task = find_task("fashion_mnist")
    split = task.data(limit=100)
    assert split.train["images"].shape == (100, 1, 28, 28) and split.train["images"].dtype == torch.uint8
    assert len(split.test["labels"]) == 10_000 and split.facts["sha256"] == "5b6d2c4c694a9188"
    assert recipe_for(task).initialise.whiten == ("stem",)


def _npy() -> bytes:
    """One array, where an archive of them should be."""
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:.*is not the file that the figures")
def test_a_file_that_is_not_fashion_mnist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "fashion_mnist.npz", x_train=np.zeros(3))
    monkeypatch.setenv("THALWEG_DATA", str(tmp_path))
    with pytest.raises(DataError) as err:
        find_task("fashion_mnist").data()
    assert "is not Fashion-MNIST" in three_parts(err.value)[0]
    for rotten in (b"", b"words", np.lib.format.magic(1, 0), b"PK\x03\x04" + bytes(100), _npy()):
        (tmp_path / "fashion_mnist.npz").write_bytes(rotten)
        with pytest.raises(DataError) as err:
            find_task("fashion_mnist").data()
        assert "allow_pickle" not in three_parts(err.value)[1], "nobody is told to load a file unsafely"


@pytest.fixture
def few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six training and two test images as the task's files; a cache of its own."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "data" / "cifar10_jpg"
    folder.mkdir(parents=True)
    index = {}
    for part, num in (("train", 6), ("test", 2)):
        offsets, packed = [0], b""
        for k in range(num):
            out = io.BytesIO()
            image.fromarray(np.full((32, 32, 3), (40 * k, 100, 200), dtype=np.uint8)).save(out, "JPEG", quality=95)
            packed += out.getvalue()
            offsets.append(len(packed))
        (folder / f"{part}.jpgs.xz").write_bytes(lzma.compress(packed))
        index |= {f"off_{part}": np.array(offsets), f"y_{part}": np.arange(num, dtype=np.uint8)}
    np.savez(folder / "index.npz", **index)
    monkeypatch.setenv("THALWEG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*is not the file that the figures")
def test_cifar10_is_decoded_once_and_kept(
    few_images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = find_task("cifar10")
    first = task.data(limit=4)
    assert (
        f"decoded once, which takes seconds, and kept in {few_images / 'cache' / 'thalweg' / 'cifar10-'}"
        in capsys.readouterr().err
    )
    assert first.train["images"].shape == (4, 3, 32, 32) and first.train["labels"].tolist() == [0, 1, 2, 3]
    channels = first.train["images"].float().mean((2, 3))
    torch.testing.assert_close(channels[3], torch.tensor([120.0, 100.0, 200.0]), rtol=0, atol=4.0)
    assert len(first.test["labels"]) == 2
    monkeypatch.setattr("thalweg.recipes.cifar10._images", None)  # nothing is decoded again
    assert torch.equal(task.data().train["images"][:4], first.train["images"])
    assert not capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*is not the file that the figures")
def test_a_cache_that_is_damaged_is_made_anew(few_images: Path) -> None:
    task = find_task("cifar10")
    first = task.data()
    (kept,) = (few_images / "cache" / "thalweg").iterdir()
    kept.write_bytes(b"half of one")
    assert torch.equal(task.data().train["images"], first.train["images"])
    np.savez(few_images / "data" / "cifar10_jpg" / "index.npz", y_train=np.zeros(1))
    kept.unlink()
    with pytest.raises(DataError, match="is not CIFAR-10"):
        task.data()


@pytest.mark.filterwarnings("ignore:.*is not the file that the figures")
@pytest.mark.parametrize("name", ["index.npz", "train.jpgs.xz"])
def test_files_of_cifar10_that_are_cut_off_are_named(few_images: Path, name: str) -> None:
    path = few_images / "data" / "cifar10_jpg" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as err:
        find_task("cifar10").data()
    assert name in three_parts(err.value)[0]


@pytest.mark.filterwarnings("ignore:.*is not the file that the figures")
def test_what_is_no_picture_is_named(few_images: Path) -> None:
    path = few_images / "data" / "cifar10_jpg" / "train.jpgs.xz"
    path.write_bytes(lzma.compress(bytes(len(lzma.decompress(path.read_bytes())))))
    with pytest.raises(DataError) as err:
        find_task("cifar10").data()
    assert "cifar10_jpg is not CIFAR-10" in three_parts(err.value)[0]
