"""What a feed tells and asks where nobody listens."""

from __future__ import annotations

from typing import Any


def quiet(name: str, text: str, detail: dict[str, Any]) -> None:
    """Tells nobody."""


def never() -> bool:
    """Nobody wants the run to end."""
    return False
