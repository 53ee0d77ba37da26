"""Data is a function of (seed, epoch, sample): from wherever and in whatever portions it is read (C2, C3)."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from tests.conftest import three_parts
from thalweg.core import DataError, seed_for
from thalweg.data import (
    Items,
    Order,
    Stream,
    Tensors,
    TokenWindows,
    as_source,
    batch_size,
    held_out,
    make_feed,
    permute,
    split,
    tensors,
    tree_map,
    uniforms,
)
from thalweg.data.draws import OwnRandom

CPU = torch.device("cpu")
often = settings(max_examples=60, deadline=None, database=None)
#: a change of any of these changes the order and the augmentation of every saved run
GOLDEN_SEEDS = [893442142816765029, 872543773227324228, 3945794333677031998, 6013509901951442402]
GOLDEN_PERMUTATION = [1, 7, 4, 6, 8, 5, 3, 9, 2, 0]
GOLDEN_WINDOWS = [[7, 2, 1, 9], [4, 3, 8, 5], [6, 0], [6, 3, 9, 2]]
GOLDEN_UNIFORMS = [
    [0.8432310819625854, 0.5672599673271179],
    [0.8305200338363647, 0.9569970965385437],
    [0.1738295555114746, 0.9110719561576843],
]
keys = st.integers(-(2**63), 2**63 - 1)


def feed_of(
    data: Any, *, batch: int = 4, micro_batch: int = 2, seed: int = 0, keep_last: bool = True, **rest: Any
) -> Any:
    source = as_source(data)
    return make_feed(source, batch=batch, micro_batch=micro_batch, seed=seed, keep_last=keep_last, device=CPU, **rest)


def same(a: Any, b: Any) -> bool:
    """Equal trees, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def kind_of(data: Any) -> str:
    """A test's name, the same in every process."""
    return repr(data) if isinstance(data, (str, bytes, int, float, type(None))) else type(data).__name__


def generators() -> tuple[Any, ...]:
    """What the caller's global generators would draw next; looking does not move them."""
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


def draw_everywhere() -> torch.Tensor:
    """One number of each global generator that a user's code may use."""
    return torch.tensor(
        [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()], dtype=torch.float64
    )


# --- streams ---------------------------------------------------------------------------------------------------------


def test_seeds_are_the_same_on_every_machine_and_in_every_version() -> None:
    """A change here changes the order and the dropout of every saved run."""
    assert seed_for(0) == GOLDEN_SEEDS[0]
    assert seed_for(0, "step", 12, 3) == GOLDEN_SEEDS[1]
    assert seed_for(-1, "order", 0) == GOLDEN_SEEDS[2]
    assert seed_for(2**63 - 1, "sample", 5, 2**40) == GOLDEN_SEEDS[3]


def test_no_two_places_share_a_seed() -> None:
    """rank 1 of epoch 0 is not rank 0 of epoch 1, and seed 1 is not seed 0 one step on (D19)."""
    names = [
        (seed, word, a, b)
        for seed in range(4)
        for word in ("step", "sample", "rank")
        for a in range(30)
        for b in range(30)
    ]
    assert len({seed_for(*name) for name in names}) == len(names)


def test_names_are_told_apart_by_kind_place_and_cut() -> None:
    names: list[tuple[Any, ...]] = [
        (),
        (1,),
        ("1",),
        (1, 1),
        ("11",),
        (11,),
        ("1", "1"),
        (0,),
        ("",),
        ("", ""),
        ("a", "b"),
        ("ab",),
    ]
    assert len({seed_for(7, *name) for name in names}) == len(names)
    assert seed_for(7, 8) != seed_for(8, 7)


@given(
    seed=keys,
    names=st.lists(st.one_of(keys, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=4),
)
@often
def test_a_seed_is_a_63_bit_number(seed: int, names: list[str | int]) -> None:
    assert 0 <= seed_for(seed, *names) < 2**63
    assert seed_for(seed, *names) == seed_for(seed, *names)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4097])
def test_permute_reaches_every_place_once(num: int) -> None:
    for key in (0, 1, 12345, -7):
        assert sorted(permute(num, key, np.arange(num)).tolist()) == list(range(num))


@given(num=st.integers(1, 3000), key=keys)
@often
def test_permute_is_a_permutation_for_any_key(num: int, key: int) -> None:
    assert sorted(permute(num, key, np.arange(num)).tolist()) == list(range(num))


@given(num=st.integers(1, 2**62), key=keys, data=st.data())
@often
def test_a_position_does_not_depend_on_what_else_is_asked(num: int, key: int, data: Any) -> None:
    asked = data.draw(st.lists(st.integers(0, num - 1), min_size=1, max_size=10, unique=True))
    together = permute(num, key, np.array(asked, dtype=np.int64)).tolist()
    assert together == [int(permute(num, key, np.array([p], dtype=np.int64))[0]) for p in asked]
    assert all(0 <= image < num for image in together)
    assert len(set(together)) == len(asked)


def test_a_shuffle_of_a_million_million_samples_holds_none_of_it() -> None:
    num = 10**12
    positions = np.array([0, 1, 2, 10**6, 5 * 10**11, num - 1], dtype=np.int64)
    tracemalloc.start()
    try:
        images = permute(num, 3, positions)
        order = Order(num, 8, seed=0, keep_last=True)
        windows = [order.window(step)[1] for step in (0, 10**11, order.steps_per_epoch - 1, order.steps_per_epoch)]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(images.tolist())) == len(positions) and images.min() >= 0 and images.max() < num
    assert [len(w) for w in windows] == [8, 8, 8, 8]
    assert peak_bytes < 64 << 20


def test_permutations_look_random() -> None:
    """Each position goes everywhere equally often over keys, and neighbours do not stay neighbours."""
    num, trials = 16, 3000
    images = np.stack([permute(num, seed_for(0, "trial", t), np.arange(num)) for t in range(trials)])
    counts = np.stack([np.bincount(images[:, p], minlength=num) for p in range(num)])
    chi2 = ((counts - trials / num) ** 2 / (trials / num)).sum(axis=1)
    assert chi2.max() < 60  # 15 degrees of freedom: mean 15, deviation 5.5
    steps = np.bincount(((images[:, 1:] - images[:, :-1]) % num).ravel(), minlength=num)
    wanted = steps.sum() / (num - 1)
    assert steps[0] == 0 and np.abs(steps[1:] / wanted - 1).max() < 0.1


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = [
        tuple(np.concatenate([Order(50, 50, seed=seed, keep_last=True).window(e)[1]]).tolist())
        for seed in range(5)
        for e in range(10)
    ]
    assert len(set(orders)) == 50
    assert tuple(range(50)) not in orders


def test_the_order_of_a_saved_run_does_not_change() -> None:
    assert permute(10, 7, np.arange(10)).tolist() == GOLDEN_PERMUTATION
    order = Order(10, 4, seed=3, keep_last=True)
    assert [order.window(step)[1].tolist() for step in range(4)] == GOLDEN_WINDOWS
    assert uniforms(11, np.array([0, 5, 10**12]), 2).tolist() == GOLDEN_UNIFORMS


@given(num=st.integers(1, 300), batch=st.integers(1, 64), seed=keys, epoch=st.integers(0, 1000))
@often
def test_an_epoch_that_keeps_its_last_window_covers_each_sample_once(
    num: int, batch: int, seed: int, epoch: int
) -> None:
    order = Order(num, batch, seed=seed, keep_last=True)
    assert order.steps_per_epoch == -(-num // batch)
    got = [order.window(epoch * order.steps_per_epoch + s) for s in range(order.steps_per_epoch)]
    assert {e for e, _ in got} == {epoch}
    assert [len(w) for _, w in got[:-1]] == [batch] * (len(got) - 1)
    assert len(got[-1][1]) == (num % batch or batch)
    assert sorted(np.concatenate([w for _, w in got]).tolist()) == list(range(num))


@given(num=st.integers(1, 300), batch=st.integers(1, 64), seed=keys, epoch=st.integers(0, 1000))
@often
def test_an_epoch_that_drops_its_last_window_has_whole_ones(num: int, batch: int, seed: int, epoch: int) -> None:
    order = Order(num, batch, seed=seed, keep_last=False)
    windows = [order.window(epoch * order.steps_per_epoch + s)[1] for s in range(order.steps_per_epoch)]
    if num < batch:  # fewer samples than a batch: one short window, or there would be no step at all
        assert [len(w) for w in windows] == [num]
    else:
        assert [len(w) for w in windows] == [batch] * (num // batch)
    flat = np.concatenate(windows).tolist()
    assert len(set(flat)) == len(flat) and min(flat) >= 0 and max(flat) < num


def test_the_samples_dropped_are_others_in_each_epoch() -> None:
    order = Order(10, 4, seed=0, keep_last=False)
    seen = {int(i) for step in range(40) for i in order.window(step)[1]}
    assert seen == set(range(10))


@given(num=st.integers(1, 200), batch=st.integers(1, 40), keep=st.booleans(), data=st.data())
@often
def test_steps_may_be_asked_in_any_order(num: int, batch: int, keep: bool, data: Any) -> None:
    order = Order(num, batch, seed=1, keep_last=keep)
    for step in data.draw(st.lists(st.integers(0, 5 * order.steps_per_epoch), min_size=1, max_size=12)):
        epoch, window = order.window(step)
        fresh_epoch, fresh = Order(num, batch, seed=1, keep_last=keep).window(step)
        assert epoch == fresh_epoch == order.epoch_of(step) == step // order.steps_per_epoch
        assert window.tolist() == fresh.tolist()


@given(num=st.integers(1, 200), batch=st.integers(1, 40), keep=st.booleans(), changing=st.booleans(), data=st.data())
@often
def test_windows_found_at_once_are_those_found_one_by_one(
    num: int, batch: int, keep: bool, changing: bool, data: Any
) -> None:
    sizes = data.draw(st.lists(st.integers(1, batch), min_size=60, max_size=60)) if changing else None
    order = Order(num, batch, seed=1, keep_last=keep, sizes=sizes)
    start = data.draw(st.integers(0, 20))
    stop = start + data.draw(st.integers(1, 30))
    while start < stop:
        epoch, found, lengths = order.windows(start, stop)
        assert lengths and sum(lengths) == len(found)
        for part in np.split(found, np.cumsum(lengths)[:-1]):
            one_epoch, window = order.window(start)
            assert (one_epoch, window.tolist()) == (epoch, part.tolist())
            start += 1
    assert start == stop


@pytest.mark.parametrize(
    ("num", "batch"), [(140_005, 97), (65_536 * 2, 64), (65_537, 65_536), (200_000, 70_000), (70_000, 1)]
)
def test_windows_are_whole_across_the_borders_of_blocks(num: int, batch: int) -> None:
    order = Order(num, batch, seed=2, keep_last=True)
    windows = [order.window(step)[1] for step in range(order.steps_per_epoch)]
    assert {len(w) for w in windows[:-1]} <= {batch} and len(windows[-1]) == (num % batch or batch)
    flat = np.concatenate(windows)
    assert np.array_equal(np.sort(flat), np.arange(num))
    assert np.array_equal(flat, permute(num, seed_for(2, "order", 0), np.arange(num)))
    joined, step = [], 0
    while step < order.steps_per_epoch:
        _, found, lengths = order.windows(step, order.steps_per_epoch)
        joined, step = [*joined, found], step + len(lengths)
    assert np.array_equal(np.concatenate(joined), flat)
    for step in (order.steps_per_epoch - 1, 0, order.steps_per_epoch // 2):
        assert np.array_equal(order.window(step)[1], windows[step])


# --- numbers for augmentation ----------------------------------------------------------------------------------------


@given(
    key=st.integers(0, 2**63 - 1),
    samples=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
    num=st.integers(1, 9),
)
@often
def test_uniforms_depend_on_key_sample_and_place_alone(key: int, samples: list[int], num: int) -> None:
    got = uniforms(key, np.array(samples, dtype=np.int64), num)
    assert got.shape == (len(samples), num) and got.dtype == np.float32
    assert got.min() >= 0 and got.max() < 1
    for row, sample in zip(got, samples):
        assert np.array_equal(row, uniforms(key, np.array([sample], dtype=np.int64), num)[0])
        assert np.array_equal(row, uniforms(key, np.array([sample], dtype=np.int64), num + 3)[0, :num])


def chi2_of(values: np.ndarray, bins: int) -> float:
    """Pearson's statistic of numbers in [0, 1), or of rows of them, over a grid of equal cells."""
    cells = (values.reshape(len(values), -1) * bins).astype(np.int64)
    index = cells @ (bins ** np.arange(cells.shape[1]))
    wanted = len(values) / bins ** cells.shape[1]
    return float(((np.bincount(index, minlength=bins ** cells.shape[1]) - wanted) ** 2).sum() / wanted)


@pytest.mark.parametrize("key", [0, 1, 2**62, 987654321])
def test_uniforms_are_uniform_and_independent(key: int) -> None:
    num = 40_000
    table = uniforms(key, np.arange(num), 4)
    for place in range(4):
        assert chi2_of(table[:, place], 64) < 63 + 8 * (2 * 63) ** 0.5
    pairs = {
        "places": table[:, :2],
        "far places": table[:, [0, 3]],
        "neighbouring samples": np.stack([table[:-1, 0], table[1:, 0]], 1),
        "diagonal": np.stack([table[:-1, 0], table[1:, 1]], 1),
        "neighbouring keys": np.stack([table[:, 0], uniforms(key + 1, np.arange(num), 1)[:, 0]], 1),
        "epochs": np.stack(
            [uniforms(seed_for(key, "augment", e), np.arange(num), 1)[:, 0] for e in (0, 1)],
            1,
        ),
    }
    for name, pair in pairs.items():
        assert chi2_of(pair, 8) < 63 + 8 * (2 * 63) ** 0.5, name
        assert abs(np.corrcoef(pair.T)[0, 1]) < 0.03, name
    assert abs(table.mean() - 0.5) < 0.005 and abs(table.var() - 1 / 12) < 0.002


def test_uniforms_of_different_keys_are_different_streams() -> None:
    streams = {uniforms(seed_for(0, "augment", epoch), np.arange(4), 4).tobytes() for epoch in range(200)}
    assert len(streams) == 200


def test_all_24_bits_of_a_uniform_vary() -> None:
    bits = (uniforms(5, np.arange(2000), 2).astype(np.float64) * 2**24).astype(np.int64)
    assert np.array_equal(bits, uniforms(5, np.arange(2000), 2).astype(np.float64) * 2**24)
    assert all(0.4 < ((bits >> b) & 1).mean() < 0.6 for b in range(24))


# --- trees -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Any
    y: Any


def test_trees_keep_their_kind() -> None:
    tree = {"a": Pair(torch.arange(4), [torch.arange(4), "text"]), "b": (torch.tensor(3), None)}
    doubled = tree_map(lambda t: t * 2, tree)
    assert isinstance(doubled["a"], Pair) and isinstance(doubled["a"].y, list) and isinstance(doubled["b"], tuple)
    assert doubled["a"].x.tolist() == [0, 2, 4, 6] and doubled["a"].y[1] == "text" and doubled["b"][1] is None
    assert [name for name, _ in tensors(tree)] == ["a.0", "a.1.0", "b.0"]
    assert batch_size(tree) == 4 and batch_size({"only": torch.tensor(1.0)}) == 1


@given(size=st.integers(1, 30), micro=st.integers(1, 12))
@often
def test_split_cuts_in_order_and_loses_nothing(size: int, micro: int) -> None:
    parts = split({"x": torch.arange(size), "scalar": torch.tensor(7)}, micro)
    assert [len(p["x"]) for p in parts] == [min(micro, size - at) for at in range(0, size, micro)]
    assert torch.cat([p["x"] for p in parts]).tolist() == list(range(size))
    assert all(int(p["scalar"]) == 7 for p in parts)


# --- sources ---------------------------------------------------------------------------------------------------------


class Plain(Dataset):
    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> int:
        return index


class Counting(IterableDataset):
    """Gives 0, 1, 2 ...; counts what was read of it."""

    def __init__(self, num: int) -> None:
        self.num, self.read = num, 0

    def __iter__(self) -> Iterator[int]:
        for i in range(self.num):
            self.read += 1
            yield i


class Gatherer:
    """In-memory samples of a user's own kind."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        return indices * 10


X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(10)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"x": X, "y": Y}, {"x": X[[7, 2]], "y": Y[[7, 2]]}),
        ((X, Y), (X[[7, 2]], Y[[7, 2]])),
        (X, X[[7, 2]]),
        (X.numpy(), X[[7, 2]]),
        ({"x": X.numpy(), "more": (Y.numpy(), X)}, {"x": X[[7, 2]], "more": (Y[[7, 2]], X[[7, 2]])}),
        (Pair(X, Y), Pair(X[[7, 2]], Y[[7, 2]])),
        (X.numpy()[::-1], X.flip(0)[[7, 2]]),
        (Y.to(torch.uint8), Y[[7, 2]].to(torch.uint8)),
        (Y.to(torch.uint16), Y[[7, 2]].to(torch.uint16)),
    ],
    ids=["dict", "tuple", "tensor", "array", "nested", "named tuple", "strided array", "uint8", "uint16"],
)
def test_tensors_are_gathered_as_one_batch(data: Any, wanted: Any) -> None:
    source = as_source(data)
    assert isinstance(source, Tensors) and len(source) == 10
    assert same(source.gather(torch.tensor([7, 2])), wanted)


def test_a_list_of_tensors_handed_to_Tensors_is_a_batch_of_lists() -> None:
    source = Tensors([X, Y])
    assert len(source) == 10
    assert same(source.gather(torch.tensor([1])), [X[[1]], Y[[1]]])
    assert source.nbytes() == X.nbytes + Y.nbytes


def test_a_list_is_a_list_of_samples() -> None:
    """As for torch's DataLoader: anything with a length and places is a data set."""
    source = as_source([(torch.tensor([1.0, 2.0]), 0), (torch.tensor([3.0, 4.0]), 1)])
    assert isinstance(source, Items) and len(source) == 2
    assert same(source.collate([source.dataset[1]]), [torch.tensor([[3.0, 4.0]]), torch.tensor([1])])
    assert len(as_source([torch.zeros(3)] * 5)) == 5


def test_a_tensor_without_rows_is_passed_on_or_refused() -> None:
    """A scalar beside the samples must not crash the first gather."""
    try:
        source = as_source({"x": X, "scale": torch.tensor(2.0)})
    except DataError as err:
        three_parts(err)
        return
    batch = source.gather(torch.tensor([1, 2]))
    assert torch.equal(batch["x"], X[[1, 2]]) and float(batch["scale"]) == 2.0
    window = next(iter(feed_of({"x": X, "scale": torch.tensor(2.0)}).windows(0, 1)))
    assert float(window[0]["scale"]) == 2.0


def test_read_only_arrays_are_taken_without_a_warning() -> None:
    """As np.load(mmap_mode="r") gives them."""
    array = np.arange(10.0)
    array.flags.writeable = False
    assert as_source(array).gather(torch.tensor([3])).tolist() == [3.0]


def test_a_data_set_and_a_loader_are_read_item_by_item() -> None:
    source = as_source(Plain(6))
    assert isinstance(source, Items) and len(source) == 6
    assert isinstance(as_source(TensorDataset(X, Y)), Items)


def test_a_loader_lends_its_data_set_and_its_collate_function() -> None:
    def sums(samples: list[int]) -> torch.Tensor:
        return torch.tensor([sum(samples)])

    loader = DataLoader(Plain(12), batch_size=5, shuffle=True, drop_last=True, collate_fn=sums)
    source = as_source(loader)
    assert isinstance(source, Items) and source.dataset is loader.dataset and len(source) == 12
    windows = list(feed_of(loader, batch=6, micro_batch=3).windows(0, 2))
    assert [len(w) for w in windows] == [2, 2]  # batch 6, not the loader's 5
    assert sum(int(m) for w in windows for m in w) == sum(range(12))


def test_a_loader_with_an_order_of_its_own_is_refused() -> None:
    """Its sampler would be ignored: the order is a function of seed, epoch and position."""
    sampler = WeightedRandomSampler([1.0, 2.0, 3.0], 3)
    with pytest.raises(DataError) as err:
        as_source(DataLoader(Plain(3), sampler=sampler))
    assert "WeightedRandomSampler" in three_parts(err.value)[1]


@pytest.mark.parametrize("data", [Plain(3), Counting(3)], ids=kind_of)
def test_augmentation_of_what_is_read_sample_by_sample_is_refused(data: Any) -> None:
    with pytest.raises(DataError) as err:
        feed_of(data, augment=lambda batch, draw: batch)
    assert "__getitem__" in three_parts(err.value)[2]


def test_a_loader_without_batches_of_its_own_is_collated_as_usual() -> None:
    source = as_source(DataLoader(Plain(3), batch_size=None))
    assert torch.equal(source.collate([1, 2]), torch.tensor([1, 2]))


def test_streams_are_read_in_their_own_order() -> None:
    assert isinstance(as_source(Counting(3)), Stream)
    assert isinstance(as_source(DataLoader(Counting(3), batch_size=2)), Stream)
    assert isinstance(as_source({3, 4}), Stream)


def test_a_loader_over_a_stream_lends_its_collate_function() -> None:
    loader = DataLoader(Counting(4), batch_size=2, collate_fn=lambda samples: torch.tensor(samples) * 100)
    assert next(iter(feed_of(loader, batch=4, micro_batch=4).windows(0, 1)))[0].tolist() == [0, 100, 200, 300]


def test_an_own_source_is_used_as_it_is() -> None:
    mine = Gatherer(8)
    assert as_source(mine) is mine
    window = next(iter(feed_of(mine, batch=8, micro_batch=8).windows(0, 1)))
    assert sorted(window[0].tolist()) == [10 * i for i in range(8)]


@pytest.mark.parametrize("kind", [Tensors({"x": X}), Items([1, 2]), Stream([1]), TokenWindows(torch.arange(9), 4)])
def test_a_source_stays_what_it_is(kind: Any) -> None:
    assert as_source(kind) is kind


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(0, 3),
        {"x": torch.zeros(0)},
        (np.zeros((0, 2)), np.zeros(0)),
        {},
        [],
        (),
        Plain(0),
        TensorDataset(torch.zeros(0, 2)),
        Gatherer(0),
        torch.tensor(3.0),
        {"x": torch.tensor(3.0)},
    ],
    ids=kind_of,
)
def test_empty_data_is_refused(data: Any) -> None:
    with pytest.raises(DataError) as err:
        as_source(data)
    three_parts(err.value)


@pytest.mark.parametrize(
    "data", [None, 3, object(), 2.5, {"x": "text"}, {"x": [1, 2]}, "data/train.bin", b"data/train.bin"], ids=kind_of
)
def test_what_holds_no_samples_is_refused(data: Any) -> None:
    """A path is a likely slip; read letter by letter it would be a data set of characters."""
    with pytest.raises(DataError) as err:
        as_source(data)
    three_parts(err.value)


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.array([{}, {}], dtype=object)], ids=["texts", "objects"])
def test_arrays_that_no_tensor_can_hold_are_refused(array: np.ndarray) -> None:
    for data in (array, {"x": array}):
        with pytest.raises(DataError) as err:
            as_source(data)
        three_parts(err.value)


def test_a_generator_is_refused() -> None:
    """It can be read once; a second epoch or a resumed run would find it empty."""
    for data in ((i for i in range(3)), iter([1, 2]), map(abs, [1]), zip([1], [2])):
        with pytest.raises(DataError) as err:
            as_source(data)
        asked, numbers, remedy = three_parts(err.value)
        assert "read once" in asked and type(data).__name__ in numbers and "__iter__" in remedy


def test_tensors_of_differing_length_are_refused_by_name() -> None:
    with pytest.raises(DataError) as err:
        as_source({"x": torch.zeros(5, 2), "deep": {"y": torch.zeros(4)}})
    _, numbers, _ = three_parts(err.value)
    assert "x: 5" in numbers and "deep.y: 4" in numbers


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_token_windows_cover_the_text_and_their_targets_follow(dtype: torch.dtype) -> None:
    windows = TokenWindows(torch.arange(22).to(dtype), 4)
    assert len(windows) == 5 and windows.tokens.dtype == dtype
    batch = windows.gather(torch.tensor([4, 0]))
    assert batch["tokens"].tolist() == [[16, 17, 18, 19], [0, 1, 2, 3]]
    assert batch["targets"].tolist() == [[17, 18, 19, 20], [1, 2, 3, 4]]
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64


@given(tokens=st.integers(2, 60), length=st.integers(1, 60))
@often
def test_token_windows_use_each_token_as_a_target_at_most_once(tokens: int, length: int) -> None:
    if tokens < length + 1:
        with pytest.raises(DataError) as err:
            TokenWindows(torch.arange(tokens), length)
        assert str(length + 1) in three_parts(err.value)[1]
        return
    windows = TokenWindows(torch.arange(tokens), length)
    targets = windows.gather(torch.arange(len(windows)))["targets"].flatten().tolist()
    assert targets == list(range(1, len(windows) * length + 1)) and tokens - 1 - len(targets) < length


@pytest.mark.parametrize("length", [0, -3])
def test_token_windows_without_length_are_refused(length: int) -> None:
    with pytest.raises(DataError) as err:
        TokenWindows(torch.arange(10), length)
    three_parts(err.value)


# --- windows from memory ---------------------------------------------------------------------------------------------


@given(
    num=st.integers(1, 60),
    batch=st.integers(1, 12),
    micro=st.integers(1, 12),
    keep=st.booleans(),
    seed=keys,
    ahead=st.integers(1, 70),
    start=st.integers(0, 40),
    count=st.integers(0, 12),
)
@often
def test_windows_from_memory_are_direct_gathers(
    num: int, batch: int, micro: int, keep: bool, seed: int, ahead: int, start: int, count: int
) -> None:
    """However much is gathered ahead, and from whatever step a run goes on."""
    source = Tensors({"x": torch.arange(num) * 3, "y": (torch.randn(num, 2),)})
    feed = feed_of(source, batch=batch, micro_batch=micro, seed=seed, keep_last=keep)
    feed.ahead = ahead
    got = list(feed.windows(start, start + count))
    assert len(got) == count
    order = Order(num, batch, seed=seed, keep_last=keep)
    for step, window in enumerate(got, start):
        indices = torch.from_numpy(order.window(step)[1])
        assert same(window, split(source.gather(indices), micro))
        assert [batch_size(m) for m in window] == [
            min(micro, len(indices) - at) for at in range(0, len(indices), micro)
        ]


def test_windows_of_tokens_are_direct_gathers() -> None:
    windows = TokenWindows(torch.arange(100, dtype=torch.uint8), 7)
    order = Order(len(windows), 4, seed=5, keep_last=True)
    for step, window in enumerate(feed_of(windows, batch=4, micro_batch=2, seed=5).windows(3, 9), 3):
        assert same(window, split(windows.gather(torch.from_numpy(order.window(step)[1])), 2))


@pytest.mark.parametrize(("floats_in_a_sample", "most"), [(1, 64), (1 << 14, 8), (1 << 22, 1)])
def test_only_a_few_megabytes_are_gathered_ahead(floats_in_a_sample: int, most: int) -> None:
    class Watched:
        def __init__(self) -> None:
            self.rows: list[int] = []

        def __len__(self) -> int:
            return 4000

        def gather(self, indices: torch.Tensor) -> torch.Tensor:
            self.rows.append(len(indices))
            return torch.zeros(1).expand(len(indices), floats_in_a_sample)

    watched = Watched()
    feed = feed_of(watched, batch=8, micro_batch=8)
    watched.rows.clear()
    list(feed.windows(0, 100))
    assert sum(watched.rows) == 800
    assert max(watched.rows) == 8 * most


def draws_of(
    num: int, *, batch: int, micro: int, start: int, stop: int, seed: int = 0
) -> dict[tuple[int, int], tuple[float, ...]]:
    """(epoch, sample) to what an augmentation drew for it."""

    def augment(batch: dict[str, torch.Tensor], draw: Any) -> dict[str, torch.Tensor]:
        return {**batch, "drawn": draw(3)}

    feed = feed_of({"sample": torch.arange(num)}, batch=batch, micro_batch=micro, seed=seed, augment=augment)
    order = Order(num, batch, seed=seed, keep_last=True)
    found = {}
    for step, window in enumerate(feed.windows(start, stop), start):
        for part in window:
            for sample, row in zip(part["sample"].tolist(), part["drawn"].tolist()):
                found[order.epoch_of(step), sample] = tuple(row)
    return found


@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (5, 5), (5, 2), (8, 4), (23, 23), (40, 3)])
def test_augmentation_draws_by_epoch_and_sample_alone(batch: int, micro: int) -> None:
    reference = draws_of(23, batch=23, micro=1, start=0, stop=3)
    steps = 3 * -(-23 // batch)
    assert draws_of(23, batch=batch, micro=micro, start=0, stop=steps) == reference
    tail = draws_of(23, batch=batch, micro=micro, start=steps // 2, stop=steps)
    assert tail and tail.items() <= reference.items()
    assert len(set(reference.values())) == 69  # no epoch and no sample draws like another


def test_augmentation_of_another_seed_draws_otherwise() -> None:
    one, two = (draws_of(9, batch=4, micro=2, start=0, stop=3, seed=seed) for seed in (0, 1))
    assert one.keys() == two.keys() and not set(one.values()) & set(two.values())


# --- windows of items ------------------------------------------------------------------------------------------------


class Noisy(Dataset):
    """Every sample draws from all three global generators, as augmentations do."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"sample": index, "drawn": draw_everywhere()}


class Rude(Noisy):
    """Seeds the global generators itself."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return {"sample": index, "drawn": draw_everywhere()}


@pytest.fixture(scope="module")
def noisy_reference() -> list[Any]:
    return list(feed_of(Noisy(11), batch=4, micro_batch=2, seed=5).windows(0, 9))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("start", [0, 4])
def test_workers_read_what_one_process_reads(workers: int, start: int, noisy_reference: list[Any]) -> None:
    got = list(feed_of(Noisy(11), batch=4, micro_batch=2, seed=5, workers=workers).windows(start, 9))
    assert same(got, noisy_reference[start:])


@pytest.mark.parametrize("start", range(9))
def test_a_run_that_goes_on_reads_the_tail(start: int, noisy_reference: list[Any]) -> None:
    random.seed(start)
    np.random.seed(start)
    assert same(list(feed_of(Noisy(11), batch=4, micro_batch=2, seed=5).windows(start, 9)), noisy_reference[start:])


def drawn_by_sample(windows: list[Any], steps_per_epoch: int) -> dict[tuple[int, int], tuple[float, ...]]:
    return {
        (step // steps_per_epoch, int(sample)): tuple(row.tolist())
        for step, window in enumerate(windows)
        for part in window
        for sample, row in zip(part["sample"], part["drawn"])
    }


@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (6, 3), (11, 11)])
def test_items_draw_by_epoch_and_sample_alone(batch: int, micro: int, noisy_reference: list[Any]) -> None:
    per_epoch = -(-11 // batch)
    got = list(feed_of(Noisy(11), batch=batch, micro_batch=micro, seed=5).windows(0, 3 * per_epoch))
    assert drawn_by_sample(got, per_epoch) == drawn_by_sample(noisy_reference, 3)


def test_each_sample_of_each_epoch_draws_its_own_numbers(noisy_reference: list[Any]) -> None:
    """From each of the three generators (D1, D2)."""
    drawn = drawn_by_sample(noisy_reference, 3)
    assert len(drawn) == 33
    for generator in range(3):
        assert len({row[generator] for row in drawn.values()}) == 33


def test_items_of_another_seed_draw_otherwise(noisy_reference: list[Any]) -> None:
    other = list(feed_of(Noisy(11), batch=4, micro_batch=2, seed=6).windows(0, 9))
    assert not set(drawn_by_sample(other, 3).values()) & set(drawn_by_sample(noisy_reference, 3).values())


@pytest.mark.parametrize("data", [Noisy(11), Rude(11)], ids=["draws", "seeds"])
def test_reading_items_leaves_the_callers_generators_alone(data: Dataset) -> None:
    feed = feed_of(data, batch=4, micro_batch=2)
    before = generators()
    windows = feed.windows(0, 4)
    for _ in range(4):
        next(windows)
        assert generators() == before
    assert list(windows) == [] and generators() == before


def test_a_sample_that_fails_leaves_the_callers_generators_alone() -> None:
    class Failing(Noisy):
        def __getitem__(self, index: int) -> Any:
            draw_everywhere()
            raise FileNotFoundError(f"sample {index} is gone")

    before = generators()
    with pytest.raises(DataError, match="is gone"):
        next(iter(feed_of(Failing(4)).windows(0, 1)))
    assert generators() == before


@pytest.mark.parametrize("keep", [True, False])
def test_items_come_in_the_order_of_memory(keep: bool) -> None:
    """Both kinds of feed follow the one order, short last windows included."""
    items = feed_of(Plain(10), batch=4, micro_batch=3, seed=9, keep_last=keep)
    memory = feed_of(torch.arange(10), batch=4, micro_batch=3, seed=9, keep_last=keep)
    assert same(list(items.windows(0, 7)), list(memory.windows(0, 7)))


def test_a_data_set_smaller_than_a_batch_has_short_windows_even_if_they_are_dropped() -> None:
    for data in (Plain(3), torch.arange(3), Counting(3)):
        windows = list(feed_of(data, batch=5, micro_batch=5, keep_last=False).windows(0, 2))
        assert [sorted(w[0].tolist()) for w in windows] == [[0, 1, 2], [0, 1, 2]]


def masking(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collate function that draws, as those for masked language models do."""
    drawn = [draw_everywhere() for _ in samples]
    return {"sample": torch.tensor([s["sample"] for s in samples]), "mask": torch.stack(drawn)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["items", "stream"])
def test_a_collate_function_draws_the_same_numbers_wherever_a_run_goes_on(workers: int, kind: str) -> None:
    loader = DataLoader(Noisy(11) if kind == "items" else NoisyStream(11), collate_fn=masking)
    whole = list(feed_of(loader, batch=4, micro_batch=2, seed=5).windows(0, 7))
    masks = torch.cat([part["mask"] for window in whole for part in window])
    assert len(masks) == 26 and all(len(set(drawn)) == 26 for drawn in masks.T.tolist())
    draw_everywhere()
    assert same(list(feed_of(loader, batch=4, micro_batch=2, seed=5, workers=workers).windows(4, 7)), whole[4:])


def test_collating_leaves_the_callers_generators_alone() -> None:
    for data in (DataLoader(Noisy(11), collate_fn=masking), DataLoader(NoisyStream(11), collate_fn=masking)):
        before = generators()
        list(feed_of(data).windows(0, 3))
        assert generators() == before, type(data.dataset).__name__


# --- windows of streams ----------------------------------------------------------------------------------------------


class NoisyStream(IterableDataset):
    """Draws while it is read, also before its first sample."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shift = draw_everywhere()
        for i in range(self.num):
            yield {"sample": i, "drawn": draw_everywhere() + shift}


@pytest.fixture(scope="module")
def stream_reference() -> list[Any]:
    return list(feed_of(NoisyStream(11), batch=4, micro_batch=2, seed=5).windows(0, 9))


@pytest.mark.parametrize("start", range(9))
def test_a_stream_that_goes_on_reads_the_tail(start: int, stream_reference: list[Any]) -> None:
    random.seed(start)
    np.random.seed(start)
    assert same(
        list(feed_of(NoisyStream(11), batch=4, micro_batch=2, seed=5).windows(start, 9)), stream_reference[start:]
    )


def test_a_stream_draws_anew_in_each_epoch_and_for_each_seed(stream_reference: list[Any]) -> None:
    other = list(feed_of(NoisyStream(11), batch=4, micro_batch=2, seed=6).windows(0, 9))
    drawn = [*drawn_by_sample(stream_reference, 3).values(), *drawn_by_sample(other, 3).values()]
    for generator in range(3):
        assert len({row[generator] for row in drawn}) == 66


def test_a_stream_draws_alike_whatever_the_portions(stream_reference: list[Any]) -> None:
    got = list(feed_of(NoisyStream(11), batch=11, micro_batch=4, seed=5).windows(0, 3))
    assert drawn_by_sample(got, 1) == drawn_by_sample(stream_reference, 3)


def test_reading_a_stream_leaves_the_callers_generators_alone() -> None:
    before = generators()
    windows = feed_of(NoisyStream(11)).windows(2, 6)
    for _ in range(4):
        next(windows)
        assert generators() == before


def test_what_the_caller_draws_between_windows_does_not_reach_a_stream(stream_reference: list[Any]) -> None:
    got = []
    for window in feed_of(NoisyStream(11), batch=4, micro_batch=2, seed=5).windows(0, 9):
        draw_everywhere()
        torch.manual_seed(77)
        got.append(window)
    assert same(got, stream_reference)


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (True, [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]),
        (False, [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]),
    ],
    ids=["keep", "drop"],
)
def test_windows_of_a_stream_never_cross_an_epoch(keep: bool, wanted: list[list[int]]) -> None:
    feed = feed_of(Counting(7), batch=3, micro_batch=2, keep_last=keep)
    got = list(feed.windows(0, 7))
    assert [torch.cat(w).tolist() for w in got] == wanted
    assert [[len(m) for m in w] for w in got] == [[2, 1] if len(w) == 3 else [1] for w in wanted]


def test_a_stream_is_not_read_beyond_the_last_step() -> None:
    """The next sample of a live stream may never come."""
    stream = Counting(100)
    list(feed_of(stream, batch=4, micro_batch=2).windows(0, 3))
    assert stream.read == 12


def test_skipped_windows_are_not_collated() -> None:
    seen: list[list[int]] = []
    loader = DataLoader(
        Counting(20), batch_size=1, collate_fn=lambda samples: seen.append(samples) or torch.tensor(samples)
    )
    assert [w[0].tolist() for w in feed_of(loader, batch=4, micro_batch=4).windows(3, 5)] == [
        [12, 13, 14, 15],
        [16, 17, 18, 19],
    ]
    assert seen == [[12, 13, 14, 15], [16, 17, 18, 19]]


def test_a_stream_without_samples_is_refused_rather_than_read_for_ever() -> None:
    with pytest.raises(DataError) as err:
        next(iter(feed_of(Counting(0)).windows(0, 1)))
    three_parts(err.value)


# --- held-out data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [torch.arange(10), Plain(10), Counting(10), list(range(10)), DataLoader(Plain(10), shuffle=True)],
    ids=kind_of,
)
@pytest.mark.parametrize("batch", [1, 4, 10, 99])
def test_held_out_data_is_read_once_and_in_order(data: Any, batch: int) -> None:
    batches = list(held_out(as_source(data), batch, CPU))
    assert torch.cat(batches).tolist() == list(range(10))
    assert [len(b) for b in batches] == [min(batch, 10 - at) for at in range(0, 10, batch)]


@pytest.mark.parametrize("data", [Noisy(7), NoisyStream(7)], ids=["items", "stream"])
def test_an_evaluation_is_the_same_each_time_and_leaves_the_callers_generators_alone(data: Any) -> None:
    """Whether a run is evaluated must not change it (D16), nor must what was drawn before change the evaluation."""
    before = generators()
    first = list(held_out(as_source(data), 3, CPU))
    after = generators()
    draw_everywhere()
    assert same(list(held_out(as_source(data), 3, CPU)), first)
    assert after == before


def test_an_augmentation_that_draws_twice_gets_other_numbers() -> None:
    drawn: list[torch.Tensor] = []

    def twice(batch: Any, draw: Any) -> Any:
        drawn.extend([draw(2), draw(1), draw(3)])
        return batch

    list(feed_of(torch.arange(6), batch=6, micro_batch=6, augment=twice).windows(0, 1))
    rows = torch.cat(drawn, dim=1)
    assert rows.shape == (6, 6) and len(set(rows.flatten().tolist())) == 36


def test_generators_are_the_callers_again_when_a_stream_of_numbers_cannot_begin() -> None:
    own = OwnRandom(3)
    before = generators()
    random_state = (3, tuple(range(624)) + (624,), None)
    own.go_on((random_state, np.random.get_state(), torch.zeros(3)))  # torch takes no such state
    with pytest.raises((TypeError, RuntimeError)), own:
        pass
    assert generators() == before
