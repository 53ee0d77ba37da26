"""State dicts from torch.optim and back, for the rules that torch has: a run begun with one goes on with the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thalweg.core import RecipeError, did_you_mean
from thalweg.device import exact_dtype
from thalweg.optim.face import face_of
from thalweg.optim.optimizer import SCHEMA, RuleOptimizer
from thalweg.rules import RULES

_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
#: How torch runs an update, which changes nothing of what it is.
_WAYS = ("foreach", "fused", "capturable", "differentiable")
#: What a group of ours has beside options, and torch's has not.
_OURS = ("peak_lr", "moving", "rule", "schema")


@dataclass(frozen=True)
class Counterpart:
    """A rule of ours as torch has it.

    Attributes:
        torch_class: in torch.optim.
        names: torch's options and what they are called here; several names for a tuple.
        torch_fixed: torch's options that have no counterpart, and the one value at which both are the same.
        our_fixed: ours likewise.
        values: by our name, values that are called otherwise: torch's and ours.
        forms: the forms of weight decay that torch's class has.
        num_dims: least and most dimensions of a parameter whose slots both keep alike.
        by_shape: whether slots are read by the shape of their parameter, which a state dict does not hold.
    """

    torch_class: str
    names: Mapping[str, str | tuple[str, ...]]
    torch_fixed: Mapping[str, Any] = field(default_factory=dict)
    our_fixed: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, tuple[tuple[Any, Any], ...]] = field(default_factory=dict)
    forms: tuple[str, ...] = ("coupled",)
    num_dims: tuple[int, int] = (0, 99)
    by_shape: bool = False


_COMMON: dict[str, str] = {"lr": "lr", "weight_decay": "weight_decay", "maximize": "maximize"}
_ADAM: dict[str, str | tuple[str, ...]] = {**_COMMON, "betas": ("b1", "b2"), "eps": "eps"}
_EITHER = ("coupled", "decoupled")

#: The rules that torch has.
COUNTERPARTS: dict[str, Counterpart] = {
    "sgd": Counterpart("SGD", {**_COMMON, "momentum": "momentum", "nesterov": "nesterov"}, {"dampening": 0}),
    "adam": Counterpart("Adam", {**_ADAM, "amsgrad": "amsgrad"}, forms=_EITHER),
    "adamw": Counterpart("AdamW", {**_ADAM, "amsgrad": "amsgrad"}, forms=("decoupled",)),
    "rmsprop": Counterpart(
        "RMSprop",
        {**_COMMON, "alpha": "b2", "eps": "eps", "momentum": "momentum", "centered": "centered"},
        our_fixed={"variant": "torch"},
    ),
    "adagrad": Counterpart("Adagrad", {**_COMMON, "eps": "eps", "initial_accumulator_value": "start"}, {"lr_decay": 0}),
    "adadelta": Counterpart("Adadelta", {**_COMMON, "rho": "b2", "eps": "eps"}),
    "nadam": Counterpart(
        "NAdam", {**_ADAM, "momentum_decay": "momentum_decay"}, our_fixed={"variant": "torch"}, forms=_EITHER
    ),
    "nadamw": Counterpart(
        "NAdam", {**_ADAM, "momentum_decay": "momentum_decay"}, our_fixed={"variant": "torch"}, forms=_EITHER
    ),
    "radam": Counterpart("RAdam", _ADAM, our_fixed={"least": 5.0}, forms=_EITHER),
    "adafactor": Counterpart(
        "Adafactor",
        {**_COMMON, "beta2_decay": "beta2_decay", "eps": ("eps1", "eps2"), "d": "most_rms"},
        our_fixed={"variant": "torch", "relative_step": True, "scale_parameter": True},
        forms=("decoupled",),
        num_dims=(1, 2),
        by_shape=True,
    ),
    "muon": Counterpart(
        "Muon",
        {
            "lr": "lr",
            "weight_decay": "weight_decay",
            "momentum": "momentum",
            "nesterov": "nesterov",
            "ns_steps": "steps",
            "eps": "eps",
            "adjust_lr_fn": "scale",
        },
        {"ns_coefficients": _NEWTON_SCHULZ},
        {"coefficients": "newton-schulz", "precision": "bf16", "heads": 0, "normalize": False, "maximize": False},
        values={"scale": ((None, "original"),)},
        forms=("decoupled",),
        num_dims=(2, 2),
    ),
}


def counterpart(rule: str) -> Counterpart:
    """How torch has a rule.

    Raises:
        RecipeError: if it does not.
    """
    if rule not in COUNTERPARTS:
        raise RecipeError(
            f"torch.optim has no counterpart of '{rule}'.",
            f"{len(COUNTERPARTS)} rules have one: {', '.join(COUNTERPARTS)}.",
            "Keep this optimizer, or begin with a new one.",
        )
    return COUNTERPARTS[rule]


def options_from_torch(rule: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a class of torch.optim as those of our rule; torch's ways of running (foreach and the like) are left out.

    >>> options_from_torch("rmsprop", {"alpha": 0.9, "centered": True})
    {'decay_form': 'coupled', 'variant': 'torch', 'b2': 0.9, 'centered': True}

    Raises:
        RecipeError: for an option that the rule does not have, at a value that matters.
    """
    about = counterpart(rule)
    found: dict[str, Any] = {"decay_form": about.forms[0], **about.our_fixed}
    for name, value in options.items():
        if name in _WAYS:
            continue
        if name == "decoupled_weight_decay":
            found["decay_form"] = "decoupled" if value else "coupled"
        elif name in about.torch_fixed:
            if value != about.torch_fixed[name]:
                raise RecipeError(
                    f"{rule} here has no option for torch's {name}={value!r}.",
                    f"Both are the same at {name}={about.torch_fixed[name]!r}.",
                    "Go on in torch.optim, or begin anew with another rule.",
                )
        elif name in about.names:
            mine = about.names[name]
            if isinstance(mine, tuple):
                found.update(zip(mine, value))
            else:
                found[mine] = next((ours for theirs, ours in about.values.get(mine, ()) if theirs == value), value)
        else:
            raise RecipeError(
                f"torch.optim.{about.torch_class} has no option '{name}'.",
                f"Given: {name}={value!r}.",
                did_you_mean(name, (*about.names, *about.torch_fixed)),
            )
    return found


def from_torch(state: torch.optim.Optimizer | Mapping[str, Any], rule: str | None = None) -> dict[str, Any]:
    """The state of a torch.optim optimizer as a state dict of ours, for ``load_state_dict`` of the rule's class.

    Groups keep their rates and options. Slots go on in at least float32, as they are kept here. A parameter that was never
    updated stays one; SGD and Muon, which count nothing in torch, are taken to have made one update.

    Args:
        state: a torch.optim optimizer, or its state dict.
        rule: the rule that goes on with it; None: the one of the optimizer's class.

    >>> torch_one = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    >>> from_torch(torch_one)["param_groups"][0]["momentum"]
    0.9

    Raises:
        RecipeError: for an optimizer or an option that has no counterpart here.
    """
    if rule is None:
        known = {about.torch_class: name for name, about in reversed(COUNTERPARTS.items())}
        given = type(state).__name__ if isinstance(state, torch.optim.Optimizer) else "a state dict"
        if given not in known:
            raise RecipeError(
                f"It is not known which rule {given} was made by.",
                f"{len(known)} classes of torch.optim are known: {', '.join(sorted(known))}.",
                "Give the rule, such as rule='adamw'.",
            )
        rule = known[given]
    about = counterpart(rule)
    tree: Mapping[str, Any] = state.state_dict() if isinstance(state, torch.optim.Optimizer) else state
    groups, entries = [], {}
    for group in tree["param_groups"]:
        known = _made(about).defaults
        marks = {name: value for name, value in group.items() if name not in known}  # of schedulers, say
        options = {name: value for name, value in group.items() if name in known}
        mine = options_from_torch(rule, options)
        RULES[rule].options({name: value for name, value in mine.items() if name in RULES[rule].defaults})
        groups.append({**_cloned(mine), **marks, "rule": rule, "schema": SCHEMA})
        for number in group["params"]:
            if kept := {name: value for name, value in tree["state"].get(number, {}).items() if value is not None}:
                entries[number] = _slots_from_torch(rule, about, kept)
            elif number in tree["state"]:
                entries[number] = {"step": torch.ones(()), "tries": 1}  # plain SGD keeps an entry with nothing in it
    return {"state": entries, "param_groups": groups}


def _slots_from_torch(rule: str, about: Counterpart, kept: Mapping[str, Any]) -> dict[str, Any]:
    step = torch.as_tensor(kept.get("step", 1.0)).detach().to("cpu", torch.float32, copy=True)
    found: dict[str, Any] = {"step": step, "tries": int(step)}
    names = {theirs: ours for ours, theirs in RULES[rule].torch_names.items()}
    for name, value in kept.items():
        if name == "step":
            continue
        value = torch.as_tensor(value).detach()
        if name == "variance":  # Adafactor's of a vector, which here is a matrix of one row
            wide = _wide(value).reshape(1, -1)
            found |= {"r": wide.mean(dim=-1, keepdim=True), "c": wide}
        elif name in names:
            if names[name] == "mu_product":
                found["mu_product"] = value.to(exact_dtype(value.device), copy=True)
            else:
                _check_num_dims(about, value.ndim)
                found[names[name]] = _wide(value)
        else:
            raise RecipeError(
                f"{rule} here has no slot for torch's '{name}'.",
                f"It has {', '.join(names)}.",
                "Give the rule that the state was made by.",
            )
    return found


def to_torch(state: RuleOptimizer | Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer of ours as a state dict for ``load_state_dict`` of the class of the same name in torch.optim.

    Args:
        state: an optimizer, or its state dict.

    >>> import thalweg.optim
    >>> ours = thalweg.optim.RMSprop([torch.nn.Parameter(torch.ones(2))], b2=0.9)
    >>> to_torch(ours)["param_groups"][0]["alpha"]
    0.9

    Raises:
        RecipeError: for a rule, an option or a slot that torch.optim does not have.
    """
    tree: Mapping[str, Any] = state.state_dict() if isinstance(state, RuleOptimizer) else state
    numbers = [number for group in tree["param_groups"] for number in group["params"]]
    num_dims: dict[Any, int] = {}
    if isinstance(state, RuleOptimizer):
        num_dims = dict(zip(numbers, (p.ndim for group in state.param_groups for p in group["params"])))
    groups, entries = [], {}
    for group in tree["param_groups"]:
        rule = group.get("rule", "what a state dict of torch holds")
        about = counterpart(rule)
        _refuse(
            about.by_shape and not num_dims,
            f"Slots of {rule} are converted by the shapes of the parameters.",
            "A state dict does not hold them.",
            "Give the optimizer itself, after load_state_dict.",
        )
        known = (*face_of(rule)([torch.zeros(1, 1)]).defaults, *_OURS)
        marks = {name: value for name, value in group.items() if name not in known}
        theirs = {**_made(about).defaults, **_options_to_torch(about, group)}
        groups.append({**_cloned(theirs), **marks})
        for number in group["params"]:
            if number in tree["state"]:
                entries[number] = _slots_to_torch(rule, about, tree["state"][number], num_dims.get(number))
    return {"state": entries, "param_groups": groups}


def _made(about: Counterpart) -> torch.optim.Optimizer:
    """One of torch's, for its defaults."""
    made: torch.optim.Optimizer = getattr(torch.optim, about.torch_class)([torch.zeros(1, 1)])
    return made


def _options_to_torch(about: Counterpart, group: Mapping[str, Any]) -> dict[str, Any]:
    where, form = f"torch.optim.{about.torch_class}", group["decay_form"]
    for name, value in {**about.our_fixed, "stages": {}}.items():
        _refuse(group[name] != value, f"{where} has no {name}={group[name]!r}.", f"It is always {value!r} there.")
    decays = bool(group["weight_decay"])
    _refuse(
        decays and form not in about.forms,
        f"{where} has no weight decay in the form '{form}'.",
        f"It has {_list(about.forms)}.",
    )
    found: dict[str, Any] = {}
    for theirs, mine in about.names.items():
        if isinstance(mine, tuple):
            found[theirs] = tuple(group[name] for name in mine)
        else:
            found[theirs] = next(
                (there for there, here in about.values.get(mine, ()) if here == group[mine]), group[mine]
            )
    scale = found.get("adjust_lr_fn")
    _refuse(
        scale not in (None, "match_rms_adamw"),
        f"{where} has no scale={scale!r}.",
        "It has 'original' and 'match_rms_adamw'.",
    )
    if "decoupled_weight_decay" in _made(about).defaults:
        found["decoupled_weight_decay"] = form == "decoupled" or about.forms == ("decoupled",)
    return found


def _slots_to_torch(rule: str, about: Counterpart, kept: Mapping[str, Any], num_dims: int | None) -> dict[str, Any]:
    names, where = RULES[rule].torch_names, f"torch.optim.{about.torch_class}"
    found: dict[str, Any] = {}
    if num_dims is not None:
        _check_num_dims(about, num_dims)
    if about.torch_class not in ("SGD", "Muon"):  # they count nothing
        found["step"] = kept["step"].detach().to("cpu", torch.float32, copy=True)
    for name, value in kept.items():
        if name in ("step", "tries", "cohort"):
            continue
        _refuse(name not in names, f"{where} has no place for the slot '{name}'.", f"It keeps {_list(tuple(names))}.")
        if name == "mu_product":
            found[name] = value.detach().to("cpu", torch.float32, copy=True)
        else:
            _check_num_dims(about, value.ndim)
            found[names[name]] = value.detach().clone()
    if about.by_shape and num_dims == 1:
        found = {"step": found["step"], "variance": found["col_var"].flatten()}
    return found


def _check_num_dims(about: Counterpart, num: int) -> None:
    low, most = about.num_dims
    _refuse(
        not low <= num <= most,
        f"torch.optim.{about.torch_class} and ours keep different slots for a parameter of {num} dimensions.",
        f"They are alike for {low} to {most} dimensions.",
        "Give such parameters to another optimizer, or begin with a new one.",
    )


def _refuse(
    wrong: bool, asked: str, numbers: str, remedy: str = "Keep this optimizer, or begin with a new one of torch."
) -> None:
    if wrong:
        raise RecipeError(asked, numbers, remedy)


def _list(names: tuple[str, ...]) -> str:
    return " and ".join(f"'{name}'" for name in names) or "none"


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _cloned(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
