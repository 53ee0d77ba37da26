"""Precision: policies of passes, what they change in a model, islands, and the scale of the loss."""

from thalweg.precision.islands import WORDS, island_modules
from thalweg.precision.policy import POLICIES, Policy, policy_for
from thalweg.precision.prepare import Prepared
from thalweg.precision.scale import LossScale

__all__ = ["POLICIES", "WORDS", "LossScale", "Policy", "Prepared", "island_modules", "policy_for"]
