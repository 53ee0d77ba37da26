"""Other names for tensors, by module: ``OLD=NEW``, where either may be empty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from thalweg.checkpoint.convert.weights import Weights, listed
from thalweg.core import RecipeError


def rules_of(texts: Iterable[str]) -> list[tuple[str, str]]:
    """(old, new) names of modules or tensors, in order.

    >>> rules_of(["model.=net", "=trunk"])
    [('model', 'net'), ('', 'trunk')]
    """
    rules = []
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or old.strip() == new.strip():
            raise RecipeError(
                f"--rename {text} renames nothing.",
                "It is written OLD=NEW, with names of modules or tensors.",
                "For example --rename model=net; --rename =net puts all below net, --rename model= takes model off.",
            )
        rules.append((old.strip().strip("."), new.strip().strip(".")))
    return rules


def new_name(name: str, rules: Sequence[tuple[str, str]]) -> tuple[str, int]:
    """(the name by the first rule that fits, which rule that was); -1: none.

    >>> new_name("model.head.weight", [("head", "x"), ("model", "net")])
    ('net.head.weight', 1)
    >>> new_name("model10.weight", [("model1", "net")])
    ('model10.weight', -1)
    """
    for at, (old, new) in enumerate(rules):
        if name == old:
            return new, at
        if not old or name.startswith(old + "."):
            rest = name[len(old) + 1 :] if old else name
            return f"{new}.{rest}" if new else rest, at
    return name, -1


def renamed(weights: Weights, texts: Iterable[str]) -> Weights:
    """The same weights by other names; a tensor whose name becomes empty is left out.

    Raises:
        RecipeError: for a rule that fits no name, and for two tensors that would have one name.
    """
    rules = rules_of(texts)
    if not rules:
        return weights
    used: set[int] = set()
    names: dict[str, str] = {}
    for name in (*weights.tensors, *weights.tied):
        names[name], at = new_name(name, rules)
        used.add(at)
    for at, (old, new) in enumerate(rules):
        if at not in used:
            raise RecipeError(
                f"--rename {old}={new} fits no name.",
                f"There are {len(names)}, such as {listed(names)}.",
                "Name a module or a tensor as the file does.",
            )
    _check_distinct(names)
    kept = [name for name in names if names[name]]
    first: dict[str, str] = {}  # where the first name is left out, a tied one takes its place
    for name in kept:
        first.setdefault(weights.tied.get(name, name), name)
    tensors = {names[name]: weights.tensors[whole] for whole, name in first.items()}
    tied = {
        names[name]: names[first[weights.tied.get(name, name)]]
        for name in kept
        if first[weights.tied.get(name, name)] != name
    }
    left_out = [name for name in names if not names[name]]
    told = f"Left out, as asked: {listed(left_out)}." if left_out else ""
    return replace(weights, tensors=tensors, tied=tied).telling(told)


def _check_distinct(names: Mapping[str, str]) -> None:
    taken: dict[str, str] = {}
    for name, new in names.items():
        if new and new in taken:
            raise RecipeError(
                f"Two tensors would be called {new}.",
                f"They are {taken[new]} and {name}.",
                "Give them different names, or leave one out: --rename NAME=.",
            )
        taken[new] = name


def suggestion(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A ``--rename`` that would explain all that is missing, or an empty text.

    >>> suggestion(["0.weight", "0.bias"], ["net.0.weight", "net.0.bias"])
    '--rename net='
    >>> suggestion(["weight"], ["a", "b"])
    ''
    """
    if not missing:
        return ""
    wanted = missing[0].split(".")
    for candidate in unexpected:
        found = candidate.split(".")
        same = 0
        while same < min(len(found), len(wanted)) and found[-1 - same] == wanted[-1 - same]:
            same += 1
        if same:
            old, new = ".".join(found[: len(found) - same]), ".".join(wanted[: len(wanted) - same])
            if set(missing) <= {new_name(name, [(old, new)])[0] for name in unexpected}:
                return f"--rename {old}={new}"
    return ""
