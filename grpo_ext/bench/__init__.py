"""Measurements, each a module that runs alone: ``python -m grpo_ext.bench.linear --help``."""
