"""Complete recipes on data that every machine has, with small reference models."""

from thalweg.recipes.names import EMBEDDED
from thalweg.recipes.tasks import find_task, recipe_for, short_name

__all__ = ["EMBEDDED", "find_task", "recipe_for", "short_name"]
