"""Precision: policies of passes, what they change in a model, islands, and the scale of the loss."""

from thalweg.precision.islands import WORDS, island_modules
from thalweg.precision.policy import POLICIES, Policy, policy_for
from thalweg.precision.prepare import Prepared
from thalweg.precision.scale import LEAST, LossScale

__all__ = ["LEAST", "POLICIES", "WORDS", "LossScale", "Policy", "Prepared", "island_modules", "policy_for"]
