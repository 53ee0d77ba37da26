"""The rules as ``torch.optim.Optimizer``, and the schedules as ``LRScheduler``, for anyone's loop."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from thalweg.core import RecipeError
from thalweg.optim.lr_schedulers import Scheduler
from thalweg.optim.optimizer import RuleOptimizer
from thalweg.rules import RULES, Rule
from thalweg.schedules import Schedule


def face_of(rule: str | Rule) -> type[RuleOptimizer]:
    """The optimizer class of a rule, such as ``AdamW`` of "adamw"; of a rule that is not registered, a class made now."""
    if isinstance(rule, Rule):
        made: type[RuleOptimizer] | None = _FACES.get(rule.name) or globals().get(class_name(rule.name))
        return _make(rule) if made is None or made.rule is not rule else made
    if rule not in _FACES:  # registered by a user, after this module was imported
        _FACES[rule] = _make(RULES[rule])
    return _FACES[rule]


def __getattr__(name: str) -> Any:
    """The class of a rule that was registered after this module was imported: a pickle asks for it by name."""
    for rule in RULES:
        if class_name(rule) == name:
            return face_of(rule)
    raise AttributeError(f"module 'thalweg.optim.face' has no attribute '{name}'")


def class_name(rule: str) -> str:
    """A rule's class: "schedule_free_adamw" is ScheduleFreeAdamW.

    >>> class_name("sgd"), class_name("adamw"), class_name("stable_adamw")
    ('SGD', 'AdamW', 'StableAdamW')
    """
    return "".join(_WORDS.get(word, word.capitalize()) for word in rule.split("_"))


_WORDS = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "nadam": "NAdam",
    "nadamw": "NAdamW",
    "radam": "RAdam",
    "laprop": "LaProp",
    "adabelief": "AdaBelief",
    "adopt": "ADOPT",
    "ademamix": "AdEMAMix",
    "mars": "MARS",
    "lamb": "LAMB",
    "lars": "LARS",
    "came": "CAME",
    "soap": "SOAP",
    "gpa": "GPA",
    "kl": "KL",
    "apollo": "APOLLO",
    "normuon": "NorMuon",
    "d": "D",
}


def _make(rule: Rule) -> type[RuleOptimizer]:
    if hidden := sorted({*rule.defaults} & {*inspect.signature(RuleOptimizer.__init__).parameters}):
        raise RecipeError(
            f"The rule {rule.name} has an option '{hidden[0]}', and so has every optimizer.",
            "It would be taken for the optimizer's.",
            "Give the rule's option another name.",
        )
    doc = (rule.update.__doc__ or rule.name).strip().splitlines()[0]
    text = f"{doc}\n\n    ``thalweg rules {rule.name}`` prints its card. Options: ``RuleOptimizer``, and "
    text += ", ".join(f"{name}={value!r}" for name, value in rule.defaults.items()) + "."
    name = class_name(rule.name)
    about = {"rule_name": rule.name, "rule": rule, "__doc__": text, "__module__": __name__, "__qualname__": name}
    made = type(name, (RuleOptimizer,), about)
    globals()[name] = made
    return made


_FACES: dict[str, type[RuleOptimizer]] = {name: _make(RULES[name]) for name in RULES}


def scheduler(optimizer: torch.optim.Optimizer, schedule: str | Schedule, steps: int) -> Scheduler:
    """A schedule of the rate as a torch scheduler, to be stepped after each update of ``steps``; see ``Scheduler``.

    Args:
        schedule: in the schedule language, or an object of it.
        steps: updates of the whole run.
    """
    return Scheduler(optimizer, schedule, steps)
