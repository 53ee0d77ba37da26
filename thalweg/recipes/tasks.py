"""The shipped tasks by name, and the user's own by ``module:attribute``."""

from __future__ import annotations

import importlib
import os
import sys

from thalweg.core import Recipe, Task, TaskError, did_you_mean
from thalweg.recipes.names import EMBEDDED, SHIPPED


def find_task(name: str) -> Task:
    """The task called ``name``: a shipped one, or ``module:attribute`` (looked for from this folder too).

    Raises:
        TaskError: if there is none; errors inside the module itself are passed on.
    """
    if ":" not in name:
        if name not in SHIPPED:
            raise TaskError(
                f"There is no task called '{name}'.",
                f"{len(SHIPPED)} are shipped, {len(EMBEDDED)} of them with their data.",
                f"{did_you_mean(name, SHIPPED)} Your own is named module:attribute, such as my_project.my_task:task.",
            )
        task = importlib.import_module(SHIPPED[name][0]).TASK
        assert isinstance(task, Task)
        return task
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name and (module_name + ".").startswith(err.name + "."):
            raise TaskError(
                f"There is no module '{module_name}'.",
                f"Looked in {os.getcwd()} and the installed packages.",
                "Check the name, or run from the folder that holds it.",
            ) from None
        raise
    task = getattr(module, attribute, None)
    if not isinstance(task, Task):
        tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
        got = f"It is a {type(task).__name__}." if task is not None else f"{module_name} has no '{attribute}'."
        raise TaskError(f"'{name}' names no Task.", got, did_you_mean(attribute, tasks))
    return task


def recipe_for(task: Task) -> Recipe:
    """The task's own recipe: the default one with what the task changes."""
    return Recipe().override(task.recipe)


def short_name(name: str) -> str:
    """A name for run folders: ``my_project.my_task:task`` is ``my_task``."""
    return name.partition(":")[0].rsplit(".", 1)[-1]
