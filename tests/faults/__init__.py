"""Faults made on purpose, and what is left of a run after each.

``python -m tests.faults [FAMILY ...]`` is the long form; tests/test_faults.py runs a short one of each. See docs/faults.md.
"""
