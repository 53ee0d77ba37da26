"""Precision: policies of the forward pass and the scale of the loss."""

from thalweg.precision.policy import POLICIES, LossScale, Policy, policy_for

__all__ = ["POLICIES", "LossScale", "Policy", "policy_for"]
