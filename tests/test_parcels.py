"""What a worker sends comes as it was, and is whole whatever becomes of the sender."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.conftest import three_parts
from thalweg.core import DataError
from thalweg.data import parcels


class Pair(NamedTuple):
    x: Any
    y: Any


class Bag(dict):
    """A mapping of a user's own."""


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


TENSORS = [
    torch.arange(6).reshape(2, 3),
    torch.tensor(2.5, dtype=torch.float64),
    torch.zeros(0, 3),
    torch.tensor([True, False]),
    torch.tensor([1, 65535], dtype=torch.uint16),
    torch.arange(3).to(torch.bfloat16),
    torch.tensor([1 + 2j]),
    torch.tensor([1 + 2j]).conj(),
    torch.arange(12.0).reshape(3, 4).t(),
    torch.arange(10)[1::2],
    torch.zeros(1, 3).expand(4, 3),
    torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last),
    torch.randn(3, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn),
    torch.eye(3).to_sparse(),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=range(len(TENSORS)))
def test_tensors_come_as_they_were(tensor: torch.Tensor, link: Any) -> None:
    parcels.send(link[0], {"x": tensor})
    got = parcels.receive(link[1])["x"]
    assert got.dtype == tensor.dtype and got.shape == tensor.shape and got.layout == tensor.layout
    assert str(got.to_dense()) == str(tensor.to_dense())
    if (
        tensor.layout == torch.strided
        and tensor.numel()
        and 0 not in tensor.stride()
        and tensor.clone().stride() == tensor.stride()
    ):
        assert got.stride() == tensor.stride()  # other strides are other kernels, and other bits


def test_trees_of_all_kinds_come_as_they_were(link: Any) -> None:
    batch = Bag(a=Pair(torch.ones(3), [np.arange(4), "text"]), b=(None, np.array(["x", "yz"]), b"raw" * 1000))
    parcels.send(link[0], batch)
    got = parcels.receive(link[1])
    assert type(got) is Bag and type(got["a"]) is Pair and got["a"].x.tolist() == [1, 1, 1]
    assert (
        got["a"].y[0].tolist() == [0, 1, 2, 3] and got["b"][1].tolist() == ["x", "yz"] and got["b"][2] == b"raw" * 1000
    )
    got["a"].x[0] = 7  # a loss may change what it is given
    got["a"].y[0][0] = 7
    assert got["a"].x.tolist() == [7, 1, 1] and got["a"].y[0].tolist() == [7, 1, 2, 3]
    assert batch["a"].x.tolist() == [1, 1, 1]


def test_what_was_sent_is_whole_when_the_sender_is_gone(link: Any) -> None:
    """Larger than any socket's buffer; the sender need not wait for the receiver."""
    for number in range(3):
        parcels.send(link[0], torch.full((1_000_000,), number))
    link[0].close()
    assert [int(parcels.receive(link[1])[-1]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(EOFError):
        parcels.receive(link[1])


def test_batches_that_are_kept_hold_no_file_descriptors(link: Any) -> None:
    before = len(os.listdir("/dev/fd"))
    kept = []
    for _ in range(20):
        parcels.send(link[0], torch.zeros(10))
        kept.append(parcels.receive(link[1]))
    assert len(os.listdir("/dev/fd")) == before


def test_one_tensor_in_two_places_arrives_as_one(link: Any) -> None:
    x = torch.arange(4.0)
    parcels.send(link[0], {"a": x, "b": [x, x.clone()]})
    got = parcels.receive(link[1])
    got["a"] += 1
    assert got["b"][0] is got["a"] and got["b"][1].tolist() == [0, 1, 2, 3]


def test_a_nested_tensor_is_refused_or_comes_whole(link: Any) -> None:
    parts = [torch.ones(2, 3), torch.zeros(1, 3)]
    parcels.send(link[0], torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert [part.tolist() for part in parcels.receive(link[1]).unbind()] == [part.tolist() for part in parts]
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor(parts)
    with pytest.raises(TypeError, match="nested tensors of this layout"):
        parcels.send(link[0], [nested])


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    """Leaves room for so many files to be opened."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []

    def fill(room: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 64, old[1]))
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(room):
            os.close(held.pop())

    yield fill
    for fd in held:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, old)


@pytest.mark.parametrize(("room", "said"), [(0, "cut off the descriptor"), (1, "cannot be opened")])
def test_a_receiver_that_may_open_no_more_files_says_so(
    room: int, said: str, link: Any, few_files: Callable[[int], None]
) -> None:
    parcels.send(link[0], torch.ones(3))
    few_files(room)
    with pytest.raises(DataError) as err:
        parcels.receive(link[1])
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "A batch of a data worker cannot be taken." and said in numbers and "ulimit -n" in remedy
    assert f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files" in numbers
