"""The recipe's words for how ranks share a model, and how ranks stand by them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import three_parts
from tests.models import mean_loss, mlp, points
from thalweg.core import Layout, Recipe, RecipeError, Task
from thalweg.core.changes import differences, refuse_changes
from thalweg.core.parallel import layout_of
from thalweg.engine import resolve


def refused(parallel: Any, world: int | None = None, on_each: int = 8) -> tuple[str, str, str]:
    with pytest.raises(RecipeError) as err:
        recipe = Recipe().override({"parallel": parallel})
        if world is not None:
            layout_of(recipe.parallel, world, on_each)
    return three_parts(err.value)


@pytest.mark.parametrize(
    ("parallel", "world", "on_each", "layout"),
    [
        ("ddp", 6, 6, Layout(data=6)),
        ("fsdp", 6, 2, Layout(shard=6)),
        ("hsdp", 6, 2, Layout(data=3, shard=2)),
        ({"data": 4, "tensor": 2}, 8, 8, Layout(data=4, tensor=2)),
        ({"tensor": 2}, 8, 8, Layout(data=4, tensor=2)),
        ({"shard": 4}, 8, 8, Layout(data=2, shard=4)),
        ({"shard": 4, "tensor": 2}, 8, 8, Layout(shard=4, tensor=2)),
        ({"data": 2, "shard": 2, "tensor": 2}, 8, 8, Layout(data=2, shard=2, tensor=2)),
    ],
)
def test_how_ranks_stand(parallel: Any, world: int, on_each: int, layout: Layout) -> None:
    assert layout_of(parallel, world, on_each) == layout
    assert layout.ranks == world and layout.feeds * layout.tensor == world
    places = [layout.place_of(rank) for rank in range(world)]
    assert sorted(set(places)) == places, "each rank has a place of its own"
    assert [layout.feed_of(rank) for rank in range(world)] == [d * layout.shard + s for d, s, _ in places]


def test_forms_by_name() -> None:
    forms = {form: layout_of(form, 8, 4) for form in ("ddp", "fsdp", "hsdp")}
    assert {form: layout.form for form, layout in forms.items() if layout} == {form: form for form in forms}
    assert layout_of("auto", 8, 8) is None


def test_a_table_takes_the_place_of_a_word_and_of_a_table() -> None:
    word = Recipe().override({"parallel.tensor": "2"})
    assert word.parallel == {"tensor": 2}
    assert word.override({"parallel": {"shard": 8}}).parallel == {"shard": 8}, "two tables are not mixed"
    assert word.override({"parallel": "ddp"}).parallel == "ddp"
    assert Recipe.from_toml("[parallel]\ndata = 2\ntensor = 2").parallel == {"data": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ("fsdp2", ("parallel='fsdp2' is not known", "ddp, fsdp, hsdp", "Did you mean fsdp?")),
        (4, ("parallel=4 is not a text", "int", "")),
        ("{data=4", ("parallel='{data=4'", "", "Known: auto")),
        ({}, ("parallel={} is not known", "no size", "data, shard, tensor")),
        ({"tensors": 2}, ("parallel={tensors=2}", "'tensors' is no side", "Did you mean tensor?")),
        ({"data": 0}, ("parallel.data=0", "from 1 on", "data=2")),
        ({"data": 2.0}, ("parallel.data=2.0", "whole number", "data=2")),
        ({"data": True}, ("parallel.data=True", "whole number", "data=2")),
    ],
)
def test_words_that_say_nothing(parallel: Any, words: tuple[str, str, str]) -> None:
    for part, word in zip(refused(parallel), words):
        assert word in part


@pytest.mark.parametrize(
    ("parallel", "world", "on_each", "words"),
    [
        (
            {"data": 4, "tensor": 2}, 6, 6,
            ("parallel={data=4, tensor=2} does not multiply out to 6 ranks.", "4 x 2 = 8; 6 ranks were started.",
             "Start 8 ranks, or let data be 3."),
        ),
        (
            {"data": 4, "tensor": 4}, 6, 6,
            ("does not multiply out to 6 ranks.", "4 x 4 = 16", "Start 16 ranks, or give sizes that multiply out to 6."),
        ),
        ({"tensor": 4}, 6, 6, ("{tensor=4} does not multiply out to 6 ranks.", "6 / 4 = 1.50.", "Start 8 ranks")),
        ({"tensor": 4}, 2, 2, ("{tensor=4} does not multiply out to 2 ranks.", "2 / 4 = 0.50.", "Start 4 ranks")),
        ("hsdp", 4, 4, ("'hsdp' shards on each machine", "All 4 ranks are on one machine.", "parallel='fsdp', or say")),
        ("hsdp", 6, 4, ("'hsdp' shards on each machine", "6 ranks are no whole number of machines with 4.", "{data=2")),
    ],
)  # fmt: skip
def test_ranks_that_cannot_stand_so(parallel: Any, world: int, on_each: int, words: tuple[str, str, str]) -> None:
    for part, word in zip(refused(parallel, world, on_each), words):
        assert word in part


def task() -> Task:
    return Task(model=mlp, loss=mean_loss, data=points(32))


def test_one_rank_is_told_and_trains() -> None:
    plan = resolve(task(), Recipe().override({"parallel": {"data": 4, "tensor": 2}, "train.steps": 1})).plan
    made = [(d.value, d.reason) for d in plan.decisions if d.path == "parallel"]
    assert made == [("{data=4, tensor=2}", "not used: one rank holds all of it, and it is the same run")]
    assert plan.layout == {} == type(plan).from_json(plan.to_json()).layout
    plain = resolve(task(), Recipe().override({"train.steps": 1})).plan
    assert not [d for d in plain.decisions if d.path == "parallel"]


def test_a_run_may_go_on_in_another_form(tmp_path: Any) -> None:
    now, before = Recipe().override({"parallel": "fsdp"}), Recipe()
    assert [change.path for change in differences(now, before)] == ["parallel"]
    refuse_changes(tmp_path, differences(now, before), ())
