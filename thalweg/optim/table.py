"""How each parameter is treated: its rule, its rate and whether it decays, a table with a reason in every row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from thalweg.core import ModelError, ParameterRow, RecipeError, did_you_mean
from thalweg.core.plan import RECIPES_RULE
from thalweg.core.recipe import Optimizer, Schedule
from thalweg.optim.batch import FOLDS, fold_of
from thalweg.rules import RULES

_WORDS = {
    "bias": "a bias",
    "norm": "a gain or bias of a normalization layer",
    "1d": "fewer than 2 dimensions",
    "embedding": "an embedding table",
    "token": "a positional, class or mask token",
}
#: Names of learned positions and tokens, as whole words between dots and underscores.
_TOKEN = re.compile(
    r"(^|[._])(pos|position|positions|positional|pos_?embed\w*|position_embed\w*|positional_embed\w*|abs_pos\w*"
    r"|relative_position\w*|rel_pos\w*|relative_attention_bias|wpe|(cls|class|reg|register|dist|mask|distillation)_?(tokens?|embed\w*))($|[._])"
)
_GROUP_KEYS = ("rule", "lr", "lr_scale", "weight_decay", "options", "fold", "schedule")


@dataclass(frozen=True)
class _Parameter:
    """A trainable parameter and where it stands in the model."""

    name: str
    p: nn.Parameter
    owners: tuple[nn.Module, ...]

    def matches(self, pattern: str) -> bool:
        kind, colon, rest = pattern.partition(":")
        if not colon:
            return fnmatchcase(self.name, pattern)
        if kind == "type":
            return any(fnmatchcase(type(owner).__name__, rest) for owner in self.owners)
        if kind == "ndim":
            return str(self.p.ndim) == rest
        return fnmatchcase("x".join(map(str, self.p.shape)), rest)


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put before it.

    >>> plain_name("_orig_mod.module.head.weight")
    'head.weight'
    """
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module")]
    return ".".join(parts[1:] if parts[:1] == ["module"] and len(parts) > 1 else parts)


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(plain name, parameter) of what is trained; tied weights once.

    Raises:
        ModelError: if nothing is, or a parameter is complex.
    """
    named = [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        total = sum(1 for _ in model.parameters())
        raise ModelError(
            "The model has no parameter to train.",
            f"{total} parameters, 0 of them require a gradient.",
            "Give a model with parameters whose requires_grad is True.",
        )
    refuse_complex(named)
    return named


def refuse_complex(named: Iterable[tuple[str, Tensor]]) -> None:
    """The rules are of real numbers: the square of a complex gradient is no second moment.

    Raises:
        ModelError: for a complex parameter.
    """
    for name, p in named:
        if p.is_complex():
            raise ModelError(
                "Complex parameters are not trained.",
                f"'{name}' of shape {tuple(p.shape)} is {p.dtype}.",
                "Make torch.view_as_real(p) the parameter, and view it as complex in the forward pass.",
            )


def parameter_table(
    model: nn.Module,
    no_decay: Iterable[str] | None = None,
    *,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    thaw: int = 0,
) -> tuple[ParameterRow, ...]:
    """A row for each trainable parameter: its shape, rule, rate and decay, and what decided them.

    Args:
        no_decay: the words "bias", "norm", "1d", "embedding", "token", or patterns; None: the optimizer's.
        optimizer: a recipe's optimizer section, its options and rates settled; None: the default one.
        schedule: a recipe's schedule section: what moves is noted in each row.
        thaw: updates before the layer furthest from the output begins to train; those between wait evenly less.

    Raises:
        RecipeError: for a pattern that matches no parameter, a parameter that two groups match, or a group that says
            something unknown.
    """
    optimizer = optimizer or Optimizer()
    exempt = list(optimizer.no_decay if no_decay is None else no_decay)
    owners = _owners(model)
    found = [_Parameter(name, p, tuple(owners[id(p)])) for name, p in named_trainable(model)]
    _check_patterns(found, "optimizer.no_decay", [pattern for pattern in exempt if pattern not in _WORDS])
    _check_patterns(found, "optimizer.groups", list(optimizer.groups))
    groups = {pattern: _group(pattern, given) for pattern, given in optimizer.groups.items()}
    depths, top = _depths(model, found)
    furthest = max(1, top - min(depths.values()))
    last = _output_layer(model, found)
    rows = []
    for one in found:
        reason = next((r for word in exempt if (r := _exempt(word, one))), None)
        row = ParameterRow(
            one.name,
            tuple(one.p.shape),
            reason is None,
            reason or f"{one.p.ndim} dimensions",
            weight_decay=optimizer.weight_decay,
            fold=_fold(one),
        )
        row = _with_rule(row, one, optimizer, last)
        row = _with_group(row, one, groups, optimizer)
        row = replace(row, moves={**_moves(row, schedule or Schedule(), optimizer), **row.moves})
        below = top - depths[one.name]
        row = replace(row, lr=row.lr * optimizer.layer_decay**below, thaws=round(thaw * below / furthest))
        rows.append(row)
    return tuple(rows)


def _with_rule(row: ParameterRow, one: _Parameter, optimizer: Optimizer, last: nn.Module | None) -> ParameterRow:
    """The optimizer's rule, or for a rule of matrices what takes the rest."""
    rule = RULES[optimizer.rule]
    reason = None
    if rule.least_ndim:
        if one.p.ndim < rule.least_ndim:
            reason = f"{rule.name} takes matrices, and this has {one.p.ndim} dimensions"
        elif rule.least_ndim == 2 and _is_table(one):
            reason = f"{rule.name} takes hidden matrices, and this is an embedding table"
        elif rule.least_ndim == 2 and last is not None and last in one.owners:
            reason = f"{rule.name} takes hidden matrices, and this is the output layer"
        elif rule.least_ndim == 2 and _exempt("token", one):
            reason = f"{rule.name} takes hidden matrices, and this is {_WORDS['token']}"
    if reason is None:
        return replace(row, rule=rule.name, rule_reason=RECIPES_RULE, options=dict(optimizer.options))
    other = RULES[optimizer.otherwise]
    rate = other.lr if optimizer.otherwise_lr is None else optimizer.otherwise_lr
    return replace(row, rule=other.name, rule_reason=reason, lr=_scale(rate, optimizer), options={})


def _with_group(
    row: ParameterRow, one: _Parameter, groups: Mapping[str, Mapping[str, Any]], optimizer: Optimizer
) -> ParameterRow:
    hits = [pattern for pattern in groups if one.matches(pattern)]
    if len(hits) > 1:
        raise RecipeError(
            f"Two groups want the parameter '{one.name}'.",
            f"It is matched by {' and '.join(repr(hit) for hit in hits)}.",
            "Make one of the patterns narrower.",
        )
    if not hits:
        return row
    given, why = groups[hits[0]], f"matches '{hits[0]}'"
    if "rule" in given:
        name = given["rule"]
        if one.p.ndim < RULES[name].least_ndim:
            raise RecipeError(
                f"optimizer.groups gives '{one.name}' to {name}.",
                f"It has {one.p.ndim} dimensions, and {name} takes {RULES[name].least_ndim} or more.",
                "Make the pattern narrower, such as with 'ndim:2'.",
            )
        same = name == optimizer.rule
        rate = 1.0 if same else _scale(RULES[name].lr, optimizer)
        row = replace(row, rule=name, rule_reason=why, lr=rate, options=dict(optimizer.options) if same else {})
    if "lr" in given:
        row = replace(row, lr=_scale(float(given["lr"]), optimizer))
    if "lr_scale" in given:
        row = replace(row, lr=row.lr * float(given["lr_scale"]))
    if "weight_decay" in given:
        strength = float(given["weight_decay"])
        row = replace(row, weight_decay=strength, decays=strength > 0, decay_reason=why)
    if "options" in given:
        options = {**row.options, **given["options"]}
        RULES[row.rule].options(options)
        row = replace(row, options=options)
    moves = {name: f"groups.{hits[0]}.{name}" for name in given.get("schedule", {})}
    return replace(row, fold=given.get("fold", row.fold), moves=moves)


def _moves(row: ParameterRow, schedule: Schedule, optimizer: Optimizer) -> dict[str, str]:
    """What the recipe's schedules move for a parameter, beside its rate: not an option that its group gives.

    An option is that of the recipe's rule; of the rule that takes the rest, where the recipe's has none of that name.
    """
    moves = {} if schedule.weight_decay is None else {"weight_decay": "weight_decay"}
    for name in schedule.options:
        owner = optimizer.rule if name in RULES[optimizer.rule].defaults else optimizer.otherwise
        default = RULES[row.rule].defaults.get(name)
        own = row.options.get(name, default) != optimizer.options.get(name, default)
        if row.rule == owner and not (own and row.rule == optimizer.rule):
            moves[name] = f"options.{name}"
    return moves


def _scale(rate: float, optimizer: Optimizer) -> float:
    """A rate of its own as a factor on the recipe's peak."""
    peak = RULES[optimizer.rule].lr if optimizer.lr is None else optimizer.lr
    if not peak:
        raise RecipeError(
            "A group with a rate of its own needs a recipe with one.",
            "optimizer.lr=0, and rates are kept as factors on it.",
            "Give optimizer.lr above 0.",
        )
    return rate / peak


def check_groups(groups: Mapping[str, Any]) -> None:
    """Refuse groups that say something unknown, or say it in another form than a group's.

    Raises:
        RecipeError: naming the pattern and the key.
    """
    for pattern, given in groups.items():
        _group(pattern, given)


def _group(pattern: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"optimizer.groups.'{pattern}' is a table.", f"Got {given!r}.", f"Its keys are {', '.join(_GROUP_KEYS)}."
        )
    for key, value in given.items():
        if key not in _GROUP_KEYS:
            raise RecipeError(
                f"optimizer.groups.'{pattern}' has no key '{key}'.",
                f"{len(_GROUP_KEYS)} are known.",
                did_you_mean(key, _GROUP_KEYS),
            )
        wrong = key in ("lr", "lr_scale", "weight_decay") and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0
        )
        wrong |= key in ("options", "schedule") and not isinstance(value, Mapping)
        wrong |= (
            key == "schedule" and isinstance(value, Mapping) and not all(isinstance(v, str) for v in value.values())
        )
        wrong |= key == "fold" and value not in FOLDS
        wrong |= key == "rule" and not isinstance(value, str)
        if wrong:
            raise RecipeError(
                f"optimizer.groups.'{pattern}'.{key}={value!r} is not possible.",
                "Rates and strengths are numbers from 0 on; options a table, schedule a table of texts; fold 'batch' or 'flatten'.",
                f"Correct {key}.",
            )
    if "rule" in given:
        _ = RULES[given["rule"]]
    return given


def _check_patterns(found: list[_Parameter], where: str, patterns: list[str]) -> None:
    for pattern in patterns:
        kind, colon, _ = pattern.partition(":")
        if colon and kind not in ("type", "ndim", "shape"):
            raise RecipeError(
                f"{where} names '{pattern}'.",
                f"'{kind}:' is no kind of pattern.",
                "Use a pattern of names, or type:, ndim: or shape:.",
            )
        if not any(one.matches(pattern) for one in found):
            raise RecipeError(
                f"{where} names '{pattern}', and no parameter matches.",
                f"{len(found)} parameters, such as {found[0].name}.",
                f"Use a pattern of parameter names{', or the words ' + ', '.join(_WORDS) if 'no_decay' in where else ''}.",
            )


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter; a tied one has several."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(module)
    return owners


def _fold(one: _Parameter) -> str:
    """A convolution's kernel is one matrix, whatever its number of dimensions."""
    if any(isinstance(owner, nn.modules.conv._ConvNd) for owner in one.owners):
        return "flatten"
    return fold_of(one.p.shape)


def _is_table(one: _Parameter) -> bool:
    return any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in one.owners)


def _output_layer(model: nn.Module, found: list[_Parameter]) -> nn.Module | None:
    """The last linear layer in the order of definition, where there are hidden matrices beside it."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hidden = [one for one in found if one.p.ndim > 1 and not _is_table(one) and layers[-1:] != [*one.owners]]
    return layers[-1] if layers and hidden else None


def _depths(model: nn.Module, found: list[_Parameter]) -> tuple[dict[str, int], int]:
    """(depth of each parameter, depth of the output): 0 before the blocks, then a number for each block.

    The blocks are the longest ModuleList or Sequential; a model without one counts its children.
    """
    stacks = [
        (plain_name(name), module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    order = [one.name for one in found]
    if stacks:
        prefix, stack = max(stacks, key=lambda pair: len(pair[1]))
        keys = [f"{prefix}.{key}." if prefix else f"{key}." for key, _ in stack.named_children()]
    else:
        keys = [f"{plain_name(name)}." for name, _ in model.named_children()]
    place = {name: next((k for k, key in enumerate(keys, start=1) if name.startswith(key)), None) for name in order}
    inside = [i for i, name in enumerate(order) if place[name] is not None]
    first = inside[0] if inside else 0
    top = len(keys) + 1 if any(place[name] is None for name in order[first:]) else max(len(keys), 1)
    depths = {}
    for i, name in enumerate(order):
        own = place[name]
        depths[name] = own if own is not None else 0 if inside and i < first else top
    return depths, top


def _exempt(word: str, one: _Parameter) -> str | None:
    """Why ``word`` exempts this parameter from decay, or None if it does not."""
    if word not in _WORDS:
        return f"matches '{word}'" if one.matches(word) else None
    hit = {
        "bias": one.name.rsplit(".", 1)[-1].endswith("bias"),
        "norm": any(_normalizes(owner) for owner in one.owners),
        "1d": one.p.ndim < 2,
        "embedding": _is_table(one),
        "token": _TOKEN.search(one.name.lower()) is not None and not any(_multiplies(owner) for owner in one.owners),
    }
    return _WORDS[word] if hit[word] else None


def _multiplies(owner: nn.Module) -> bool:
    """Whether a module's weight is a layer's: DETR's "class_embed" is a classifier, and no class token."""
    return isinstance(owner, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd))


def _normalizes(owner: nn.Module) -> bool:
    """Whether a module is a normalization layer, by its name or a base's: RMSNorm, LayerScale and the like of any library."""
    return any(word in kind.__name__.lower() for kind in type(owner).__mro__ for word in ("norm", "layerscale"))
