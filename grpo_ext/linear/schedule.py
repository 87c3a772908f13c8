"""Choose how many passes over a chunk's product a loss makes, and when its gradient is formed."""

from __future__ import annotations

from typing import Literal

import torch

from grpo_ext._checks import PolicyTensors
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes.base import Wanted
from grpo_ext.linear.row_loss import fits_row_loss
from grpo_ext.losses import fits_one_pass

Schedule = Literal["one_pass", "three_pass", "three_pass_sequences", "logps_then_loss"]


def choose_schedule(
    config: LossConfig,
    tensors: PolicyTensors,
    wanted: Wanted,
    numerics: Numerics,
    buffer_rows: int,
    valid_rows: int | None,
    grad_scale: float,
) -> Schedule:
    """Choose the schedule of a loss. F is the cost of one product of all unmasked rows with the head.

    - ``one_pass``: one pass over a row's logits gives its log probability, coefficient dLoss/dlogp and gradient. The
      forward forms all gradients (2F with a frozen head, 3F with a trained one).
    - ``three_pass``: the same products with three passes over the logits: statistics, coefficients, gradient. For ranks
      that share the vocabulary, and for losses that `RowLoss` cannot express.
    - ``three_pass_sequences``: ``three_pass`` in chunks of whole completions, for coefficients that depend on all
      tokens of the completion.
    - ``logps_then_loss``: `linear_selective_log_softmax`, then `policy_loss`. Costs F without a gradient and 2F with a
      frozen head. With a trained head 3F if all logits fit into the buffer, else 4F.

    Args:
        buffer_rows: number of rows that fit into the logits buffer.
        valid_rows, grad_scale: arguments of `linear_grpo_loss`.
    """
    trains_head = wanted.wants_weight or wanted.wants_bias
    if not any(wanted):
        return "logps_then_loss"
    if numerics.compute_dtype == torch.float16 and grad_scale == 1.0:
        return "logps_then_loss"  # coefficients of 1 / tokens would underflow: the loss scale arrives in backward
    if numerics.group is None and fits_row_loss(config, tensors):
        return "one_pass"
    if not trains_head and config.entropy_coef == 0:
        return "logps_then_loss"
    if fits_one_pass(config, tensors) and config.importance_sampling_level == "token":
        return "three_pass"  # dLoss/dlogp of a token needs the log probability of no other token
    all_rows_fit = tensors.mask.numel() <= buffer_rows  # then `logps_then_loss` saves the logits for backward
    needs_own_completion_only = config.top_entropy_quantile >= 1 or tensors.entropy_threshold is not None
    # Chunks of completions need the lengths on the host, and a CUDA graph capture cannot synchronize.
    capturing = tensors.mask.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    may_synchronize = valid_rows is None and not capturing
    if not all_rows_fit and may_synchronize and needs_own_completion_only and tensors.mask.shape[1] <= buffer_rows:
        return "three_pass_sequences"
    return "logps_then_loss"
