"""Parameters that lie on ranks in parts (parallel="fsdp", "hsdp"): the run of one rank, and what is saved of it.

The processes are those of tests/test_ranks.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import parts_cases
from tests.conftest import three_parts
from tests.models import small_gpt
from tests.parts_cases import CASES, EXACT, go_on, one
from tests.test_ranks import close, four  # noqa: F401  (a fixture)
from thalweg.core import ModelError, Recipe
from thalweg.data import Items, Stream, Tensors, make_feed
from thalweg.data.share import Window
from thalweg.engine.fully import units
from thalweg.engine.together import check_parts
from thalweg.optim.shards import Piece

EXACT_TO = 1e-10


@pytest.fixture
def told(four: Any) -> Any:  # noqa: F811
    """What the ranks found, by case: of the first of them, or of all."""

    def of(*case: Any, ranks: int = 1) -> Any:
        found = [rank["parts", *case] for rank in four[0][:ranks]]
        return found[0] if ranks == 1 else found

    return of


@pytest.mark.parametrize("name", list(CASES))
def test_parts_are_the_same_run(name: str, told: Any) -> None:
    task, changes, num, _ = CASES[name]
    found = told(name, ranks=num)
    close(found[0], one((task, changes, 1, "ddp")))
    assert len({rank["digest"] for rank in found}) == 1, "all ranks end with the same weights, whole"


@pytest.mark.parametrize("name", list(EXACT))
def test_in_order_they_are_the_same_bits(name: str, told: Any) -> None:
    task, changes, num, _ = EXACT[name]
    wanted = one((task, changes, 1, "ddp"), exact_reduce=True)
    for rank in told("exact", name, ranks=num):
        for what in ("losses", "norms", "digest", "metrics"):
            assert rank[what] == wanted[what], what


def test_every_rule_is_the_update_of_one_rank(told: Any) -> None:
    for found in told("rules", ranks=2):
        assert len(found) > 30
        assert {name: gap for name, gap in found.items() if not gap <= EXACT_TO} == {}


def test_a_run_goes_on_in_any_form(told: Any, four: Any) -> None:  # noqa: F811
    """Stopped on 4 ranks with parts: on 1, on 2 with wholes, on 3 with parts. Stopped on 2 with wholes: on 4 in copies."""
    whole = go_on(None, "ddp")
    first = told("first", ranks=4)
    assert {tuple(one["steps"]) for one in first} == {(1, 2, 3, 4)} and first[0]["reason"] == "interrupted"
    alone = go_on(four[1] / "parts on 1", "ddp", resume=True)
    for again in (alone, told("on 2"), told("on 3"), told("on 4")):
        assert again["steps"] == [5, 6]
        later = {**whole, **{what: whole[what][4:] for what in ("losses", "norms", "steps", "weight")}}
        close({**again, "metrics": []}, {**later, "metrics": []})
        assert again["metrics"][-1] == pytest.approx(whole["metrics"][-1], abs=EXACT_TO)
        assert again["told"][0].startswith("The run began on ")


def test_gradients_are_summed_once_whatever_the_accumulation(told: Any) -> None:
    for found in (told("collectives", 8, ranks=2), told("collectives", 2, ranks=2)):
        assert found[0] == found[1]
    once, often = ({n: num for n, num in told("collectives", micro).items() if num} for micro in (8, 2))
    gather, scatter = (next(n for n in often if n.startswith(kind)) for kind in ("all_gather", "reduce_scatter"))
    units_of_it = 3  # two blocks and the rest
    assert once[scatter] == often[scatter] == units_of_it
    assert once["all_reduce"] == often["all_reduce"] == 2, "what was counted with the squares, and a word between steps"
    passes = 2 * units_of_it - 1  # blocks forward and backward; the rest stays whole in between
    assert (once[gather], often[gather]) == (passes, 4 * passes)
    assert once.keys() == {"all_reduce", gather, scatter} == often.keys()


def test_each_rank_holds_its_part(told: Any) -> None:
    whole = parts_cases.sizes("ddp")
    for mine in told("sizes", ranks=4):
        for purpose in ("parameters", "gradients", "slots"):
            assert mine[purpose] <= 0.26 * whole[purpose]


def test_the_model_comes_back_as_it_was_given(told: Any) -> None:
    wanted = parts_cases.model_of_the_users()
    for found in told("model", ranks=2):
        for what in ("same", "plain", "kinds", "keys", "called"):
            assert found[what] is True, what
        assert found["hooks"] == 1, "the user's own"
        assert found["losses"] == pytest.approx(wanted["losses"], abs=EXACT_TO)
        for name, tensor in wanted["weights"].items():
            assert float((found["weights"][name] - tensor).abs().max()) <= EXACT_TO


def test_what_cannot_be_in_parts_is_refused(told: Any) -> None:
    found = told("refused")
    assert "regularize.penalties (l1) are not possible" in found["penalties"] and "weight_decay" in found["penalties"]
    assert "1 of 5, such as 'scale', have no dimension" in found["number"]
    assert "1 layers, such as ''" in found["dtypes"]
    assert "ModelError: A weight is read outside of the layers that hold it" in found["weights"]
    assert "OutOfMemoryError: Memory ran out in a pass of 4 samples." in found["memory"]
    assert "smaller train.micro_batch" in found["memory"]


def test_a_run_goes_back_from_a_bad_sample(told: Any) -> None:
    found = told("rewound", ranks=2)
    words = " ".join(found[0]["told"])
    assert "Parameters lie on ranks in parts, so it was not gone through again" in words
    assert "Back to the weights of step 0" in words
    assert found[0]["steps"] == found[1]["steps"] and found[0]["digest"] == found[1]["digest"]


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "world"), [((7, 2), 3), ((2, 3), 4), ((8,), 4), ((1, 5), 2)])
def test_a_piece_is_cut_as_torch_cuts_it(shape: tuple[int, ...], world: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    piece = Piece(shape, world)
    chunks = [*whole.chunk(world), *[whole[:0]] * world][:world]
    for rank, chunk in enumerate(chunks):
        start, stop = piece.bounds(rank)
        assert torch.equal(whole.reshape(-1)[start:stop].view(piece.size(rank)), chunk)
        assert stop - start <= piece.room


def test_units_from_the_inside_out() -> None:
    model = small_gpt()
    assert units(model) == [*model.blocks, model]
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert units(model) == [model], "what blocks share belongs to the rest"
    model = small_gpt()
    for norm in (model.blocks[0].norm_mlp, model.norm):
        norm.double()
    assert units(model) == [model.blocks[0].norm_mlp, *model.blocks, model.norm, model], "one dtype at a time"


@pytest.mark.parametrize("kind", [Tensors, Items, Stream])
def test_a_share_knows_how_many_micro_batches_the_window_has(kind: Any) -> None:
    rows = [{"x": torch.tensor(float(i))} for i in range(11)]
    source = Tensors({"x": torch.arange(11.0)}) if kind is Tensors else kind(rows)
    feed = make_feed(source, batch=6, micro_batch=2, seed=0, keep_last=True, device=torch.device("cpu"), share=(3, 4))
    windows = list(feed.windows(0, 2))
    assert [len(w) for w in windows] == [0, 0] and all(isinstance(w, Window) for w in windows)
    assert [w.whole for w in windows] == [3, 3]


def test_a_number_is_named() -> None:
    with pytest.raises(ModelError) as err:
        check_parts(parts_cases.Scaled(), Recipe())
    assert "'scale'" in three_parts(err.value)[1]
    check_parts(nn.Linear(2, 2), Recipe())
