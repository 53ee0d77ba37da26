"""The contract of update rules, for anyone's rule: the promises that ours keep, each a small function.

A promise that a rule cannot keep by design is not asked of it: its metadata says so (``Rule.still``, ``shared``, ``then``).
"""

from thalweg.testing.case import PROMISES, BrokenPromise, Case, Promise
from thalweg.testing.check import check_rule
from thalweg.testing.reads import HostRead, no_reads

__all__ = ["PROMISES", "BrokenPromise", "Case", "HostRead", "Promise", "check_rule", "no_reads"]
