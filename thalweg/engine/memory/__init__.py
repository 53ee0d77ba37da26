"""Memory: what training takes, predicted before step 0, and what is chosen so that it fits."""

from thalweg.engine.memory.settle import settle_memory

__all__ = ["settle_memory"]
