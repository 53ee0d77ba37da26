"""Update rules and stages: pure maths, one technique a file, registered by being imported."""

import importlib
import pkgutil

from thalweg.rules.decay import DECAYS
from thalweg.rules.registry import REACHES, RULES, STAGES, Component, Rule, Slot, Stage, make_rule, rule, stage

__all__ = ["DECAYS", "REACHES", "RULES", "STAGES", "Component", "Rule", "Slot", "Stage", "make_rule", "rule", "stage"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"thalweg.rules.{_module.name}")
