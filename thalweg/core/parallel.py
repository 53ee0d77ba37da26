"""How ranks share one model: the recipe's words for it, read and checked without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from thalweg.core.errors import RecipeError, did_you_mean

#: Words of the recipe; "auto" is filled by the memory plan.
FORMS = ("auto", "ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class Layout:
    """Ranks in a box of data x shard x tensor; rank 0 and rank 1 differ in the last side that is longer than 1.

    Args:
        data: copies of the model; each trains on micro-batches of its own.
        shard: ranks that one copy's parameters, gradients and slots are spread over; each trains on micro-batches of its own too.
        tensor: ranks that compute each layer of a micro-batch together.

    >>> layout = Layout(data=2, shard=1, tensor=2)
    >>> str(layout), layout.ranks, layout.feeds, [layout.feed_of(rank) for rank in range(4)]
    ('data=2, tensor=2', 4, 2, [0, 0, 1, 1])
    """

    data: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.shard * self.tensor

    @property
    def feeds(self) -> int:
        """How many ways the micro-batches of a step go."""
        return self.data * self.shard

    @property
    def form(self) -> str:
        """How parameters lie on the ranks that read other micro-batches: "ddp", "fsdp" or "hsdp"."""
        return "ddp" if self.shard == 1 else "fsdp" if self.data == 1 else "hsdp"

    def feed_of(self, rank: int) -> int:
        """Which of the ways is a rank's; ranks that compute a layer together read the same."""
        return rank // self.tensor

    def place_of(self, rank: int) -> tuple[int, int, int]:
        """(data, shard, tensor) of a rank, each from 0."""
        return rank // (self.shard * self.tensor), rank // self.tensor % self.shard, rank % self.tensor

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in asdict(self).items() if size > 1) or "data=1"

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


SIZES = tuple(field.name for field in fields(Layout))


def check_parallel(value: Any) -> None:
    """Refuse what says nothing about ranks, however many there will be.

    Raises:
        RecipeError: naming the words that are known.
    """
    if isinstance(value, Mapping):
        _check_sizes(value)
    elif value not in FORMS:
        raise RecipeError(
            f"parallel={value!r} is not known.",
            f"It is one of {', '.join(FORMS)}, or sizes such as {{data=4, tensor=2}}.",
            did_you_mean(str(value), FORMS),
        )


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    unknown = [name for name in sizes if name not in SIZES]
    if unknown or not sizes:
        raise RecipeError(
            f"parallel={told(sizes)} is not known.",
            f"{unknown[0]!r} is no side of a mesh." if unknown else "It gives no size.",
            did_you_mean(unknown[0], SIZES) if unknown else f"Known: {', '.join(SIZES)}.",
        )
    bad = [(name, size) for name, size in sizes.items() if type(size) is not int or not 1 <= size < 2**31]
    if bad:
        raise RecipeError(
            f"parallel.{bad[0][0]}={bad[0][1]!r} is no number of ranks.",
            "It is a whole number from 1 on.",
            f"Give such as {bad[0][0]}=2.",
        )


def layout_of(value: str | Mapping[str, int], world: int, on_each: int) -> Layout | None:
    """How ``world`` ranks stand; None for "auto".

    Args:
        value: of the recipe, checked.
        world: ranks there are.
        on_each: of them on each machine.

    Raises:
        RecipeError: for sizes that do not multiply out to the ranks.
    """
    if isinstance(value, Mapping):
        return _of_sizes(value, world)
    if value == "hsdp":
        return _on_machines(world, on_each)
    return {"auto": None, "ddp": Layout(data=world), "fsdp": Layout(shard=world)}[value]


def _of_sizes(sizes: Mapping[str, int], world: int) -> Layout:
    """What is left out: ``data`` is as large as it can be, the others are 1."""
    inner = math.prod(size for name, size in sizes.items() if name != "data")
    layout = Layout(**{"data": max(1, world // inner), **sizes})
    if layout.ranks == world:
        return layout
    sides = [f"{name}={sizes[name]}" for name in SIZES if name in sizes]
    near = inner if inner <= world and world % inner == 0 else None
    instead = f"or let data be {world // inner}" if near else f"or give sizes that multiply out to {world}"
    product = " x ".join(str(sizes[name]) for name in SIZES if name in sizes)
    given = math.prod(sizes.values())
    numbers = f"{product} = {given}; " if len(sizes) > 1 else ""
    numbers += f"{world} / {given} = {world / given:.2f}." if "data" not in sizes else f"{world} ranks were started."
    raise RecipeError(
        f"parallel={{{', '.join(sides)}}} does not multiply out to {world} ranks.",
        numbers,
        f"Start {given if 'data' in sizes else inner * max(1, -(-world // inner))} ranks, {instead}.",
    )


def _on_machines(world: int, on_each: int) -> Layout:
    if on_each >= world or world % on_each:
        raise RecipeError(
            "parallel='hsdp' shards on each machine and copies between machines.",
            f"All {world} ranks are on one machine."
            if on_each >= world
            else f"{world} ranks are no whole number of machines with {on_each}.",
            "Use parallel='fsdp', or say the sizes, such as {data=2, shard=4}.",
        )
    return Layout(data=world // on_each, shard=on_each)


def told(value: str | Mapping[str, Any]) -> str:
    """As one writes it in TOML.

    >>> told({"data": 4, "tensor": 2}), told("fsdp")
    ('{data=4, tensor=2}', "'fsdp'")
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}={size}' for name, size in value.items())}}}"
    return repr(value)
