"""The `grpo-ext` command: sets what OpenMP reads once, when torch loads it, then runs `grpo_ext.cli.main`.

A module of its own, because importing any part of grpo_ext loads torch.
"""

import os

# Threads that spin between parallel regions stop a job on shared cores: no step in 240 s, with sleeping ones 26 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from grpo_ext.cli.main import main

__all__ = ["main"]
