"""Benchmarks of thalweg; ``python -m benchmarks`` runs them and keeps the results."""
