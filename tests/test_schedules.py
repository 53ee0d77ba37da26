"""A schedule is a number for a step: exact at its first, peak and last update, and a pure function of the two counts."""

from __future__ import annotations

import math
import os
from decimal import Decimal, getcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import three_parts
from thalweg.core import RecipeError
from thalweg.schedules import (
    SHAPES,
    Place,
    Schedule,
    constant,
    cosine,
    first,
    hold,
    inverse_sqrt,
    linear,
    parse,
    piece,
    polynomial,
    repeat,
    shape,
    warmup,
)

often = settings(max_examples=100, deadline=None, database=None)
ends = st.floats(0, 1)
EPS = 2.0**-52


def refused(act: Any, *arguments: Any, **named: Any) -> tuple[str, str, str]:
    with pytest.raises(RecipeError) as err:
        act(*arguments, **named)
    return three_parts(err.value)


def by_torch(scheduler: type, steps: int, **options: Any) -> list[float]:
    """The factor that one of torch's own schedulers gives at each update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    running = scheduler(optimizer, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        running.step()
    return values


def assert_close(got: list[float], wanted: list[float], tolerance: float = 1e-12) -> None:
    assert len(got) == len(wanted)
    assert max(abs(a - b) for a, b in zip(got, wanted)) <= tolerance


# --- warm-up ---------------------------------------------------------------------------------------------------------


@given(num=st.integers(1, 400), rest=st.integers(0, 100))
@often
def test_warm_up_wastes_no_update_and_reaches_1_at_its_last(num: int, rest: int) -> None:
    values = warmup(num).values(num + rest)
    assert values[0] == 1 / num
    assert values[num - 1] == 1.0
    assert_close(values[:num], [float(Fraction(t + 1, num)) for t in range(num)], EPS)
    assert values == sorted(values) and values[num:] == [1.0] * rest


def test_warm_up_without_length_takes_the_whole_run() -> None:
    assert warmup().values(4) == [0.25, 0.5, 0.75, 1.0]


@given(num=st.integers(2, 400), start=ends)
@often
def test_a_warm_up_from_zero_takes_that_update_too(num: int, start: float) -> None:
    values = warmup(num, start=start, zero_first=True).values(num)
    assert values[0] == start and values[-1] == 1.0
    assert warmup(num, zero_first=True).values(num)[0] == 0.0
    assert_close(values, [start + (1 - start) * t / (num - 1) for t in range(num)], 4 * EPS)


def test_a_warm_up_of_one_update_never_stops_a_run() -> None:
    """5 % of a short run is one update: were it taken at 0, all that follows would begin, and stay, near 0."""
    assert max((warmup(1, zero_first=True) >> hold()).values(5)) == 1.0
    assert max(parse("warmup(5%, zero_first=True) >> cosine(to=0.1)").values(20)) == 1.0


@given(num=st.integers(2, 100), start=st.floats(0.001, 0.99))
@often
def test_warm_up_is_torchs_linear_one_without_the_wasted_update(num: int, start: float) -> None:
    first = start + (1 - start) / num
    wanted = by_torch(torch.optim.lr_scheduler.LinearLR, num, start_factor=first, total_iters=num - 1)
    assert_close(warmup(num, start=start).values(num), wanted)


# --- cosine, linear, polynomial, inverse square root -----------------------------------------------------------------

FALLING = {
    "cosine": (cosine, lambda x, b, to: to + (b - to) * math.cos(math.pi * x / 2) ** 2),
    "linear": (linear, lambda x, b, to: float(Fraction(b) + (Fraction(to) - Fraction(b)) * Fraction(x))),
    "polynomial": (
        polynomial,
        lambda x, b, to: float(Fraction(to) + (Fraction(b) - Fraction(to)) * (1 - Fraction(x)) ** 2),
    ),
    "cubic": (
        lambda *length, to: polynomial(*length, to=to, power=3),
        lambda x, b, to: float(Fraction(to) + (Fraction(b) - Fraction(to)) * (1 - Fraction(x)) ** 3),
    ),
}
each_falling = pytest.mark.parametrize(("make", "formula"), FALLING.values(), ids=FALLING)


@each_falling
@given(steps=st.integers(2, 500), to=ends)
@often
def test_a_fall_alone_is_exact_at_both_ends(make: Any, formula: Any, steps: int, to: float) -> None:
    values = make(to=to).values(steps)
    assert values[0] == 1.0 and values[-1] == to
    assert_close(values, [formula(t / (steps - 1), 1.0, to) for t in range(steps)], 8 * EPS)


@each_falling
@given(rise=st.integers(1, 100), fall=st.integers(1, 400), to=ends)
@often
def test_a_fall_after_a_warm_up_is_exact_at_the_peak_and_at_the_end(
    make: Any, formula: Any, rise: int, fall: int, to: float
) -> None:
    values = (warmup(rise) >> make(to=to)).values(rise + fall)
    assert values[0] == 1 / rise and values[rise - 1] == 1.0 and values[-1] == to
    assert_close(values[rise:], [formula((t + 1) / fall, 1.0, to) for t in range(fall)], 8 * EPS)
    after = values[rise - 1 :]
    assert all(b <= a + EPS for a, b in zip(after, after[1:]))
    assert max(values) == 1.0


@each_falling
@given(begin=st.floats(0, 2), to=st.floats(0, 2), steps=st.integers(2, 200))
@often
def test_a_piece_begins_where_the_one_before_ended(
    make: Any, formula: Any, begin: float, to: float, steps: int
) -> None:
    """Up or down, every value lies between the two, and the last one is exact."""
    values = (constant(1, value=begin) >> make(to=to)).values(steps)
    assert values[0] == begin and values[-1] == to
    slack = 8 * EPS
    assert all(min(begin, to) - slack <= v <= max(begin, to) + slack for v in values)
    signs = {math.copysign(1, b - a) for a, b in zip(values, values[1:]) if abs(b - a) > slack}
    assert len(signs) <= 1


@pytest.mark.parametrize("to", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("steps", [2, 3, 50, 1001])
def test_falls_are_torchs_at_every_update(to: float, steps: int) -> None:
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR
    assert_close(cosine(to=to).values(steps), by_torch(anneal, steps, T_max=steps - 1, eta_min=to))
    line = torch.optim.lr_scheduler.LinearLR
    wanted = by_torch(line, steps, start_factor=1.0, end_factor=to, total_iters=steps - 1)
    assert_close(linear(to=to).values(steps), wanted)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("steps", [2, 3, 50, 1001])
def test_polynomials_are_torchs_at_every_update(power: float, steps: int) -> None:
    wanted = by_torch(torch.optim.lr_scheduler.PolynomialLR, steps, total_iters=steps - 1, power=power)
    assert_close(polynomial(power=power).values(steps), wanted)


def test_a_cosine_after_a_warm_up_is_torchs_from_the_peak_on() -> None:
    values = (warmup(10) >> cosine(to=0.1)).values(110)
    wanted = by_torch(torch.optim.lr_scheduler.CosineAnnealingLR, 101, T_max=100, eta_min=0.1)
    assert_close(values[9:], wanted)


@pytest.mark.parametrize(("timescale", "rise"), [(0.0, 1), (0.0, 40), (100.0, 40), (7.5, 3)])
def test_inverse_square_root_is_its_formula(timescale: float, rise: int) -> None:
    """Vaswani et al. 2017, section 5.3: with the warm-up as time scale, the factor at update t (from 1) is sqrt(W/t)."""
    getcontext().prec = 40
    values = (warmup(rise) >> inverse_sqrt(timescale=timescale)).values(rise + 500)
    scale = Decimal(timescale) or Decimal(rise)
    wanted = [float((scale / (scale + t)).sqrt()) for t in range(501)]
    assert_close(values[rise - 1 :], wanted, 4 * EPS)
    if not timescale:
        assert_close(values[rise:], [math.sqrt(rise / t) for t in range(rise + 1, rise + 501)], 4 * EPS)


def test_inverse_square_root_alone_begins_at_1() -> None:
    values = inverse_sqrt(timescale=10.0).values(200)
    assert values[0] == 1.0
    assert_close(values, [math.sqrt(10 / (10 + t)) for t in range(200)], 4 * EPS)
    assert_close(inverse_sqrt().values(9), [math.sqrt(1 / (1 + t)) for t in range(9)], 4 * EPS)


def test_holds_and_constants() -> None:
    assert hold().values(3) == [1.0, 1.0, 1.0]
    assert constant(value=0.3).values(2) == [0.3, 0.3]
    assert (warmup(2) >> hold(2) >> linear(2)).values(6) == [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert (constant(1, value=0.3) >> hold(2) >> constant(value=0.2)).values(5) == [0.3, 0.3, 0.3, 0.2, 0.2]


def test_a_row_of_many_pieces_is_each_in_turn() -> None:
    row = warmup(4) >> hold("25%") >> cosine(5, to=0.5) >> linear(to=0.1)
    values = row.values(20)
    assert values[3:9] == [1.0] * 6
    assert values[13] == 0.5 and values[-1] == 0.1
    assert_close(values[13:], [0.5 - 0.4 * k / 6 for k in range(7)], 4 * EPS)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_rows_are_put_together_alike_however_they_are_grouped() -> None:
    a, b, c = warmup(2), hold(3), cosine(to=0.1)
    assert (a >> b) >> c == a >> (b >> c) == parse(f"{a} >> {b} >> {c}")
    assert a.values(2) == [0.5, 1.0]  # putting it in a row did not change it


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("length", [None, 1, "100%", "0.1%"])
def test_every_shape_has_a_value_for_a_run_of_one_step(name: str, length: Any) -> None:
    (value,) = piece(name, length).values(1)
    assert math.isfinite(value) and 0 <= value <= 1


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial"])
def test_a_fall_of_one_update_is_its_end(name: str) -> None:
    assert piece(name, to=0.25).values(1) == [0.25]
    assert (warmup(1) >> piece(name, 1, to=0.25)).values(2) == [1.0, 0.25]


@pytest.mark.parametrize(
    ("share", "steps", "updates"),
    [("5%", 200, 10), ("5%", 7, 1), ("0.1%", 10, 1), ("12.5%", 80, 10), ("100%", 9, 9), ("33%", 10, 3)],
)
def test_a_share_is_counted_in_whole_updates_and_is_never_none(share: str, steps: int, updates: int) -> None:
    values = warmup(share).values(steps)
    assert values[0] == 1 / updates and values.count(1.0) == steps - updates + 1


@pytest.mark.parametrize("text", ["warmup(50%) >> cosine(50%, to=0.1)", "warmup(5%) >> hold(75%) >> linear(20%, to=0.1)",
                                  "warmup(10%) >> hold(30%) >> linear(30%, to=0.5) >> cosine(30%, to=0.1)"])  # fmt: skip
def test_shares_that_make_up_the_whole_run_fit_every_run(text: str) -> None:
    """However the shares round: 5 % + 75 % + 20 % of 10 updates are 10 updates."""
    pieces = len(parse(text).pieces)
    unfit = []
    for steps in range(pieces, 250):
        try:
            values = parse(text).values(steps)
        except RecipeError:
            unfit.append(steps)
        else:
            assert len(values) == steps and values[-1] == 0.1
    assert unfit == []


@given(a=st.integers(1, 50), b=st.integers(1, 50), steps=st.integers(1, 99))
@often
def test_pieces_fit_exactly_if_they_are_no_longer_than_the_run(a: int, b: int, steps: int) -> None:
    row = warmup(a) >> linear(b, to=0.5)
    if a + b <= steps:
        assert row.values(steps) == row.values(a + b) + [0.5] * (steps - a - b)
    else:
        asked, numbers, remedy = refused(row.values, steps)
        assert str(row) in asked and f"{a + b} updates" in numbers and f"{steps}" in numbers and "train.steps" in remedy


def test_a_share_too_small_for_an_update_has_one_all_the_same() -> None:
    assert (constant("0.1%", value=0.25) >> constant(value=0.5)).values(10) == [0.25] + [0.5] * 9


def test_a_rest_of_no_update_is_left_out() -> None:
    assert (warmup(3) >> cosine(to=0.1)).values(3) == warmup(3).values(3)


def test_pieces_without_length_share_what_is_left() -> None:
    """warm-up, stable, decay needs no arithmetic: the piece in the middle takes what the others leave."""
    values = (warmup(2) >> hold() >> cosine(3, to=0.1)).values(20)
    assert values[1:17] == [1.0] * 16 and values[17] < 1 and values[-1] == 0.1
    values = parse("warmup(500) >> hold() >> cosine(to=0.1)").values(1000)
    assert values[499:750] == [1.0] * 251 and values[750] < 1 and values[-1] == 0.1
    assert (hold() >> constant(1, value=0.5) >> constant(value=0.25)).values(4) == [1.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_of_no_step_has_no_value(steps: int) -> None:
    refused(cosine().values, steps)
    refused(cosine().at, 0, steps)


@pytest.mark.parametrize(
    "length", [0, -1, 1.5, True, "5", "x%", "%", "0%", "-5%", "100.1%", "nan%", "inf%", "", [], (1,)], ids=repr
)
def test_a_length_that_cannot_be_counted_is_refused(length: Any) -> None:
    assert "cosine(" in refused(cosine, length)[0]


# --- beyond the end, at and values -----------------------------------------------------------------------------------

SCHEDULES = [
    "warmup(5%) >> cosine(to=0.1)",
    "cosine",
    "linear(30)",
    "warmup(10) >> inverse_sqrt(timescale=3)",
    "warmup(3) >> hold(7) >> polynomial(50%, to=0.2, power=1.5)",
    "constant(value=0.5)",
    "warmup(7, start=0.1, zero_first=True)",
]


@pytest.mark.parametrize("text", SCHEDULES)
def test_at_is_values_and_beyond_the_end_the_last_value(text: str) -> None:
    """torch's cosine climbs again after its end, and an extra epoch heats the run anew: here nothing moves."""
    schedule = parse(text if "(" in text else f"{text}()")
    for steps in (40, 41, 1000):
        values = schedule.values(steps)
        assert len(values) == steps and all(type(v) is float for v in values)
        assert [schedule.at(t, steps) for t in range(steps)] == values
        assert {schedule.at(t, steps) for t in (steps, steps + 1, 2 * steps, 10**9)} == {values[-1]}
    values.append(7.0)
    assert schedule.values(1000)[-1] != 7.0  # what was handed out is the caller's own


# --- the language ----------------------------------------------------------------------------------------------------

numbers = st.one_of(st.floats(0, 1e6), st.integers(0, 1000))
lengths = st.one_of(
    st.none(),
    st.integers(1, 10**6),
    st.one_of(st.integers(1, 100), st.floats(1e-6, 100)).map(lambda share: f"{share}%"),
)
OPTIONS = {
    "warmup": {"start": numbers, "zero_first": st.booleans()},
    "hold": {},
    "constant": {"value": numbers},
    "linear": {"to": numbers},
    "cosine": {"to": numbers},
    "polynomial": {"to": numbers, "power": st.floats(0.1, 10)},
    "inverse_sqrt": {"timescale": numbers},
    "exponential": {"to": st.floats(1e-6, 10)},
    "decay": {"factor": numbers, "every": st.one_of(st.integers(1, 100), st.just("10%"), st.just("2 steps"))},
    "step": {"factor": numbers, "every": st.integers(1, 100)},
    "multistep": {
        "factor": numbers,
        "at": st.lists(st.sampled_from([1, 7, "50%", "3 updates"]), max_size=3).map(tuple),
    },
    "power": {"power": st.floats(0.1, 10), "timescale": numbers},
    "cooldown": {"to": numbers, "power": st.floats(0.1, 10)},
    "rex": {"to": numbers},
    "one_cycle": {"start": numbers, "to": numbers, "rise": st.floats(0.01, 0.99), "straight": st.booleans()},
    "cyclic": {"every": st.integers(0, 50), "low": numbers, "factor": ends},
    "restarts": {
        "every": st.integers(0, 50),
        "times": st.integers(1, 9),
        "longer": st.floats(0.1, 10),
        "factor": numbers,
        "to": numbers,
    },
    "plateau": {"factor": st.floats(0.01, 0.99), "patience": st.integers(1, 9), "least": ends},
    "loss_plateau": {"factor": st.floats(0.01, 0.99), "smooth": st.floats(0, 0.999), "rest": st.integers(0, 9)},
}
pieces = st.one_of(
    [
        st.builds(
            lambda name, length, options: piece(name, length, **options),
            st.just(name),
            lengths,
            st.fixed_dictionaries({}, optional=options),
        )
        for name, options in OPTIONS.items()
    ]
)


def row_of(several: list[Schedule]) -> Schedule:
    row = several[0]
    for one in several[1:]:
        row = row >> one
    return row


rows = st.recursive(
    st.lists(pieces, min_size=1, max_size=5).map(row_of),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, b: a >> b, inner, inner),
        st.builds(lambda a, factor: factor * a, inner, st.floats(0, 10)),
        st.builds(lambda a, times, factor: repeat(a, times=times, factor=factor), inner, st.integers(1, 4), ends),
        st.builds(lambda a, every: repeat(a, "50%", every=every), inner, st.sampled_from([3, "20%", "5 updates"])),
        st.builds(lambda a, num, more: first(a, num, of=num + more), inner, st.integers(1, 40), st.integers(0, 40)),
    ),
    max_leaves=4,
)


def test_every_shape_is_in_the_table_of_this_test() -> None:
    assert set(OPTIONS) == set(SHAPES)
    assert all(SHAPES[name].about for name in SHAPES)


@given(row=rows)
@settings(often, max_examples=300)
def test_a_schedule_is_its_own_text(row: Schedule) -> None:
    assert parse(str(row)) == row and str(parse(str(row))) == str(row)
    assert parse(row) is row


@given(row=rows, steps=st.integers(1, 300))
@settings(often, max_examples=300)
def test_any_schedule_has_finite_values_or_says_why_not(row: Schedule, steps: int) -> None:
    try:
        values = row.values(steps)
    except RecipeError as err:
        three_parts(err)
    else:
        assert len(values) == steps and all(math.isfinite(v) and v >= 0 for v in values)
        assert row.at(steps // 2, steps) == values[steps // 2] and row.at(steps + 5, steps) == values[-1]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("cosine()", cosine()),
        (" warmup( 5% )>>cosine( to = 0.1 ) ", warmup("5%") >> cosine(to=0.1)),
        ("warmup('5%')", warmup("5%")),
        ('warmup("2.5%")', warmup("2.5%")),
        ("warmup(2.5%)", warmup("2.5%")),
        ("warmup(100, start=0.1, zero_first=True)", warmup(100, start=0.1, zero_first=True)),
        ("warmup(1) >> hold(2) >> cosine()", warmup(1) >> hold(2) >> cosine()),
        ("(warmup(1) >> hold(2)) >> cosine()", warmup(1) >> hold(2) >> cosine()),
        ("warmup(1) >> (hold(2) >> cosine())", warmup(1) >> hold(2) >> cosine()),
        ("constant(value=1e-3)", constant(value=1e-3)),
    ],
)
def test_text_and_python_say_the_same(text: str, row: Schedule) -> None:
    assert parse(text) == row


def test_a_shape_of_ones_own_is_as_good_as_ours() -> None:
    try:

        @shape
        def sawtooth_of_this_test(at: Place, *, teeth: int = 2) -> float:
            """Up and down."""
            return at.begin * (1 - (at.index * teeth % at.num) / at.num)

        row = parse("warmup(2) >> sawtooth_of_this_test(teeth=2)")
        assert row.values(6) == [0.5, 1.0, 1.0, 0.5, 1.0, 0.5]
        assert SHAPES["sawtooth_of_this_test"].about == "Up and down."
        assert "Did you mean teeth?" in refused(parse, "sawtooth_of_this_test(tooth=3)")[2]
    finally:
        SHAPES._things.pop("sawtooth_of_this_test", None)


def test_an_unknown_shape_or_option_is_named_with_the_one_that_was_meant() -> None:
    asked, _, remedy = refused(parse, "warmup(3) >> cosin(to=0.1)")
    assert "'cosin'" in asked and "Did you mean cosine?" in remedy
    asked, _, remedy = refused(parse, "polynomial(powr=2)")
    assert "'powr'" in asked and "Did you mean power?" in remedy
    assert "hold()" in refused(hold, to=0.1)[0]


@pytest.mark.parametrize(
    "text",
    ["cosine(to='0.1')", "cosine(to=True)", "cosine(to=None)", "cosine(to=1j)", "cosine(to=[1])", "warmup(zero_first=1)",
     "warmup(zero_first='yes')", "polynomial(power=(2,))"],
)  # fmt: skip
def test_an_option_of_the_wrong_kind_is_refused(text: str) -> None:
    assert text.split("(")[0] in refused(parse, text)[0]


@pytest.mark.parametrize(
    "text",
    ["cosine(to=1e999)", "linear(to=-1e999)", "constant(value=1e999)", "polynomial(power=-1)", "polynomial(power=1e999)",
     "warmup(start=1e999)", "inverse_sqrt(timescale=-5)", "inverse_sqrt(timescale=-1e-9)", "inverse_sqrt(timescale=1e999)",
     "cosine(to=" + "9" * 400 + ")", "constant(value=" + "9" * 400 + ")"],
    ids=lambda text: text[:28],
)  # fmt: skip
def test_an_option_that_gives_no_number_is_refused(text: str) -> None:
    """Infinity times 0 is NaN, and a NaN learning rate destroys the weights in one step."""
    refused(lambda: parse(text).values(10))


@pytest.mark.parametrize("power", [0.0, 1e-9, 0.5])
def test_a_polynomial_of_any_power_ends_at_its_end_or_is_refused(power: float) -> None:
    try:
        assert polynomial(to=0.25, power=power).values(9)[-1] == 0.25
    except RecipeError as err:
        three_parts(err)


HOSTILE = {
    "empty": "",
    "blank": " \n\t ",
    "comment": "# cosine()",
    "name": "cosine",
    "number": "3",
    "text": "'cosine()'",
    "import": "__import__('os').mkdir('{made}')",
    "import in length": "warmup(__import__('os').mkdir('{made}'))",
    "import in option": "cosine(to=__import__('os').mkdir('{made}'))",
    "open": "open('{made}', 'w')",
    "exec": "exec(\"open('{made}', 'w')\")",
    "statement": "import os; os.mkdir('{made}')",
    "two lines": "cosine()\nopen('{made}', 'w')",
    "lambda": "(lambda: open('{made}', 'w'))()",
    "comprehension": "[open('{made}', 'w') for _ in (1,)]",
    "f-string": "f\"{open('{made}', 'w')}\"",
    "f-string in option": "cosine(to=f\"{open('{made}', 'w')}\")",
    "walrus": "(x := open('{made}', 'w'))",
    "attribute": "cosine.__class__",
    "attribute of a call": "cosine().__class__.__mro__",
    "call of a call": "cosine()()",
    "method": "cosine().values(3)",
    "subscript": "cosine[0]",
    "power": "cosine(to=9**9**9**9)",
    "repetition": "cosine(to='x'*10**10)",
    "arithmetic": "cosine(to=1-0.9)",
    "star": "cosine(*[1])",
    "double star": "cosine(**{'to': 1})",
    "two lengths": "warmup(1, 2)",
    "option twice": "cosine(to=1, to=2)",
    "option 'name'": "cosine(name='hold')",
    "option 'length' as well": "cosine(5, length=6)",
    "unhashable key": "cosine(to={[1]: 2})",
    "unhashable element": "cosine(to={[]})",
    "other operator": "warmup(3) << hold()",
    "comparison": "warmup(3) > hold()",
    "trailing arrow": "warmup(3) >>",
    "leading arrow": ">> cosine()",
    "await": "await cosine()",
    "yield": "(yield)",
    "ellipsis": "...",
    "percent": "warmup(5%%)",
    "modulo": "warmup(5 % 3)",
    "not closed": "warmup(5%",
    "null": "cosine()\0",
    "surrogate": "cosine()\ud800",
    "emoji": "🙂()",
    "right-to-left": "cosine(\u202eto=1)",
    "escape": "cosine(to='\\d')",
    "long name": "a" * 100_000,
    "deep parentheses": "(" * 5000 + "cosine()" + ")" * 5000,
    "deep calls": "cosine(" * 5000,
    "deep lists": "cosine(to=" + "[" * 5000 + "]" * 5000 + ")",
    "deep minus": "cosine(to=" + "-" * 5000 + "1)",
    "deep not": "cosine(to=" + "not " * 5000 + "1)",
    "deep sum": "cosine(to=" + "1+" * 5000 + "1)",
    "deep attribute": "cosine" + ".a" * 5000,
    "deep lambda": "lambda: " * 5000 + "1",
    "deep right row": "hold(1) >> (" * 5000,
    "long number": "warmup(" + "9" * 5000 + ")",
    "long hexadecimal number": "warmup(0x" + "f" * 5000 + ")",
    "long row": "hold(1) >> " * 5000 + "cosine()",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_ends_in_our_error_and_never_runs(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: parse(text.replace("{made}", str(tmp_path / "made"))).values(10))
    assert os.listdir(tmp_path) == []


WORDS = [
    "cosine",
    "warmup",
    "hold",
    "(",
    ")",
    ">>",
    "to=",
    "5%",
    "0.1",
    "1",
    ",",
    "'",
    "-",
    "*",
    "[",
    "{",
    ":",
    " ",
    "\\",
    "=",
]


@given(text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS), max_size=14).map("".join)))
@settings(often, max_examples=500)
def test_any_text_is_a_schedule_or_our_error(text: str) -> None:
    try:
        row = parse(text)
    except RecipeError as err:
        three_parts(err)
    else:
        assert isinstance(row, Schedule) and parse(str(row)) == row
