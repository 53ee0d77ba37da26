"""Complete recipes, on data that every machine has or that a folder holds, with small reference models."""

from thalweg.recipes.names import EMBEDDED, FROM_FOLDER, SHIPPED
from thalweg.recipes.tasks import find_task, recipe_for, short_name

__all__ = [
    "EMBEDDED",
    "FROM_FOLDER",
    "SHIPPED",
    "find_task",
    "recipe_for",
    "short_name",
]
