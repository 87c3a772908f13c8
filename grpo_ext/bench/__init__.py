"""Benchmarks, one runnable module each: ``python -m grpo_ext.bench.linear --help``."""
