"""Drop-ins for the GRPO losses of Liger-Kernel 0.8, with its signatures, defaults and return values.

Liger-Kernel itself is not needed. Intended differences:

- ``luspo`` sums over a completion's tokens, as TRL does; Liger divides that sum by the padded length.
- ``cispo``, ``sapo`` and ``vespo`` also support ratios of whole sequences.
- Without ``num_items_in_batch`` the divisor is the local number of tokens, and no collective is called.
- Nothing is compiled for a length; any number of positions works.
"""

from __future__ import annotations

from grpo_ext.integrations.liger.linear import LigerFusedLinearGRPOLoss
from grpo_ext.integrations.liger.logits import fused_selective_log_softmax, triton_grpo_loss

__all__ = ["LigerFusedLinearGRPOLoss", "fused_selective_log_softmax", "triton_grpo_loss"]
