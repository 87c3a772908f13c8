"""Small example tasks, models for them, and `heldout`, which measures the effect of training."""

from __future__ import annotations

from grpo_ext.tasks.arithmetic import TASKS, arithmetic_datasets, last_number, number_reward
from grpo_ext.tasks.dtype import fast_dtype
from grpo_ext.tasks.models import PACKAGED_MODELS, load_model

__all__ = [
    "PACKAGED_MODELS",
    "TASKS",
    "arithmetic_datasets",
    "fast_dtype",
    "last_number",
    "load_model",
    "number_reward",
]
