"""Fused linear: the product with the language-model head and what follows it, chunk by chunk.

From the outside in: `loss` and `logps` (public functions, autograd), `arguments` (checks), `operators` (the chunk loops
as ``torch.ops.grpo_ext.linear_*``), `chunks` (the loops), `vocabulary` and `parallel` (row kernels on a chunk of
logits), `policy` (token losses on compacted rows), `head` (products), `rows` and `plan` (which rows, how many at once).
On Hopper GPUs `probabilities` and `probabilities_loops` stand in the place of `head`, `vocabulary` and `chunks`;
`probabilities_reference` has their kernels in plain torch. `sharded_logits` is for logits that are already there, with
their vocabulary split over ranks: `parallel` without a head.
"""

from __future__ import annotations

from grpo_ext.linear.logps import linear_selective_log_softmax
from grpo_ext.linear.loss import linear_grpo_loss

__all__ = ["linear_grpo_loss", "linear_selective_log_softmax"]
