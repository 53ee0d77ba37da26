"""A recipe is data: complete, printable, checked when it is read, and every mistake in it is answered in three parts."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import string
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, three_parts
from thalweg.core import (
    Decision,
    Guard,
    ParameterRow,
    Plan,
    Recipe,
    RecipeError,
    Registry,
    did_you_mean,
    divisors,
    human_bytes,
    human_count,
    human_seconds,
)
from thalweg.core.guard import NONFINITE
from thalweg.core.initialise import Initialise
from thalweg.core.recipe import (
    COMPILED,
    MEMORY_FORMATS,
    PRECISIONS,
    RECOMPUTED,
    RELEASES,
    SLOT_FORMS,
    Checkpoint,
    Data,
    Evaluate,
    Optimizer,
    Regularize,
    Schedule,
    Train,
)

often = settings(max_examples=30, deadline=None, database=None)


def table_fields() -> list[tuple[str, type, Any]]:
    """(dotted path, the class it belongs to, its type) of every field of a recipe that is not itself a table of fields."""
    found = []
    for name, kind in typing.get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(kind):
            found += [(f"{name}.{inner}", kind, hint) for inner, hint in typing.get_type_hints(kind).items()]
        else:
            found.append((name, Recipe, kind))
    return found


FIELDS = table_fields()
TABLES = {name: kind for name, kind in typing.get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}


def nested(path: str, value: Any) -> dict[str, Any]:
    """The tree with one value at a dotted path."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def value_at(recipe: Recipe, path: str) -> Any:
    for name in [part.strip('"') for part in re.findall(r'"[^"]*"|[^.]+', path)]:
        recipe = recipe[name] if isinstance(recipe, dict) else getattr(recipe, name)
    return recipe


def refused(act: Any, *arguments: Any, **named: Any) -> tuple[str, str, str]:
    with pytest.raises(RecipeError) as err:
        act(*arguments, **named)
    return three_parts(err.value)


# --- valid recipes ---------------------------------------------------------------------------------------------------

words = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
finite = st.floats(0, 1e300, allow_subnormal=True)
int64 = st.integers(-(2**63), 2**63 - 1)
counts = st.integers(0, 10**6)
#: texts that are no TOML value: those that are have a test of their own
plain_texts = (
    st.text(string.ascii_letters + " .-äß☃\n\"'\\", max_size=10).map("t".__add__).filter(lambda t: t != "true")
)
option_values = st.recursive(
    st.one_of(st.booleans(), int64, st.floats(allow_nan=False, allow_infinity=False), plain_texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, min_size=1, max_size=3)),
    max_leaves=6,
)
options = st.dictionaries(words, option_values, max_size=4)
maybe = lambda values: st.one_of(st.none(), values)


@st.composite
def trains(draw: st.DrawFn) -> Train:
    batch = draw(st.integers(1, 5000))
    return Train(
        steps=draw(maybe(st.integers(1, 10**9))),
        epochs=draw(maybe(st.floats(1e-9, 1e9))),
        batch=batch,
        micro_batch=draw(maybe(st.sampled_from([*divisors(batch), "auto"]))),
        clip=draw(finite),
        last=draw(st.sampled_from(["keep", "drop"])),
    )


recipes = st.builds(
    Recipe,
    seed=int64,
    device=st.sampled_from(["auto", "cpu", "cuda:1"]),
    precision=st.sampled_from(["auto", *PRECISIONS]),
    islands=maybe(st.sampled_from([("norm",), ("logits", "head.*"), ()])),
    memory_budget=maybe(st.sampled_from(["12GiB", "800 MB", "4096"])),
    weights=st.sampled_from(["w.pt", "runs/digits"]),
    weights_rename=st.lists(st.sampled_from(["=net", "model=", "a=b.c"]), max_size=3).map(tuple),
    recompute=maybe(st.sampled_from(RECOMPUTED)),
    compile=st.sampled_from(COMPILED),
    steps_per_call=st.one_of(st.just("auto"), st.integers(1, 64)),
    memory_format=st.sampled_from(MEMORY_FORMATS),
    threads=maybe(st.integers(1, 99)),
    exact_reduce=st.booleans(),
    parallel=st.sampled_from(["auto", "fsdp", {"data": 4, "tensor": 2}]),
    tensor_plan=options,
    model=options,
    loss=options,
    train=trains(),
    optimizer=st.builds(
        Optimizer,
        rule=words,
        lr=maybe(finite),
        weight_decay=finite,
        decay_form=st.sampled_from([None, "decoupled", "coupled"]),
        slots=maybe(st.sampled_from(SLOT_FORMS)),
        release_gradients=maybe(st.sampled_from(RELEASES)),
        offload=maybe(st.booleans()),
        no_decay=st.lists(st.from_regex(r"[a-z0-9.*?\[\]]{1,9}", fullmatch=True), max_size=4).map(tuple),
        options=options,
    ),
    schedule=st.builds(Schedule, lr=plain_texts),
    regularize=st.builds(Regularize, average=st.floats(0, 1, exclude_max=True)),
    initialise=st.builds(Initialise, whiten_samples=st.integers(1, 9), gain=st.floats(0.1, 9)),
    data=st.builds(
        Data, workers=counts, timeout=st.floats(0, 1e9), bucket=counts, folder=maybe(words), options=options
    ),
    evaluate=st.builds(
        Evaluate,
        every=maybe(counts),
        batch=maybe(st.integers(1, 1000)),
        best=words,
        goal=st.sampled_from([None, "min", "max"]),
        target=maybe(finite),
    ),
    checkpoint=st.builds(
        Checkpoint, every=maybe(counts), keep_last=st.integers(1, 99), keep_best=counts, keep_every=counts
    ),
    guard=st.builds(
        Guard,
        nonfinite=st.sampled_from(NONFINITE),
        spike=st.just("rewind"),
        deviations=st.floats(0, 1e6, exclude_min=True),
        window=st.integers(8, 999),
        patience=st.integers(1, 99),
        every=st.integers(1, 999),
        rewinds=st.integers(1, 99),
    ),
)


@given(recipe=recipes)
@often
def test_a_recipe_comes_back_from_toml_and_from_a_dict(recipe: Recipe) -> None:
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(recipe=recipes, other=recipes)
@often
def test_a_recipe_is_overridden_by_another_ones_values(recipe: Recipe, other: Recipe) -> None:
    assert recipe.override({}) == recipe
    empty = dataclasses.replace(
        recipe,
        model={},
        loss={},
        optimizer=dataclasses.replace(recipe.optimizer, options={}),
        data=dataclasses.replace(recipe.data, options={}),
        train=Train(),
    )
    merged = empty.override({**dict.fromkeys(("train.steps", "evaluate.every"), "auto"), **other.flat()})
    for path, value in other.flat().items():
        assert merged.flat()[path] == value, path


@given(recipe=recipes, other=recipes)
@often
def test_a_difference_names_each_path_that_differs_and_no_other(recipe: Recipe, other: Recipe) -> None:
    assert recipe.diff(recipe) == []
    rows = recipe.diff(other)
    assert [(path, theirs, mine) for path, mine, theirs in rows] == other.diff(recipe)
    assert (not rows) == (recipe.to_dict() == other.to_dict())
    assert [path for path, _, _ in rows] == sorted({path for path, _, _ in rows})
    for path, mine, theirs in rows:
        assert mine != theirs and recipe.flat().get(path) == mine and other.flat().get(path) == theirs


def test_a_difference_says_which_value_is_whose() -> None:
    mine = Recipe().override({"optimizer.lr": 0.1, "model.width": 3})
    theirs = Recipe().override({"train.micro_batch": 8, "model.width": 4})
    assert mine.diff(theirs) == [
        ("model.width", 3, 4),
        ("optimizer.lr", 0.1, None),
        ("train.micro_batch", None, 8),
    ]


def test_an_empty_recipe_is_the_default_one() -> None:
    assert Recipe.from_toml("") == Recipe() == Recipe.from_dict({})
    assert Recipe().train.batch == 64 and Recipe().optimizer.rule == "adamw"


def test_what_a_file_leaves_out_comes_from_the_base(tmp_path: Path) -> None:
    base = Recipe().override(
        {"seed": 3, "train.batch": 96, "train.micro_batch": 32, "model.width": 5, "model.depth": 2}
    )
    path = tmp_path / "recipe.toml"
    path.write_text('[train]\nmicro_batch = 16\n[model]\nwidth = 7\n[optimizer]\nno_decay = ["1d"]\n', encoding="utf-8")
    recipe = Recipe.from_file(path, base=base)
    assert (recipe.seed, recipe.train.batch, recipe.train.micro_batch) == (3, 96, 16)
    assert recipe.model == {"width": 7, "depth": 2} and recipe.optimizer.no_decay == ("1d",)
    assert Recipe.from_file(str(path), base=None).seed == 0


def test_a_value_of_the_base_can_be_left_to_the_plan_again() -> None:
    base = Recipe().override({"optimizer.slots": "int8", "optimizer.lr": 0.1, "optimizer.decay_form": "coupled"})
    for back in ("auto", None):
        asked = {"optimizer.slots": back, "optimizer.lr": back, "optimizer.decay_form": back}
        assert base.override(asked) == Recipe()
    assert Recipe.from_toml('[optimizer]\nslots = "auto"', base=base).optimizer.slots is None


def test_a_micro_batch_that_is_measured_is_a_word_of_its_own() -> None:
    """Left to the plan it is the whole batch; "auto" is what fits."""
    base = Recipe().override({"train.micro_batch": 32})
    assert base.override({"train.micro_batch": None}) == Recipe()
    assert Recipe.from_toml('[train]\nmicro_batch = "auto"', base=base).train.micro_batch == "auto"


@pytest.mark.parametrize(
    "model",
    [
        {"version": "12"},
        {"mode": "true"},
        {"day": "2024-01-01"},
        {"rate": "nan"},
        {"list": "[1, 2]"},
        {"quoted": '"x"'},
        {"empty": ""},
    ],
    ids=lambda m: next(iter(m)),
)
def test_a_text_among_the_options_stays_a_text(model: dict[str, Any]) -> None:
    """A recipe that was saved must come back as what the model was built with."""
    recipe = Recipe(model=model)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()).model == model
    assert recipe.override({"seed": 0}).model == model


@pytest.mark.parametrize(
    "model",
    [{"inner": {}}, {"inner": {"a.b": 1}}, {"a.b": 1}, {"inner": {"": 1}}],
    ids=["empty table", "deep dot", "dot", "no name"],
)
def test_tables_among_the_options_come_back_as_they_are(model: dict[str, Any]) -> None:
    recipe = Recipe(model=model)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.override({"seed": 0}) == recipe


def test_an_option_of_None_is_kept_or_refused_but_never_dropped() -> None:
    """``norm=None`` is not the same as no ``norm``: the model function's own default would come back."""
    try:
        recipe = Recipe(model={"norm": None, "width": 3})
        after = recipe.override({"seed": 1})
    except RecipeError as err:
        three_parts(err)
        return
    assert after.model == {"norm": None, "width": 3}


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        ("seed", "7", 7),
        ("seed", "-7", -7),
        ("train.steps", "1000", 1000),
        ("train.steps", "1_000", 1000),
        ("train.steps", "1e3", 1000),
        ("train.steps", "1000.0", 1000),
        ("train.steps", "auto", None),
        ("train.epochs", "1.5", 1.5),
        ("train.epochs", "2", 2.0),
        ("train.batch", "32", 32),
        ("train.micro_batch", "auto", "auto"),
        ("train.micro_batch", "16", 16),
        ("optimizer.slots", "auto", None),
        ("memory_budget", "12GiB", "12GiB"),
        ("compile", "step", "step"),
        ("compile", "true", "best"),
        ("compile", "false", "off"),
        ("steps_per_call", "auto", "auto"),
        ("steps_per_call", "8", 8),
        ("exact_reduce", "true", True),
        ("parallel", "fsdp", "fsdp"),
        ("parallel", "{data=4, tensor=2}", {"data": 4, "tensor": 2}),
        ('tensor_plan."blocks.*.up"', "colwise", "colwise"),
        ("train.clip", "0", 0.0),
        ("train.last", "drop", "drop"),
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.rule", "sgd", "sgd"),
        ("optimizer.decay_form", "coupled", "coupled"),
        ("optimizer.no_decay", "bias, head.*", ("bias", "head.*")),
        ("optimizer.no_decay", "", ()),
        ("optimizer.options.b1", "0.8", 0.8),
        ("optimizer.options.nesterov", "true", True),
        ("schedule.lr", "warmup(5%) >> cosine(to=0.1)", "warmup(5%) >> cosine(to=0.1)"),
        ("regularize.average", "0.999", 0.999),
        ("data.workers", "2", 2),
        ("data.timeout", "90", 90.0),
        ("data.bucket", "50", 50),
        ("optimizer.unfreeze", "30%", "30%"),
        ("data.options.context", "128", 128),
        ("data.options.names", '["a", "b"]', ["a", "b"]),
        ("evaluate.best", "accuracy", "accuracy"),
        ("evaluate.goal", "max", "max"),
        ("checkpoint.every", "0", 0),
        ("model.name", "wide", "wide"),
        ("model.name", '"12"', "12"),
        ("model.width", "12", 12),
        ("model.deep.er", "-1.5", -1.5),
        ("model.table", "{a = 1}", {"a": 1}),
        ("loss.smoothing", "0.1", 0.1),
    ],
)
def test_a_text_from_the_command_line_is_read_as_the_fields_type(path: str, text: str, wanted: Any) -> None:
    got = value_at(Recipe().override({path: text}), path)
    assert got == wanted and type(got) is type(wanted)


def test_overrides_leave_all_else_alone_and_the_first_recipe_too() -> None:
    first = Recipe(model={"width": 3, "inner": {"a": 1, "b": 2}})
    second = first.override({"model.inner.a": "5", "train": {"batch": 8, "micro_batch": 4}})
    assert first == Recipe(model={"width": 3, "inner": {"a": 1, "b": 2}})
    assert second.model == {"width": 3, "inner": {"a": 5, "b": 2}}
    assert [row[0] for row in first.diff(second)] == ["model.inner.a", "train.batch", "train.micro_batch"]


def test_the_later_of_two_overrides_counts() -> None:
    assert Recipe().override({"seed": 1}).override({"seed": 2}).seed == 2
    assert Recipe().override({"model.a": "1"}).override({"model.a": "x"}).model == {"a": "x"}


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path, _, _ in FIELDS])
def test_an_unknown_key_is_named_with_the_one_that_was_meant(path: str) -> None:
    wrong = path + "x"
    for act, argument in (
        (Recipe().override, {wrong: 1}),
        (Recipe.from_dict, nested(wrong, 1)),
        (Recipe.from_toml, tomli_w.dumps(nested(wrong, 1))),
    ):
        asked, _, remedy = refused(act, argument)
        assert f"{wrong} is not a key of" in asked and f"Did you mean {path.split('.')[-1]}?" in remedy
        assert (f"[{path.split('.')[0]}]" in asked) == ("." in path)


@pytest.mark.parametrize("table", TABLES)
def test_an_unknown_table_is_named_with_the_one_that_was_meant(table: str) -> None:
    for argument in ({f"{table}x.lr": 1}, {f"{table}x.deep.lr": 1}, {f"{table}x": {"lr": 1}}):
        asked, _, remedy = refused(Recipe().override, argument)
        assert f"{table}x is not a key of a recipe" in asked and f"Did you mean {table}?" in remedy


@pytest.mark.parametrize(
    "text", ["[trian]", "trian = {}", "[train.stpes]", "[seed]", "[optimizer.lr]", "train.steps = {}"]
)
def test_an_empty_table_where_none_belongs_is_not_passed_over(text: str) -> None:
    refused(Recipe.from_toml, text)


def test_paths_that_lead_nowhere_are_refused() -> None:
    for path in ("", ".", "train.", ".train", "train..steps", "Train.steps", "train steps", "train/steps"):
        refused(Recipe().override, {path: "1"})


def type_of(hint: Any) -> type:
    """The one type that a field takes, None aside."""
    kinds = (
        [k for k in typing.get_args(hint) if k is not type(None)]
        if typing.get_origin(hint) not in (dict, tuple)
        else []
    )
    return kinds[0] if kinds else typing.get_origin(hint) or hint


BAD = {
    int: ["abc", "", "1.5", 1.5, True, [1], [], {"a": 1}, datetime.date(2024, 1, 1), float("nan")],
    float: [
        "abc",
        "",
        True,
        [1.0],
        {"a": 1},
        datetime.date(2024, 1, 1),
        float("nan"),
        float("inf"),
        "inf",
        "nan",
        "-inf",
    ],
    str: [3, 1.5, True, ["a"], [], {"a": 1}, datetime.date(2024, 1, 1)],
    dict: [3, "text", True, ["a"], 1.5],
}
TOO_LARGE = [float("inf"), float("-inf"), "inf", "1e999", 10**400, "9" * 5000]


@pytest.mark.parametrize(("kind", "bad"), [(kind, bad) for kind, values in BAD.items() for bad in values], ids=repr)
def test_a_value_of_the_wrong_type_is_named(kind: type, bad: Any) -> None:
    checked = 0
    for path, _, hint in FIELDS:
        if type_of(hint) is kind and not (path == "compile" and isinstance(bad, bool)):  # which is a switch too
            checked += 1
            asked, _, _ = refused(Recipe.from_dict, nested(path, bad))
            assert path in asked
            if not isinstance(bad, dict):
                assert path in refused(Recipe().override, {path: bad})[0]
    assert checked


@pytest.mark.parametrize("text", ["compile = 3", "compile = ['all']", "compile = 0.5"])
def test_a_switch_of_the_wrong_type_is_told_the_words_that_there_are(text: str) -> None:
    asked, numbers, remedy = refused(Recipe.from_toml, text)
    assert asked.startswith("compile=") and numbers == "7 are, and true and false."
    assert remedy == "Known: auto, best, blocks, captured, model, off, step."
    refused(lambda: Recipe(steps_per_call=True))  # 1 is meant, or nothing


@pytest.mark.parametrize("bad", TOO_LARGE, ids=lambda bad: repr(bad)[:12])
def test_a_number_too_large_is_refused(bad: Any) -> None:
    for path, _, hint in FIELDS:
        if type_of(hint) in (int, float):
            assert path in refused(Recipe().override, {path: bad})[0]


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, 2**64])
def test_a_seed_is_a_64_bit_number(bad: int) -> None:
    """Streams are named by 64-bit numbers: a larger seed would fail in the first step."""
    assert "seed" in refused(Recipe().override, {"seed": bad})[0]


@pytest.mark.parametrize("bad", [3, 1.5, True, None, {"a": 1}, datetime.date(2024, 1, 1)], ids=repr)
def test_a_list_of_texts_is_one(bad: Any) -> None:
    assert "optimizer.no_decay" in refused(Recipe.from_dict, {"optimizer": {"no_decay": bad}})[0]
    assert "optimizer.no_decay" in refused(Recipe().override, {"optimizer.no_decay": bad})[0]


@pytest.mark.parametrize("path", [path for path, _, hint in FIELDS if type_of(hint) is not dict])
def test_a_table_in_the_place_of_a_value_is_refused(path: str) -> None:
    for argument in ({f"{path}.inner": 1}, {f"{path}.inner.deeper": 1}, {path: {"inner": 1}}):
        refused(Recipe().override, argument)
    refused(Recipe.from_toml, f"[{path}]\ninner = 1")


def test_a_table_in_the_place_of_an_options_value_is_refused_or_takes_it() -> None:
    recipe = Recipe(model={"width": 3})
    try:
        assert recipe.override({"model.width.deep": 1}).model == {"width": {"deep": 1}}
    except RecipeError as err:
        three_parts(err)


@pytest.mark.parametrize("table", [*TABLES, *(path for path, _, hint in FIELDS if type_of(hint) is dict)])
@pytest.mark.parametrize("bad", [3, "text", True, [1], None], ids=repr)
def test_a_value_in_the_place_of_a_table_is_refused(table: str, bad: Any) -> None:
    for act, argument in ((Recipe().override, {table: bad}), (Recipe.from_dict, nested(table, bad))):
        asked, _, _ = refused(act, argument)
        assert f"{table} is a table" in asked


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        ("train.steps", 0),
        ("train.steps", -5),
        ("train.epochs", 0),
        ("train.epochs", -0.5),
        ("train.batch", 0),
        ("train.batch", -64),
        ("train.micro_batch", 0),
        ("train.micro_batch", -1),
        ("train.clip", -1),
        ("train.last", "pad"),
        ("optimizer.lr", -1e-3),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.decay_form", "l2"),
        ("regularize.average", -0.1),
        ("regularize.average", 1),
        ("regularize.average", 1.5),
        ("data.workers", -1),
        ("data.timeout", -1),
        ("data.bucket", -1),
        ("data.timeout", float("inf")),
        ("evaluate.every", -1),
        ("evaluate.batch", 0),
        ("evaluate.goal", "smaller"),
        ("checkpoint.every", -1),
        ("checkpoint.keep_last", 0),
        ("checkpoint.keep_last", -1),
        ("checkpoint.keep_best", -1),
        ("checkpoint.keep_every", -1),
        ("guard.nonfinite", "ignore"),
        ("guard.spike", "on"),
        ("guard.deviations", 0),
        ("guard.window", 7),
        ("guard.patience", 0),
        ("guard.every", 0),
        ("guard.rewinds", 0),
        ("precision", "fp9"),
        ("recompute", "all"),
        ("compile", "always"),
        ("steps_per_call", 0),
        ("memory_format", "nhwc"),
        ("threads", 0),
        ("threads", 10**9),
        ("memory_budget", "12 apples"),
        ("memory_budget", "0"),
        ("train.micro_batch", "many"),
        ("optimizer.release_gradients", "yes"),
        ("optimizer.slots", "int4"),
        ("precision", ""),
    ],
)
def test_a_value_out_of_range_is_named_with_the_value(path: str, bad: Any) -> None:
    asked, _, _ = refused(Recipe().override, {path: bad})
    assert path in asked and str(bad) in asked


def test_values_that_are_not_numbers_are_refused_in_python_too() -> None:
    nan = float("nan")
    for act, name in (
        (Train, "epochs"),
        (Train, "clip"),
        (Optimizer, "lr"),
        (Optimizer, "weight_decay"),
        (Regularize, "average"),
    ):
        assert name in refused(act, **{name: nan})[0]


def test_edges_of_the_ranges_are_allowed() -> None:
    edges = {"train.steps": 1, "train.batch": 1, "train.micro_batch": 1, "train.clip": 0, "optimizer.lr": 0}
    edges |= {"regularize.average": 0, "evaluate.every": 0, "checkpoint.every": 0, "checkpoint.keep_best": 0}
    edges |= {"checkpoint.keep_last": 1, "data.workers": 0, "data.timeout": 0, "evaluate.batch": 1}
    assert Recipe().override(edges).flat().items() >= edges.items()


def test_a_micro_batch_that_does_not_divide_lists_those_that_do() -> None:
    with pytest.raises(RecipeError) as err:
        Recipe().override({"train.batch": 96, "train.micro_batch": 36})
    assert str(err.value) == (
        "train.batch=96 is not a whole number of train.micro_batch=36.\n"
        "  96/36 = 2.67.\n"
        "  Micro-batches that fit here: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96."
    )


@given(batch=st.integers(1, 3000), micro=st.integers(1, 3100))
@often
def test_a_micro_batch_fits_exactly_if_it_divides(batch: int, micro: int) -> None:
    fitting = [d for d in range(1, batch + 1) if batch % d == 0]
    assert divisors(batch) == fitting
    if micro in fitting:
        assert Train(batch=batch, micro_batch=micro).micro_batch == micro
    else:
        remedy = refused(Train, batch=batch, micro_batch=micro)[2]
        assert [int(number) for number in re.findall(r"\d+", remedy)] == fitting


NOT_TOML = [
    "seed",
    "seed = ",
    "seed = 1\nseed = 2",
    "[train\n",
    "seed = 01",
    "\ufeffseed = 1",
    "seed = 1\0",
    "a = '",
    "= 1",
]
NOT_TOML += ["seed = \ud800", "seed = " + "9" * 5000, "a = " + "[" * 20_000, "a = " + "{b = " * 20_000]


@pytest.mark.parametrize("text", NOT_TOML, ids=lambda text: repr(text[:14]))
def test_text_that_is_not_toml_is_refused_by_name(text: str) -> None:
    assert "my.toml" in refused(Recipe.from_toml, text, name="my.toml")[0]


@pytest.mark.parametrize(
    "text",
    ["9" * 5000, "[" * 20_000, "{a = " * 20_000, '"', "'", "1\nseed = 5", "# note", "\0"],
    ids=lambda t: repr(t[:8]),
)
def test_any_text_for_an_option_is_read_or_refused(text: str) -> None:
    """On the command line, what is not a TOML value is a text; it cannot reach another key."""
    try:
        recipe = Recipe().override({"model.name": text})
    except RecipeError as err:
        three_parts(err)
    else:
        assert recipe == Recipe(model=recipe.model) and list(recipe.model) == ["name"]
        assert recipe.model["name"] == text


def test_a_recipe_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes("# Größe\nseed = 1".encode("latin-1"))
    for path in (tmp_path / "missing.toml", tmp_path, latin):
        assert str(path) in " ".join(refused(Recipe.from_file, path))


toml_leaves = st.one_of(
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.sampled_from([10**400, -(10**400)]),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(["auto", "true", "1e3", "inf", "keep", "fp16", "sgd", "", "2024-01-01", "[1", "{}", "1,2"]),
    st.dates(),
    st.datetimes(),
    st.times(),
)
some_keys = st.one_of(
    st.sampled_from(sorted({name for path, _, _ in FIELDS for name in path.split(".")})),
    words,
    st.text(string.printable, max_size=4),
)
toml_trees = st.dictionaries(
    some_keys,
    st.recursive(
        toml_leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(some_keys, inner, max_size=3)),
        max_leaves=6,
    ),
    max_size=4,
)
fields_filled_at_random = st.dictionaries(
    st.sampled_from([path for path, _, _ in FIELDS]), st.one_of(toml_leaves, toml_trees), min_size=1, max_size=3
)


def tree_of(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        inner = tree
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[leaf] = value
    return tree


@given(tree=st.one_of(toml_trees, fields_filled_at_random.map(tree_of)))
@settings(often, max_examples=150)
def test_any_tree_is_a_recipe_or_our_error(tree: dict[str, Any]) -> None:
    for act in (Recipe.from_dict, Recipe().override, lambda t: Recipe.from_toml(tomli_w.dumps(t))):
        try:
            recipe = act(tree)
        except RecipeError as err:
            three_parts(err)
        else:
            assert isinstance(recipe, Recipe)
            recipe.to_toml(), recipe.flat(), recipe.diff(Recipe())


@given(changes=st.dictionaries(st.text(string.ascii_lowercase + "._", max_size=12), toml_leaves, max_size=3))
@often
def test_any_path_is_overridden_or_our_error(changes: dict[str, Any]) -> None:
    try:
        Recipe().override(changes)
    except RecipeError as err:
        three_parts(err)


# --- plan, registry, units -------------------------------------------------------------------------------------------

plans = st.builds(
    Plan,
    task=words,
    recipe=recipes,
    decisions=st.lists(
        st.builds(Decision, path=words, value=st.one_of(st.none(), int64, finite, plain_texts), reason=plain_texts),
        max_size=3,
    ).map(tuple),
    steps=st.integers(1, 10**9),
    samples=counts,
    loss_divisor=st.integers(-20, 20).map(lambda n: 2.0**n),
    parameters=st.lists(
        st.builds(
            ParameterRow,
            name=words,
            shape=st.lists(st.integers(0, 99), max_size=4).map(tuple),
            decays=st.booleans(),
            decay_reason=plain_texts,
        ),
        max_size=3,
    ).map(tuple),
    unit=words,
    sizes=st.dictionaries(words, counts, max_size=3),
    machine=st.dictionaries(words, st.one_of(plain_texts, counts), max_size=3),
)


@given(plan=plans)
@often
def test_a_plan_comes_back_from_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_every_recipe_that_is_accepted_can_be_put_into_a_plan() -> None:
    """TOML has dates and JSON has none: what cannot be saved must be refused when it is read."""
    try:
        recipe = Recipe.from_toml("[data.options]\nuntil = 2024-01-01\n")
    except RecipeError as err:
        three_parts(err)
        return
    plan = Plan("t", recipe, (), 1, 1, 1.0, (), "samples", {}, {})
    assert Plan.from_json(plan.to_json()) == plan


def test_a_registry_gives_a_name_once_and_suggests_the_nearest() -> None:
    things: Registry[int] = Registry("rule")
    things.add("adamw", 1)
    things.add("sgd", 2)
    assert (things["adamw"], list(things), len(things)) == (1, ["adamw", "sgd"], 2)
    assert "adamw" in refused(things.add, "adamw", 3)[0] and things["adamw"] == 1
    asked, numbers, remedy = refused(things.__getitem__, "adam")
    assert "rule" in asked and "'adam'" in asked and "2" in numbers and "Did you mean adamw?" in remedy


def test_suggestions_list_all_where_none_is_near() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b."
    assert did_you_mean("zzz", []) == "None are known."


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (102_400, "100 KiB"),
        (1000 * 1024, "1000 KiB"),
        (1024**2, "1.00 MiB"),
        (3 * 1024**3, "3.00 GiB"),
        (5 * 1024**4, "5.00 TiB"),
        (2000 * 1024**4, "2000 TiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count: int, text: str) -> None:
    assert human_bytes(count) == text


UNIT = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "": 1, "k": 1e3, "M": 1e6, "G": 1e9}


@given(count=st.one_of(st.integers(0, 2**50), st.integers(0, 50).map(lambda n: 2**n - 1)))
@settings(often, max_examples=150)
def test_bytes_are_written_plainly_and_within_one_percent(count: int) -> None:
    found = re.fullmatch(r"(\d+|\d+\.\d+) (B|[KMGT]iB)", human_bytes(count))
    assert found, human_bytes(count)
    assert abs(float(found[1]) * UNIT[found[2]] - count) <= 0.01 * count


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (12_340, "12.3k"), (3_400_000, "3.4M"), (2e9, "2G")],
)
def test_counts_are_written_in_thousands(count: float, text: str) -> None:
    assert human_count(count) == text


@given(count=st.one_of(st.integers(0, 10**11), st.integers(0, 12).map(lambda n: 10**n - 1)))
@settings(often, max_examples=150)
def test_counts_are_written_plainly_and_within_one_percent(count: int) -> None:
    found = re.fullmatch(r"(\d+|\d+\.\d+)([kMG]?)", human_count(count))
    assert found, human_count(count)
    assert abs(float(found[1]) * UNIT[found[2]] - count) <= 0.01 * count


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (7.25, "7.2 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3600, "1 h 00 min"),
        (7325, "2 h 02 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_seconds_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


# --- imports ---------------------------------------------------------------------------------------------------------

IMPORTS = """
import importlib, sys
importlib.import_module(sys.argv[1])
if sys.argv[1] == "thalweg.cli.main":
    from thalweg.cli.main import main
    for arguments in (["--version"], ["--help"], ["train", "--help"]):
        try:
            main(arguments)
        except SystemExit as end:
            assert end.code == 0
if sys.argv[1] == "thalweg.core":
    from thalweg.core import Recipe
    Recipe.from_toml(Recipe().to_toml())
print("heavy:", sorted({"torch", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "module", ["thalweg", "thalweg.core", "thalweg.schedules", "thalweg.report", "thalweg.cli.main"]
)
def test_what_needs_no_torch_imports_none(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, module], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.endswith("heavy: []\n"), done.stdout + done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_options_that_are_not_finite_are_refused(value: Any) -> None:
    """NaN is not equal to itself: a run with such a recipe could never be resumed."""
    with pytest.raises(RecipeError) as err:
        Recipe(model={"rate": value})
    assert "model.rate" in three_parts(err.value)[0]
