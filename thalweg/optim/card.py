"""What a rule or stage says of itself, as a table, as a card and as a page: all from its metadata and its docstring.

``python -m thalweg.optim.card > docs/rules.md`` writes the page.
"""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.core import RecipeError, did_you_mean, units
from thalweg.optim.batch import new_part
from thalweg.optim.codecs import Part
from thalweg.optim.program import DUE, FIRST, Program
from thalweg.rules import DECAYS, RULES, STAGES, Component, Rule, Slot, Stage

#: The matrix that costs are given for: rows, columns and factors have a size of their own.
SHAPE = (1024, 1024)
_FP32 = 4
_SHAPES = {
    "row": "one number a row",
    "column": "one number a column",
    "tensor": "one number",
    "uniform": "one number in all",
}
_WHERE = {
    "gradient": "the gradient, before the rule sees it",
    "update": "the rule's change, before decay",
    "decay": "the change: it is weight decay",
    "total": "the whole change, decay in it",
    "weights": "the new weights",
}
HEADINGS = ("rule", "status", "reads", "slots", "B/param", "B moved", "rate", "paper")
STAGE_HEADINGS = ("stage", "acts on", "reads", "slots", "options", "paper")
#: Columns that a narrow terminal does without: they stand on the card.
WIDE = ("reads", "slots", "options")
STATUS = f"status: {inspect.getdoc(Rule.status)}"
#: What stands below the table of rules.
NOTES = (
    STATUS,
    "reads: how much of a parameter the rule must see at once.",
    f"B/param: bytes of its slots at fp32, in a {SHAPE[0]} x {SHAPE[1]} matrix.",
    "B moved: bytes a parameter and step, each tensor read once and written once (p, the gradient, the slots);"
    " +: and passes for norms, for measuring or for matrix products.",
    "rate: the published default of lr.",
)


@dataclass(frozen=True)
class Card:
    """All that is known of a rule or stage, ready to be shown.

    Attributes:
        maths: the update, a statement a line.
        facts: (label, text), in the order of reading.
        options: (names, defaults, meaning).
        recipe, python: how to ask for it; ``recipe`` is empty where a recipe cannot.
    """

    name: str
    maths: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str, str], ...]
    recipe: str
    python: str


def card(name: str) -> Card:
    """The card of a rule or stage.

    Raises:
        RecipeError: if there is neither of that name.

    >>> card("lion").maths
    ('p <- p - lr*sign(b1*m + (1-b1)*g)', 'then m <- b2*m + (1-b2)*g')
    """
    if name in RULES:
        return _rule_card(RULES[name])
    if name in STAGES:
        return _stage_card(STAGES[name])
    raise RecipeError(
        f"There is no update rule or stage called '{name}'.",
        f"{len(RULES)} rules and {len(STAGES)} stages are registered.",
        did_you_mean(name, [*RULES, *STAGES]),
    )


def listed() -> list[tuple[str, ...]]:
    """A row for each rule, under ``HEADINGS``."""
    return [_row(RULES[name]) for name in RULES]


def listed_stages() -> list[tuple[str, ...]]:
    """A row for each stage, under ``STAGE_HEADINGS``."""
    rows: list[tuple[str, ...]] = []
    for name in STAGES:
        stage = STAGES[name]
        options = ", ".join(f"{key}={_shown(value)}" for key, value in stage.defaults.items())
        rows.append(
            (name, _WHERE[stage.kind], stage.reads, _names(stage.slots_for(stage.defaults)), options, stage.paper)
        )
    return rows


def bytes_of(slots: Iterable[Slot | Part], shape: tuple[int, ...] = SHAPE) -> float:
    """Bytes of slots for each parameter of a matrix of ``shape``, at fp32.

    >>> bytes_of([Slot("m"), Slot("v", "row")], (8, 16))
    4.25
    """
    sizes = {"like": math.prod(shape), "row": shape[0], "column": shape[1], "tensor": 1, "uniform": 0}
    total = sum(math.prod(s.shape(shape)) if callable(s.shape) else sizes[s.shape] for s in slots)
    return _FP32 * total / math.prod(shape)


def bytes_moved(rule: Rule) -> float:
    """Bytes that a step must move for each parameter, at fp32: parameter, gradient and slots read, what changes written."""
    program = Program(rule, rule.defaults)
    read = 2 * _FP32 + bytes_of(program.slots)
    return read + _FP32 + bytes_of(slot for slot, written in zip(program.slots, _written(program)) if written)


def _written(program: Program) -> list[bool]:
    """Which slots three updates of a small matrix change; some, such as the point where it began, are read alone."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(6, 4, generator=generator)

    p = draw()
    stored = [new_part(program, part, p, "batch") for part in program.parts]
    scalars = dict.fromkeys(program.scalars, torch.tensor(0.5, dtype=torch.float64))
    written = [False] * len(stored)
    for t in (1, 2, 3):
        numbers = {**scalars, "t": torch.tensor(float(t), dtype=torch.float64)}
        extra = {name: draw() for name in program.tensors}
        p, *new = program.run(p, draw(), stored, numbers, due=FIRST if t == 1 else DUE, extra=extra)
        written = [was or not torch.equal(old, now) for was, old, now in zip(written, stored, new)]
        stored = new
    return written


def as_text(shown: Card, width: int = 100) -> str:
    """A card for a terminal of ``width`` columns."""
    label = max(len(name) for name, _ in shown.facts) + 2
    lines = [shown.name, ""]

    def put(name: str, text: str) -> None:
        wrapped = textwrap.wrap(
            text.replace("``", ""), max(width - label - 2, 30), break_long_words=False, break_on_hyphens=False
        )
        for i, line in enumerate(wrapped or [""]):
            lines.append(f"  {name if i == 0 else '':{label}}{line}".rstrip())

    for i, line in enumerate(shown.maths):
        put("maths" if i == 0 else "", line)
    for name, text in shown.facts:
        put(name, text)
    for i, (names, defaults, meaning) in enumerate(shown.options):
        put("options" if i == 0 else "", f"{_assigned(names, defaults)}: {meaning}")
    for name, text in (("recipe", shown.recipe), ("python", shown.python)):
        for i, line in enumerate(text.splitlines()):
            lines.append(f"  {name if i == 0 else '':{label}}{line}".rstrip())
    return "\n".join(lines) + "\n"


def columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as plain text, each row one line.

    >>> print(columns(("a", "b"), [("1", "2"), ("long", "")]))
    a     b
    1     2
    long
    """
    return "\n".join(units.columns([tuple(headings), *map(tuple, rows)]))


def page() -> str:
    """docs/rules.md."""
    parts = [
        "# Which rules and stages are there?",
        "Made by `python -m thalweg.optim.card` from what each rule says of itself; `thalweg rules` prints the same. Which one to"
        " take: [choose-an-optimizer.md](choose-an-optimizer.md). Your own: [own-rule.md](own-rule.md).",
        "The Python lines below need a model:",
        "```python\nfrom torch import nn\n\nimport thalweg\n\nmodel = nn.Linear(8, 4)\n```",
        "## The rules",
        _markdown_table(HEADINGS, [(f"[{name}](#{name})", *rest) for name, *rest in listed()]),
        "\n".join(f"- {_prose(note)}" for note in NOTES),
        "## The stages",
        "A stage combines with any rule. The forms of weight decay are stages too, named by `optimizer.decay_form`"
        " ([weight-decay.md](weight-decay.md)).",
        _markdown_table(STAGE_HEADINGS, [(f"[{name}](#{name})", *rest) for name, *rest in listed_stages()]),
        "## The rules, one by one",
        *(_as_markdown(card(name)) for name in RULES),
        "## The stages, one by one",
        *(_as_markdown(card(name)) for name in STAGES),
    ]
    return "\n\n".join(parts) + "\n"


def _row(rule: Rule) -> tuple[str, ...]:
    program = Program(rule, rule.defaults)
    more = "" if program.reads == "element" and not rule.shared else "+"
    return (
        rule.name,
        rule.status,
        program.reads,
        _names(program.slots),
        f"{bytes_of(program.slots):.3g}",
        f"{bytes_moved(rule):.3g}{more}",
        f"{rule.lr:g}",
        rule.paper,
    )


def _rule_card(rule: Rule) -> Card:
    from thalweg.optim.face import class_name

    told = _told(rule)
    program = Program(rule, rule.defaults)
    shipped = f"shipped by {', '.join(rule.ships)}" if rule.ships else "shipped by no library known to us"
    size = f"{bytes_of(program.slots):.3g} B of slots a parameter and {bytes_moved(rule):.3g} B moved a step"
    facts = [
        ("", told["more"]),
        ("when", rule.use),
        ("when not", rule.avoid),
        ("evidence", rule.evidence),
        ("status", f"{rule.status}: published {rule.year}, {shipped}"),
        ("paper", rule.paper),
        ("reference", rule.reference),
        ("departures", told["departures"]),
        ("rate", f"lr={rule.lr:g} (published default)"),
        ("decay", f"{rule.decay_form} unless decay_form says otherwise"),
        ("takes", _takes(rule)),
        ("reads", program.reads),
        ("slots", _slots(program.slots)),
        ("cost", told["cost"]),
        ("", f"At fp32, in a {SHAPE[0]} x {SHAPE[1]} matrix: {size}."),
    ]
    facts += [("shares", f"{', '.join(rule.shared)}: one number each for all parameters")] if rule.shared else []
    facts += (
        [] if rule.still else [("at zero", "with a gradient of zero, or a rate of zero, the weights may still move")]
    )
    then = () if rule.then is None else _options(STAGES[rule.then], _told(STAGES[rule.then])["args"], rule.defaults)
    recipe = f'[optimizer]\nrule = "{rule.name}"\nlr = {rule.lr:g}'
    if rule.least_ndim:
        other = RULES["adamw"]
        recipe += f'\notherwise = "{other.name}"  # embeddings, the output layer, vectors\notherwise_lr = {other.lr:g}'
    return Card(
        name=rule.name,
        maths=told["maths"],
        facts=tuple((name, text) for name, text in facts if text),
        options=(*_options(rule, told["args"], rule.defaults), *then),
        recipe="" if "curvature" in rule.needs else recipe,
        python=f"optimizer = thalweg.optim.{class_name(rule.name)}(model.parameters(), lr={rule.lr:g})",
    )


def _stage_card(stage: Stage) -> Card:
    told = _told(stage)
    slots = stage.slots_for(stage.defaults)
    rules = [name for name in RULES if RULES[name].then == stage.name]
    form = next((form for form, name in DECAYS.items() if name == stage.name), None)
    facts = [
        ("", told["more"]),
        ("acts on", _WHERE[stage.kind]),
        ("reads", stage.reads),
        ("paper", stage.paper),
        ("departures", told["departures"]),
        ("slots", _slots(slots)),
        ("cost", told["cost"]),
        ("part of", ", ".join(rules)),
        ("evaluate", "other weights than the live ones: the engine does so" if stage.evaluate else ""),
        ("at zero", "" if stage.still else "a gradient of zero still moves the weights"),
    ]
    options = ", ".join(f"{name} = {value:g}" for name, value in stage.defaults.items() if not math.isinf(value))
    recipe = f"[optimizer.stages]\n{stage.name} = {{{f' {options} ' if options else ''}}}"
    given = f"stages={{{stage.name!r}: {{{', '.join(f'{n!r}: {v:g}' for n, v in stage.defaults.items() if not math.isinf(v))}}}}}"
    if form is not None:
        recipe = f'[optimizer]\nweight_decay = 0.1\ndecay_form = "{form}"'
        given = f"weight_decay=0.1, decay_form={form!r}"
    return Card(
        name=stage.name,
        maths=told["maths"],
        facts=tuple((name, text) for name, text in facts if text),
        options=_options(stage, told["args"], stage.defaults),
        recipe=recipe,
        python=f"optimizer = thalweg.optim.AdamW(model.parameters(), {given})".replace("'", '"'),
    )


def _takes(rule: Rule) -> str:
    if not rule.least_ndim:
        return "any parameter"
    return f"parameters of {rule.least_ndim} or more dimensions; what is left goes to adamw (optimizer.otherwise)"


def _told(component: Component) -> dict[str, Any]:
    """What a docstring says, in its parts: maths, more, args (names to text), cost, departures."""
    doc = inspect.cleandoc(component.update.__doc__ or "")
    heads = re.compile(r"^(Args|Cost|Departures):", flags=re.MULTILINE)
    paragraphs = [text for text in re.split(r"\n\n", heads.sub(r"\n\1:", doc)) if text.strip()]
    found: dict[str, Any] = {"maths": (), "more": "", "args": {}, "cost": "", "departures": ""}
    for i, text in enumerate(map(str.strip, paragraphs)):
        head = heads.match(text)
        if head is None and i == 0:
            found["maths"] = tuple(re.split(r";\s+", _one_line(text).rstrip(".")))
        elif head is None:
            found["more"] = f"{found['more']} {_one_line(text)}".strip()
        elif head.group(1) == "Args":
            found["args"] = _entries(text.removeprefix("Args:"))
        else:
            found[head.group(1).lower()] = _one_line(text.partition(":")[2])
    return found


def _entries(text: str) -> dict[tuple[str, ...], str]:
    entries: dict[tuple[str, ...], str] = {}
    for entry in re.split(r"\n    (?=\w+(?:, \w+)*: )", f"\n{text.strip(chr(10))}"):
        names, _, meaning = entry.strip().partition(": ")
        if names:
            entries[tuple(names.split(", "))] = _one_line(meaning)
    return entries


def _options(
    component: Component, args: Mapping[tuple[str, ...], str], defaults: Mapping[str, Any]
) -> tuple[tuple[str, str, str], ...]:
    """(names, defaults, meaning) of the options, in the order of the docstring."""
    rows = []
    for names, meaning in args.items():
        mine = [name for name in names if name in component.defaults]
        if mine:
            known = [f'"{choice}"' for name in mine for choice in component.choices.get(name, ())]
            if not all(choice in meaning for choice in known):
                meaning = f"{meaning.rstrip('.')} (one of {', '.join(known)})."
            rows.append((", ".join(mine), ", ".join(_shown(defaults[name]) for name in mine), meaning))
    return tuple(rows)


def _slots(slots: Sequence[Slot]) -> str:
    if not slots:
        return "none"
    listed = []
    for slot in slots:
        shape = "like the parameter" if slot.shape == "like" else ""
        if callable(slot.shape):
            shape = " x ".join(map(str, slot.shape(SHAPE))) + f" for {SHAPE[0]} x {SHAPE[1]}"
        listed.append(f"{slot.name} ({shape or _SHAPES[str(slot.shape)]})")
    return ", ".join(listed)


def _names(slots: Iterable[Slot]) -> str:
    return ", ".join(slot.name.rpartition(".")[2] for slot in slots) or "none"


def _shown(value: Any) -> str:
    """A default as TOML writes it, or ``none``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def _assigned(names: str, defaults: str) -> str:
    return ", ".join(f"{name}={default}" for name, default in zip(names.split(", "), defaults.split(", ")))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _as_markdown(shown: Card) -> str:
    parts = [f"### {shown.name}", "```text\n" + "\n".join(shown.maths) + "\n```"]
    parts.append("\n".join(f"- {f'**{name}**: ' if name else ''}{_prose(text)}" for name, text in shown.facts))
    if shown.options:
        rows = [(f"`{names}`", f"`{defaults}`", meaning) for names, defaults, meaning in shown.options]
        parts.append(_markdown_table(("option", "default", "meaning"), rows))
    parts += [f"```toml\n{shown.recipe}\n```"] if shown.recipe else []
    parts.append(f"```python\n{shown.python}\n```")
    return "\n\n".join(parts)


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_prose(cell, cell=True) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(text: str, *, cell: bool = False) -> str:
    """Text as Markdown that shows it as it is; arXiv numbers become links, and what stands in backquotes code."""
    parts = re.split(r"(``.+?``|`[^`]+`|\[\w+\]\(#\w+\))", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = part.replace("``", "`")
        else:
            plain = re.sub(r"([*<])", r"\\\1", part)
            parts[i] = re.sub(r"arXiv:(\d{4}\.\d{4,5}(?:v\d)?)", r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)
    made = "".join(parts)
    return made.replace("|", r"\|") if cell else made


if __name__ == "__main__":
    print(page(), end="")
