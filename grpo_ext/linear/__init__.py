"""The losses from hidden states and language-model head, one chunk of rows at a time.

From the outside in: `loss` and `logps` (public functions, autograd), `arguments` (checks), `schedule` (how many passes
a loss needs), `operators` (``torch.ops.grpo_ext.linear_*``), `chunks` (the loops), `routes` (a chunk as logits or as
unnormalised probabilities), `head` (matrix products), `row_loss` (the one-pass kernel on a chunk), `rows` and `plan`
(which rows, how many at once). The row kernels on logits are in `grpo_ext.vocabulary`.
"""

from __future__ import annotations

from grpo_ext.linear.logps import linear_selective_log_softmax
from grpo_ext.linear.loss import linear_grpo_loss

__all__ = ["linear_grpo_loss", "linear_selective_log_softmax"]
