"""Regularization that knows of micro-batches, skipped steps and averages."""

from thalweg.regularize.batchnorm import PooledStatistics
from thalweg.regularize.losses import cross_entropy

__all__ = ["PooledStatistics", "cross_entropy"]
