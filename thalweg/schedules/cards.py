"""What the schedule language has, as a list and as cards: all from the registered shapes and their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from thalweg.core import RecipeError, did_you_mean
from thalweg.core.units import columns
from thalweg.schedules.curve import Curve
from thalweg.schedules.makers import COMPOSITIONS
from thalweg.schedules.shapes import SHAPES, options_of
from thalweg.schedules.span import UNITS
from thalweg.schedules.text import parse

#: What puts shapes together: how it is written, and what it is.
COMPOSED = (
    ("a >> b", "one after the other; b begins where a ended"),
    ("a * b, 0.5 * a", "multiplied, update by update"),
    ("repeat(a, times=3)", "over and over, each time begun anew; or every='2 epochs'"),
    ("first(a, 60, of=100)", "the first 60 updates of a schedule laid out over 100"),
    ("wsd(warm='5%', cool='20%')", "warmup(warm) >> hold() >> cooldown(cool)"),
)
LENGTHS = (
    ("warmup(100)", "100 updates"),
    ("warmup(5%)", "a share of the run"),
    ("warmup(2k examples)", f"an amount, with k, M or G, of {', '.join(UNITS)}"),
    ("cosine()", "the rest; pieces without a length share it equally"),
)
#: What a recipe can schedule: its key, whether the schedule is a factor or the value itself, and of what.
SCHEDULED = (
    ("schedule.lr", "factor", "optimizer.lr, and the rate of each group"),
    ("schedule.weight_decay", "factor", "optimizer.weight_decay, and that of each group"),
    ("schedule.clip", "factor", "train.clip"),
    ("schedule.average", "value", "the decay of the weight average; a warm-up rises to regularize.average"),
    ("schedule.batch", "factor", "train.batch, in whole micro-batches; up to 1; counted in steps"),
    ("schedule.sequence", "factor", "the length of sequences, in multiples of 8; counted in steps"),
    ("schedule.image_size", "factor", "height and width of the images, in multiples of 4; counted in steps"),
    ("schedule.dropout", "factor", "the rate of each layer of dropout"),
    ("schedule.stochastic_depth", "factor", "the rate of each layer of stochastic depth"),
    ("schedule.options.NAME", "value", "the rule's own, such as b1; a warm-up rises to optimizer.options.NAME"),
    ("schedule.loss.NAME", "factor", "an argument of the task's loss, such as label_smoothing"),
    ("schedule.penalties.NAME", "factor", "regularize.penalties.NAME"),
    ("schedule of a group", "as above", "lr, weight_decay and options by name, in optimizer.groups.'PATTERN'.schedule"),
)
#: Options whose meaning no docstring of a shape has to repeat.
_MEANINGS = {
    "to": "the value at the end",
    "power": "the exponent, above 0",
    "factor": "0 or more",
    "every": "a length, in any unit",
    "at": "lengths, in any unit, from the beginning of the run",
    "value": "0 or more",
    "patience": "how many in a row without improvement lower the value",
    "timescale": "updates, s in the formula; 0: the updates before the piece, or 1",
}
#: What a card draws, where the shape alone with its defaults shows too little.
_EXAMPLES = {
    "warmup": "warmup(40%) >> hold()",
    "hold": "warmup(20%) >> hold()",
    "decay": "decay(factor=0.8, every=10%)",
    "step": "step(factor=0.5, every=25%)",
    "multistep": "multistep(factor=0.3, at=['50%', '80%'])",
    "cooldown": "hold(50%) >> cooldown()",
    "inverse_sqrt": "warmup(10%) >> inverse_sqrt()",
    "power": "warmup(10%) >> power()",
    "cyclic": "cyclic(every=25%, factor=0.8)",
    "restarts": "restarts(times=2, longer=2.0)",
    "repeat": "repeat(cosine(to=0.1), times=3, factor=0.7)",
    "first": "first(cosine(), 60, of=120)",
    "wsd": "wsd()",
}
_UPDATES = 120  # of the example that a card draws
_SYMBOLS = (
    "begin: the value before the piece; x: from 0 at that value to 1 at the piece's last update; n: its length;",
    "t: updates since that value, from 1; a first piece takes it at its own first update, t = 0 (a warm-up: t = 1;",
    "step and cyclic: t = 0 in any place);",
    "peak: 1, or the recipe's value where the schedule gives the value itself.",
)


def listing() -> str:
    """The whole language on a page."""
    parts = ["SHAPES"]
    for name in SHAPES:
        shape = SHAPES[name]
        parts += [f"  {_call(name)}", f"      {shape.formula}", f"      {_prose(shape.about)}"]
    parts += ["", *_SYMBOLS]
    for title, rows in (("PUT TOGETHER", COMPOSED), ("LENGTHS", LENGTHS), ("WHAT CAN BE SCHEDULED", SCHEDULED)):
        parts += ["", title, *_columns(rows)]
    return "\n".join([*parts, ""])


def card(name: str) -> str:
    """What a shape or composition says of itself.

    Raises:
        RecipeError: if there is none of that name.
    """
    if name in COMPOSITIONS:
        document = (inspect.getdoc(COMPOSITIONS[name]) or "").partition("\n>>>")[0].rstrip()
        return f"{_composed(name)}\n\n{_prose(document)}\n"
    if name not in SHAPES:
        raise RecipeError(
            f"There is no schedule shape called '{name}'.",
            f"{len(SHAPES)} shapes and {len(COMPOSITIONS)} compositions are known.",
            did_you_mean(name, [*SHAPES, *COMPOSITIONS]),
        )
    shape = SHAPES[name]
    listens = [f"listens to: {'evaluations' if shape.feedback == 'evaluation' else 'the training loss of each update'}"]
    parts = [_call(name), "", shape.formula, _prose(shape.about), *(listens if shape.feedback else [])]
    options = [(f"{key}={value!r}", meaning_of(name, key)) for key, value in options_of(name).items()]
    if options:
        parts += ["", "options", *_columns(options)]
    return "\n".join([*parts, "", *_SYMBOLS, ""])


def example(name: str) -> Curve:
    """A run of 120 updates that shows a shape or composition."""
    text = _EXAMPLES.get(name, f"{name}()")
    schedule = parse(text)
    heard = ("drawn as if nothing had been heard",) if schedule.listening(_UPDATES) else ()
    return Curve(text, "", tuple(schedule.values(_UPDATES)), notes=heard)


def meaning_of(name: str, option: str) -> str:
    """What an option is, from the shape's docstring; what several shapes share is said once, here."""
    document = inspect.getdoc(SHAPES[name].value) or ""
    found = re.search(rf"^    (?:\w+, )*{option}(?:, \w+)*: (.+(?:\n {{8,}}.+)*)", document, flags=re.MULTILINE)
    told = " ".join(found.group(1).split()) if found else _MEANINGS.get(option, "")
    if same := re.match(r"as for ``(\w+)``, (.+)", told):
        return f"{meaning_of(same.group(1), option).rstrip('.')}; {same.group(2)}"
    return _prose(told)


def _call(name: str) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options_of(name).items())})"


def _composed(name: str) -> str:
    parameters = inspect.signature(COMPOSITIONS[name]).parameters.values()
    given = [p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}" for p in parameters]
    return f"{name}({', '.join(given)})"


def _prose(text: str) -> str:
    return text.replace("``", "`")


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"  {line}" for line in columns(rows)]
