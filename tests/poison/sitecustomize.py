"""Poison the memory of every Python process that has this folder on its PYTHONPATH."""

from poisoned_memory import fill

fill(True)
