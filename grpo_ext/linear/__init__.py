"""The losses from hidden states: the product with the language-model head and what follows it, chunk by chunk.

From the outside in: `loss` and `logps` (public functions, autograd), `arguments` (checks), `schedule` (how many passes
a loss needs), `operators` (``torch.ops.grpo_ext.linear_*``), `chunks` (the loops), `routes` (what a chunk's product
holds, and its kernels), `head` (products), `row_loss` (the one-pass kernel on a chunk), `rows` and `plan` (which rows,
how many at once). `grpo_ext.vocabulary` has the row kernels on logits.
"""

from __future__ import annotations

from grpo_ext.linear.logps import linear_selective_log_softmax
from grpo_ext.linear.loss import linear_grpo_loss

__all__ = ["linear_grpo_loss", "linear_selective_log_softmax"]
