"""Drop-ins for the GRPO losses of Liger-Kernel 0.8, with its signatures, defaults and return values.

Liger-Kernel is not needed. What differs on purpose: ``luspo`` is TRL's sum over a completion's tokens and not that
divided by its padded length; ``cispo``, ``sapo`` and ``vespo`` take ratios of whole sequences too; without
``num_items_in_batch`` the divisor is the local number of tokens, and no collective is called; nothing is compiled for a
length, and any number of positions is served.
"""

from __future__ import annotations

from grpo_ext.integrations.liger.linear import LigerFusedLinearGRPOLoss
from grpo_ext.integrations.liger.logits import fused_selective_log_softmax, triton_grpo_loss

__all__ = ["LigerFusedLinearGRPOLoss", "fused_selective_log_softmax", "triton_grpo_loss"]
