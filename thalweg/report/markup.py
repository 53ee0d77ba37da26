"""Pieces of HTML. What is passed as text is escaped here, so that no value of a run can become markup."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def tag(name: str, text: Any, **attributes: Any) -> str:
    """An element around a text; an underscore in a name stands for a hyphen, and one at its end for nothing.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    return wrap(name, escape(str(text)), **attributes)


def wrap(name: str, markup: str, **attributes: Any) -> str:
    """An element around markup that is escaped already."""
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{listed}>{markup}</{name}>"


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading; nothing where all parts are empty."""
    return wrap("section", tag("h2", title) + "".join(parts)) + "\n" if any(parts) else ""


def details(summary: str, body: str) -> str:
    """A part that is folded away until asked for."""
    return wrap("details", tag("summary", summary) + body)


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Sequence[int] = (),
    names: Sequence[int] = (),
) -> str:
    """A table of texts and values, which scrolls sideways on a narrow screen.

    Args:
        numbers: columns that are set flush right.
        names: columns that hold paths or names of parameters, set as code.
    """

    def cell(name: str, column: int, content: Any, **attributes: Any) -> str:
        if column in numbers or column in names:
            attributes["class_"] = "number" if column in numbers else "name"
        return tag(name, shown(content), **attributes)

    head = wrap("tr", "".join(cell("th", i, text, scope="col") for i, text in enumerate(headings)))
    body = "\n".join(wrap("tr", "".join(cell("td", i, value) for i, value in enumerate(row))) for row in rows)
    return wrap("div", wrap("table", wrap("thead", head) + wrap("tbody", body)), class_="scroll", tabindex="0")


def shown(value: Any) -> str:
    """A value of a recipe or plan as people read it.

    >>> shown(True), shown(["bias", "1d"]), shown(1e-08), shown({"a": 1}), shown(None)
    ('true', 'bias, 1d', '1e-08', '{"a": 1}', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
