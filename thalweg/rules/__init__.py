"""Update rules: one file of pure maths each, registered by being imported."""

from thalweg.rules.adam import adam
from thalweg.rules.registry import RULES, Rule, rule
from thalweg.rules.sgd import sgd

__all__ = ["RULES", "Rule", "adam", "rule", "sgd"]
