"""thalweg beside other trainers: equal maths, own environments, timed in turns. ``python -m benchmarks.speed --help``."""
