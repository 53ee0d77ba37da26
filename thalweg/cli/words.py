"""What several commands read from their arguments."""

from __future__ import annotations

import argparse
import os
from typing import Any

from thalweg.core import RecipeError, RunFolderError


def pair(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(
            f"--set {text} names no value.", "It is written PATH=VALUE.", "For example --set optimizer.lr=3e-4."
        )
    return path.strip(), value.strip()


def whole(text: str, option: str = "--resume", what: str = "step") -> int:
    if not text.isdecimal():
        raise RunFolderError(
            f"{option} {text} names no {what}.", f"A {what} is a whole number.", f"Give one, such as {option} 120."
        )
    return int(text)


def recipe_of(task: Any, file: str | None) -> Any:
    """The task's own recipe, and over it what a file says."""
    from thalweg.core import Recipe
    from thalweg.recipes import recipe_for

    return Recipe.from_file(file, base=recipe_for(task)) if file else recipe_for(task)


def add_data(command: argparse.ArgumentParser) -> None:
    """The option that names the data folder."""
    command.add_argument(
        "--data", metavar="FOLDER", help="where the task's files lie (default: the environment variable THALWEG_DATA)"
    )


def data_change(asked: argparse.Namespace) -> dict[str, str]:
    """What it changes in the recipe: whoever goes on from another folder finds the files too."""
    return {} if asked.data is None else {"data.folder": asked.data and os.path.abspath(os.path.expanduser(asked.data))}
