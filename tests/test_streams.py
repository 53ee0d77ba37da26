"""Streams: a run that goes on through the data's own state reads the same bits as one that was never interrupted."""

from __future__ import annotations

import json
import random
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.conftest import three_parts
from tests.models import mlp
from tests.test_data import Counting, Noisy, NoisyStream, draw_everywhere, feed_of, generators, same
from tests.test_workers import Told
from thalweg import Split, train
from thalweg.core import DataError, FeedState
from thalweg.data import ChangedFeed, Stream, as_source, held_out, streams
from thalweg.data.coded import Uncodable, decode, encode

#: torchdata calls a function of torch that says so since 2.13
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
often = settings(max_examples=40, deadline=None, database=None)


def carried(state: FeedState | None) -> FeedState:
    """A state as it comes out of a checkpoint: JSON and safetensors."""
    assert state is not None
    return FeedState(json.loads(json.dumps(state.facts, allow_nan=False)), load(save(state.tensors)))


# --- states as plain data --------------------------------------------------------------------------------------------

ARRAYS = [np.arange(3, dtype=f"{kind}{bits}") for kind in ("u", "i") for bits in "1248"]
ARRAYS += [np.array([1.5, np.nan], dtype=kind) for kind in ("f2", "f4", "f8")] + [np.array(True), np.zeros((0, 3))]
TENSORS = [torch.arange(6).reshape(2, 3), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(True)]
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([*ARRAYS, *TENSORS, np.float64(2.5), np.int64(-3), np.uint32(7), float("-inf")]),
)
hashable = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.tuples(st.integers(), st.text()))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(hashable, max_size=3),
        st.frozensets(hashable, max_size=3),
        st.dictionaries(hashable, inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)


def as_it_was(a: Any, b: Any) -> bool:
    """The same types and the same bits, in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.view(-1).tolist().__repr__() == b.view(-1).tolist().__repr__()
        )
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return as_it_was(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(as_it_was(x, y) for x, y in zip(a, b))
    return repr(a) == repr(b) if isinstance(a, float) else a == b


@given(value=values)
@settings(max_examples=200, deadline=None, database=None)
def test_plain_states_come_back_as_they_were(value: Any) -> None:
    facts, tensors = encode(value)
    there = carried(FeedState(facts, tensors))
    assert as_it_was(decode(there.facts, there.tensors), value)


def test_the_states_of_all_generators_can_be_carried() -> None:
    value = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    there = carried(FeedState(*encode(value)))
    assert as_it_was(decode(there.facts, there.tensors), value)


def test_a_state_is_a_copy() -> None:
    live = {"buffer": torch.zeros(2), "seen": [1]}
    facts, tensors = encode(live)
    live["buffer"] += 1
    live["seen"].append(2)
    assert as_it_was(decode(facts, tensors), {"buffer": torch.zeros(2), "seen": [1]})
    again = decode(facts, tensors)
    again["buffer"] += 1
    assert as_it_was(decode(facts, tensors)["buffer"], torch.zeros(2))


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, object()]}, "state['a'][1] is a builtins.object"),
        ({"f": len}, "state['f'] is a builtins.builtin_function_or_method"),
        (Text("a"), "state is a tests.test_streams.Text"),
        ({Path("a"): 1}, "Path"),
        (np.array(["a"]), "numpy <U1"),
        (np.array([object()]), "numpy object"),
        (np.array([1], dtype=">i4"), "numpy >i4"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, requires_grad=True), "gradient"),
    ],
    ids=range(10),
)
def test_what_is_not_plain_is_refused_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(Uncodable) as err:
        encode(value)
    assert place in str(err.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"kind": "pickle", "value": "x"},
        {},
        {"kind": "tensor", "value": "t9"},
        {"kind": "bytes", "value": 3},
        {"kind": "bytes", "value": "?"},
        {"kind": "dict", "value": [1]},
        {"kind": ["tuple"], "value": 1},
        {"kind": "set", "value": [[]]},
        {"kind": "float", "value": "x"},
        {"kind": "tuple"},
    ],
    ids=str,
)
def test_a_state_that_encode_did_not_make_is_refused(facts: Any) -> None:
    with pytest.raises(ValueError):
        decode(facts, {})


# --- streams with a state --------------------------------------------------------------------------------------------


class Lines:
    """Its state is its place; each sample draws from the global generators."""

    def __init__(self, num: int) -> None:
        self.num, self.at, self.first, self.loaded = num, 0, 0, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.first, first = 0, self.first
        self.at = first
        return self._from(first)

    def _from(self, first: int) -> Iterator[dict[str, Any]]:
        for i in range(first, self.num):
            self.at = i + 1
            yield {"sample": i, "drawn": draw_everywhere()}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state["at"]
        self.loaded += 1


class Epochs(Lines):
    """Knows the epoch, and reads backwards in every second one; loaded after an end, it begins the next epoch."""

    epoch, ended, goes_on = -1, True, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.goes_on:
            self.epoch, self.first = self.epoch + 1, 0
        self.goes_on = self.ended = False
        return super().__iter__()

    def _from(self, first: int) -> Iterator[dict[str, Any]]:
        for sample in super()._from(first):
            yield sample if self.epoch % 2 == 0 else {**sample, "sample": self.num - 1 - sample["sample"]}
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": (self.epoch, b"x", np.int64(3)), "ended": self.ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.epoch, self.goes_on = state["epoch"][0], not state["ended"]


class Shard(IterableDataset):
    """Each worker reads every ``num_workers``-th sample, and knows its place."""

    def __init__(self, num: int, *, draws: bool) -> None:
        self.num, self.draws, self.at, self.first = num, draws, 0, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        mine = range(number, self.num, workers)
        first, self.first = self.first, 0
        for place in range(first, len(mine)):
            self.at = place + 1
            yield {"sample": mine[place], "drawn": draw_everywhere() if self.draws else torch.tensor(0.5)}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state["at"]


def loader(num: int, workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(Shard(num, draws=not workers), batch_size=None, num_workers=workers)


KINDS = {
    "lines": Lines,
    "epochs": Epochs,
    "loader": lambda num: loader(num, 0),
}


def reads(make: Any, stops: list[int], **options: Any) -> list[Any]:
    """All windows up to the last stop; at each of the others a new process goes on through the state."""
    got: list[Any] = []
    state, start = None, 0
    for stop in stops:
        feed = feed_of(make(), seed=5, **options)
        feed.tell = Told()
        if state is not None:
            next(iter(feed.windows(0, 1)))  # as the checks before step 1 do
            feed.restore(start, state)
            assert carried(feed.state(start)) is not None  # asked before anything is read
        windows = feed.windows(start, stops[-1])
        for _ in range(start, stop):
            got.append(next(windows))
        state, start = carried(feed.state(stop)), stop
        assert not feed.tell
    return got


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(
    num=st.integers(1, 9),
    batch=st.integers(1, 5),
    stops=st.lists(st.integers(1, 14), min_size=1, max_size=4, unique=True).map(sorted),
)
@often
def test_a_stream_that_goes_on_through_its_state_reads_the_same_bits(
    kind: str, keep: bool, num: int, batch: int, stops: list[int]
) -> None:
    options = {"batch": batch, "micro_batch": 2, "keep_last": keep}
    whole = list(feed_of(KINDS[kind](num), seed=5, **options).windows(0, stops[-1]))
    assert same(reads(lambda: KINDS[kind](num), stops, **options), whole)


@pytest.mark.parametrize("stops", [[1, 2, 9], [3, 9], [4, 5, 6, 9]], ids=str)
def test_a_loader_whose_workers_read_shards_goes_on_through_its_state(stops: list[int]) -> None:
    """11 samples in windows of 4: the third is an epoch's end."""
    whole = list(feed_of(loader(11, 2), seed=5).windows(0, 9))
    assert sorted(i for window in whole[:3] for part in window for i in part["sample"].tolist()) == list(range(11))
    assert same(reads(lambda: loader(11, 2), stops), whole)


def test_going_on_through_a_state_reads_nothing_twice() -> None:
    lines = Lines(1000)
    feed = feed_of(lines)
    windows = feed.windows(0, 100)
    for _ in range(50):
        next(windows)
    state = carried(feed.state(50))
    other = Lines(1000)
    again = feed_of(other)
    again.restore(50, state)
    assert next(again.windows(50, 100))[0]["sample"].tolist() == [200, 201]
    assert other.loaded == 1 and other.at == 204


def test_windows_of_changing_sizes_go_on_through_a_state() -> None:
    sizes = [2, 2, 4, 4, 3, 1, 4, 4, 4]
    whole = list(feed_of(Lines(9), seed=5, sizes=sizes).windows(0, 9))
    assert same(reads(lambda: Lines(9), [2, 5, 9], sizes=sizes), whole)


def test_a_changed_feed_has_the_state_of_the_feed_below() -> None:
    feed = ChangedFeed(feed_of(Lines(9)), [])
    feed.tell, feed.stop = Told(), lambda: False
    assert feed.feed.tell is feed.tell and feed.feed.stop is feed.stop
    next(feed.windows(0, 3))
    state = carried(feed.state(1))
    other = ChangedFeed(feed_of(Lines(9)), [])
    other.restore(1, state)
    assert next(other.windows(1, 3))[0]["sample"].tolist() == [4, 5]
    assert other.samples(0) is None
    assert ChangedFeed(feed_of(torch.arange(9)), []).samples(2) == feed_of(torch.arange(9)).samples(2)


def test_asking_for_a_state_leaves_the_callers_generators_alone() -> None:
    class Drawing(Lines):
        def state_dict(self) -> dict[str, Any]:
            draw_everywhere()
            return super().state_dict()

    feed = feed_of(Drawing(9))
    next(feed.windows(0, 3))
    before = generators()
    assert feed.state(1) is not None and generators() == before


@pytest.mark.parametrize(
    "data", [torch.arange(9), Noisy(9), Counting(9), NoisyStream(9)], ids=lambda d: type(d).__name__
)
def test_data_without_a_state_has_none(data: Any) -> None:
    feed = feed_of(data)
    feed.tell = Told()
    next(iter(feed.windows(0, 3)))
    assert feed.state(1) is None and not feed.tell
    if feed.samples(1) is not None:
        feed.restore(1, FeedState({}, {}))
        assert len(list(feed.windows(1, 3))) == 2


class Strange(Lines):
    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "file": Path("a")}


class Refusing(Lines):
    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("not this one")


@pytest.mark.parametrize(
    ("data", "why"),
    [(Strange(9), "state['data']['file'] is a pathlib."), (Refusing(9), "NotImplementedError: not this one")],
    ids=["strange", "refusing"],
)
def test_a_state_that_cannot_be_kept_is_told_once(data: Any, why: str) -> None:
    feed = feed_of(data)
    feed.tell = Told()
    windows = feed.windows(0, 3)
    for step in (1, 2):
        next(windows)
        assert feed.state(step) is None
    ((name, text, _),) = feed.tell
    assert name == "data" and why in text and "reads up to its step" in text


class Onward:
    """One place for all its iterators, which go on from there, as in torchdata; begins anew after an end."""

    def __init__(self, num: int, bad: int = -1) -> None:
        self.num, self.bad, self.at, self.fail = num, bad, 0, (-1, OSError)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < self.num:
            i = self.at
            if i == self.fail[0]:
                raise self.fail[1]("broken")
            self.at += 1
            x = torch.full((6,), i / self.num) * (float("nan") if i == self.bad else 1)
            yield {"x": x, "y": torch.tensor(i), "drawn": draw_everywhere()}
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_readers_of_one_iterable_do_not_disturb_each_other() -> None:
    """As regularize.precise and the checks before step 1 do; the state is the run's all the while."""
    for make in (Onward, Lines):
        whole = list(feed_of(make(9), seed=5).windows(0, 9))
        feed = feed_of(make(9), seed=5)
        feed.tell = Told()
        got = []
        windows = feed.windows(0, 9)
        for step in range(9):
            assert same(list(feed.windows(0, step % 4)), whole[: step % 4])
            list(held_out(feed.source, 2, torch.device("cpu")))
            got.append(next(windows))
            list(feed.windows(0, 2))
            again = feed_of(make(9), seed=5)
            again.restore(step + 1, carried(feed.state(step + 1)))
            assert same(list(again.windows(step + 1, 9)), whole[step + 1 :])
        assert same(got, whole) and not feed.tell


@pytest.mark.parametrize("known", [(), (2,), (2, 3), (6,)], ids=str)
def test_going_back_reads_what_was_read_there(known: tuple[int, ...]) -> None:
    whole = list(feed_of(Onward(9), seed=5).windows(0, 9))
    feed = feed_of(Onward(9), seed=5)
    windows = feed.windows(0, 9)
    for step in range(1, 8):
        next(windows)
        if step in known:
            assert feed.state(step) is not None
    assert same(list(feed.windows(4, 9)), whole[4:])
    assert same(list(feed.windows(0, 9)), whole)


def samples_of(data: Any, **changes: Any) -> list[list[int]]:
    """What each step of a run trains on."""
    seen = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(batch["y"].tolist())
        return model(batch["x"]).square().mean()

    recipe = {"train.batch": 4, "train.micro_batch": 4, "train.steps": 8, "precision": "fp32", "optimizer.lr": 1e-4}
    train(
        normed,
        loss,
        Split(train=data, test=Onward(3)) if "regularize.precise" in changes else data,
        {**recipe, **changes},
    )
    return trained(seen)


def trained(seen: list[list[int]]) -> list[list[int]]:
    """Without the first window's readings by the checks before step 1."""
    checks = [at for at, samples in enumerate(seen) if samples == [0, 1, 2, 3]][:3]
    return seen[checks[-1] :]


def normed() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.BatchNorm1d(2))


def test_a_run_reads_an_iterable_with_one_place_in_its_own_order() -> None:
    plain = [[(4 * step + i) % 32 for i in range(4)] for step in range(8)]
    assert samples_of(Onward(32)) == plain
    data = Onward(32)
    assert samples_of(data) == plain and samples_of(data) == plain
    rewinds = {"guard.nonfinite": "rewind", "guard.every": 2}
    assert samples_of(Onward(32, bad=18), **rewinds) == samples_of(Plain(32, bad=18), **rewinds)
    averaged = {"regularize.average": 0.9, "regularize.precise": 2, "evaluate.every": 2, "evaluate.batch": 4}
    assert samples_of(Onward(32), **averaged) == plain


class Plain:
    """The same samples, without a state."""

    def __init__(self, num: int, bad: int = -1) -> None:
        self.num, self.bad = num, bad

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(Onward(self.num, self.bad))


@pytest.mark.parametrize("error", [OSError, MemoryError, KeyboardInterrupt])
def test_within_a_window_there_is_no_state(error: type[BaseException]) -> None:
    """The samples read for it are gone: a state of then would lose them."""
    for asked in (False, True):
        data = Onward(64)
        feed = feed_of(data, seed=5)
        feed.tell = Told()
        windows = feed.windows(0, 9)
        for _ in range(3):
            next(windows)
        before = feed.state(3) if asked else None
        data.fail = (14, error)
        with pytest.raises((DataError, MemoryError, KeyboardInterrupt)):
            next(windows)
        assert feed.state(3) is before
        assert asked or "within a window" in feed.tell[0][1]


def test_a_run_whose_stream_broke_off_loses_no_sample(tmp_path: Path) -> None:
    seen = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(batch["y"].tolist())
        return model(batch["x"]).square().mean()

    recipe = {"train.batch": 4, "train.micro_batch": 4, "train.steps": 6, "precision": "fp32", "checkpoint.every": 100}
    data = Onward(64)
    data.fail = (14, OSError)
    with pytest.raises(DataError, match="broke off"):
        train(mlp, loss, data, recipe, folder=tmp_path / "run")
    data.fail = (-1, OSError)
    for again in (data, Onward(64)):
        shutil.copytree(tmp_path / "run", tmp_path / f"run-{len(seen)}")
        train(mlp, loss, again, recipe, folder=tmp_path / f"run-{len(seen)}", resume=True)
    rest = [[4 * step + i for i in range(4)] for step in range(3, 6)]
    seen = [samples for samples in seen if samples != [0, 1, 2, 3]]  # which the checks before step 1 read too
    assert seen == [[4, 5, 6, 7], [8, 9, 10, 11]] + rest + rest


class Late(Onward):
    """Knows no state before it is read."""

    is_read = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.is_read = True
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        if not self.is_read:
            raise AttributeError("no iterator yet")
        return super().state_dict()


def test_data_that_cannot_be_read_from_its_beginning_again_is_refused() -> None:
    feed = feed_of(Late(9))
    next(iter(feed.windows(0, 1)))
    with pytest.raises(DataError) as err:
        next(feed.windows(0, 1))
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "The data cannot be read from its beginning again."
    assert "AttributeError: no iterator yet" in numbers and "before the first iter()" in remedy


def test_data_that_does_not_go_back_to_its_beginning_is_refused() -> None:
    class Forgets(Onward):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            if not state["at"]:
                raise KeyError("at")

    with pytest.raises(DataError) as err:
        next(feed_of(Forgets(9)).windows(0, 1))
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "The data does not go back to its beginning." and "KeyError: 'at'" in numbers
    assert "load_state_dict()" in remedy


def test_a_reader_whose_place_could_not_be_kept_does_not_go_on() -> None:
    class Once(Onward):
        def state_dict(self) -> dict[str, Any]:
            if self.at:
                raise OSError("gone")
            return super().state_dict()

    feed = feed_of(Once(9))
    windows = feed.windows(0, 9)
    next(windows)
    list(feed.windows(0, 1))
    with pytest.raises(DataError) as err:
        next(windows)
    asked, numbers, remedy = three_parts(err.value)
    assert "read from elsewhere meanwhile" in asked and "At step 1" in numbers and "OSError: gone" in numbers
    assert "state_dict()" in remedy


def test_data_that_lost_its_state_dict_is_read_up_to_the_step() -> None:
    feed = feed_of(Lines(9))
    next(feed.windows(0, 3))
    state = carried(feed.state(1))
    other = feed_of(Counting(9))
    other.tell = Told()
    other.restore(1, state)
    assert torch.cat(next(other.windows(1, 3))).tolist() == [4, 5, 6, 7]
    assert "no load_state_dict() any more" in other.tell[0][1]


def test_data_that_does_not_take_its_state_is_an_error() -> None:
    class Changed(Lines):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("shards")

    feed = feed_of(Lines(9))
    next(feed.windows(0, 3))
    other = feed_of(Changed(9))
    other.restore(1, carried(feed.state(1)))
    with pytest.raises(DataError) as err:
        next(other.windows(1, 3))
    asked, numbers, remedy = three_parts(err.value)
    assert asked == "The data does not take its saved state." and "At step 1: KeyError: 'shards'" in numbers
    assert "load_state_dict" in remedy


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_a_loader_with_a_state_is_read_itself_only_over_an_iterable() -> None:
    data = Noisy(11)
    assert as_source(StatefulDataLoader(data, batch_size=3)).dataset is data
    stateful = loader(11, 0)
    assert as_source(stateful).iterable is stateful and as_source(stateful).stateful
    plain = DataLoader(Shard(11, draws=True), batch_size=3)
    assert as_source(plain).iterable is plain.dataset


def test_a_map_style_data_set_in_a_loader_with_a_state_is_in_our_order() -> None:
    for workers in (0, 2):
        stateful = StatefulDataLoader(Noisy(11), batch_size=3, num_workers=workers)
        assert same(list(feed_of(stateful, seed=5).windows(4, 7)), list(feed_of(Noisy(11), seed=5).windows(4, 7)))


def test_a_loader_with_a_state_that_makes_batches_is_refused() -> None:
    with pytest.raises(DataError) as err:
        as_source(StatefulDataLoader(Shard(11, draws=True), batch_size=3))
    asked, numbers, remedy = three_parts(err.value)
    assert "makes batches" in asked and "batch_size=3" in numbers and "batch_size=None" in remedy


def test_the_length_of_a_loader_is_that_of_its_data_set() -> None:
    class Known(Shard):
        def __len__(self) -> int:
            return self.num

    assert as_source(loader(11, 0)).num == 0
    assert Stream(StatefulDataLoader(Known(11, draws=False), batch_size=None)).num == 11


# --- reading up to a step --------------------------------------------------------------------------------------------


def test_reading_up_to_a_step_is_told_and_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_TELL_SECONDS", 0.0)
    feed = feed_of(Counting(10))
    feed.tell = Told()
    assert torch.cat(next(feed.windows(5, 9))).tolist() == [8, 9]
    texts = [text for _, text, _ in feed.tell]
    assert texts[0] == "Reading up to step 5 of the stream: 4 of 20 samples passed."
    assert texts[-1].startswith("Step 5 of the stream is reached: 18 samples in ") and len(texts) == 6
    assert feed.tell[-1][2]["samples"] == 18


def test_a_short_way_is_not_told() -> None:
    feed = feed_of(Counting(10))
    feed.tell = Told()
    next(feed.windows(5, 9))
    assert not feed.tell


@pytest.mark.parametrize("make", [Counting, Lines])
def test_a_wish_to_stop_is_heard_on_the_way(make: Any) -> None:
    stream = make(10**9)
    feed = feed_of(stream)
    left = iter(range(100))
    feed.stop = lambda: next(left, None) is None
    assert list(feed.windows(10**8, 10**8 + 1)) == [] and feed.state(10**8) is None


def test_a_wish_to_stop_is_heard_within_a_window_where_nothing_is_lost() -> None:
    for make, read in ((Counting, [4, 5]), (Lines, [4, 5, 6, 7])):
        stream = make(100)
        feed = feed_of(stream)
        windows = feed.windows(0, 9)
        next(windows)
        feed.stop = lambda stream=stream: getattr(stream, "read", 0) >= 6
        rest = list(next(windows, []))
        assert (rest == []) == (read == [4, 5])


# --- streams that break off ------------------------------------------------------------------------------------------


def test_a_stream_that_breaks_off_says_where() -> None:
    class Broken(NoisyStream):
        def __iter__(self) -> Iterator[Any]:
            for i, sample in enumerate(super().__iter__()):
                if i == 6:
                    raise OSError("the connection was lost")
                yield sample

    before = generators()
    windows = feed_of(Broken(11)).windows(0, 9)
    next(windows)
    with pytest.raises(DataError) as err:
        next(windows)
    asked, numbers, _ = three_parts(err.value)
    assert asked == "The stream broke off."
    assert numbers == "In epoch 0, after 6 samples of it, for step 2: OSError: the connection was lost."
    assert isinstance(err.value.__cause__, OSError) and generators() == before


def test_memory_that_ran_out_in_a_stream_stays_what_it_is() -> None:
    class Large(Lines):
        def _from(self, first: int) -> Iterator[Any]:
            raise MemoryError("too much")
            yield

    with pytest.raises(MemoryError, match="too much"):
        next(feed_of(Large(9)).windows(0, 1))


def test_samples_of_a_stream_that_cannot_be_put_together_are_told_with_the_step() -> None:
    class Ragged(Lines):
        def _from(self, first: int) -> Iterator[Any]:
            yield from ([0] * (1 + (i == 5)) for i in range(9))

    with pytest.raises(DataError) as err:
        list(feed_of(Ragged(9)).windows(0, 2))
    assert "In step 2: RuntimeError: each element in list of batch should be of equal size" in three_parts(err.value)[1]
