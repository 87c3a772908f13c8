"""Training: `GRPOConfig` and `GRPOTrainer` on top of transformers, with the losses of grpo_ext."""

from __future__ import annotations

from grpo_ext.rollouts.rewards import RewardError
from grpo_ext.trainer.config import GRPOConfig
from grpo_ext.trainer.trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "RewardError"]
