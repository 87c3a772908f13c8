"""grpo_ext: fast and exact GRPO-family losses in C++ and CUDA, and a trainer that uses them.

"SPEC section N" in comments and docstrings refers to docs/inside/spec.md.
"""

from grpo_ext import reference
from grpo_ext._build_info import __version__, build_info
from grpo_ext.advantages import group_advantages, importance_weights
from grpo_ext.config import LossConfig
from grpo_ext.linear import linear_grpo_loss, linear_selective_log_softmax
from grpo_ext.log_softmax import selective_log_softmax
from grpo_ext.losses import grpo_loss
from grpo_ext.output import GRPOLossOutput
from grpo_ext.policy import policy_loss

__all__ = [
    "GRPOLossOutput",
    "LossConfig",
    "__version__",
    "build_info",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "policy_loss",
    "reference",
    "selective_log_softmax",
]
