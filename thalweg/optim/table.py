"""Which parameters decay: a table with a reason in every row, printed before step 1."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from thalweg.core import ModelError, ParameterRow, RecipeError

_WORDS = {
    "bias": "a bias",
    "norm": "a gain or bias of a normalization layer",
    "1d": "fewer than 2 dimensions",
    "embedding": "an embedding table",
}


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put before it.

    >>> plain_name("_orig_mod.module.head.weight")
    'head.weight'
    """
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module")]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(plain name, parameter) of what is trained; tied weights once.

    Raises:
        ModelError: if nothing is.
    """
    named = [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        total = sum(1 for _ in model.parameters())
        raise ModelError(
            "The model has no parameter to train.",
            f"{total} parameters, 0 of them require a gradient.",
            "Give a model with parameters whose requires_grad is True.",
        )
    return named


def parameter_table(model: nn.Module, no_decay: Iterable[str]) -> tuple[ParameterRow, ...]:
    """A row for each trainable parameter: its shape, whether it decays, and what decided that.

    Args:
        no_decay: the words "bias", "norm", "1d", "embedding", or patterns of names such as "blocks.0.*".

    Raises:
        RecipeError: for a pattern that matches no parameter.
    """
    rules = list(no_decay)
    owners = _owners(model)
    named = named_trainable(model)
    for pattern in rules:
        if pattern not in _WORDS and not any(fnmatchcase(name, pattern) for name, _ in named):
            raise RecipeError(
                f"optimizer.no_decay names '{pattern}', and no parameter matches.",
                f"{len(named)} parameters, such as {named[0][0]}.",
                f"Use the words {', '.join(_WORDS)}, or a pattern of parameter names.",
            )
    rows = []
    for name, p in named:
        reason = next((r for rule in rules if (r := _exempt(rule, name, p, owners[id(p)]))), None)
        rows.append(ParameterRow(name, tuple(p.shape), reason is None, reason or f"{p.ndim} dimensions"))
    return tuple(rows)


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter; a tied one has several."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(module)
    return owners


def _exempt(rule: str, name: str, p: nn.Parameter, owners: list[nn.Module]) -> str | None:
    """Why ``rule`` exempts this parameter from decay, or None if it does not."""
    hit = {
        "bias": name.rsplit(".", 1)[-1].endswith("bias"),
        "norm": any("norm" in type(owner).__name__.lower() for owner in owners),
        "1d": p.ndim < 2,
        "embedding": any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in owners),
    }
    if rule in _WORDS:
        return _WORDS[rule] if hit[rule] else None
    return f"matches '{rule}'" if fnmatchcase(name, rule) else None
