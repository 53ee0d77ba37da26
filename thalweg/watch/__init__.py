"""Where the values of a run go: JSON Lines, memory, the terminal."""

from typing import TYPE_CHECKING, Any

from thalweg.watch.jsonl import JsonLines, Memory

if TYPE_CHECKING:
    from thalweg.watch.console import Terminal

__all__ = ["JsonLines", "Memory", "Terminal"]


def __getattr__(name: str) -> Any:
    if name == "Terminal":
        from thalweg.watch.console import Terminal

        return Terminal
    raise AttributeError(f"module 'thalweg.watch' has no attribute '{name}'")
