"""How many passes over a chunk's product a loss needs."""

from __future__ import annotations

from typing import Literal

import torch

from grpo_ext._checks import PolicyTensors
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes.base import Wanted
from grpo_ext.linear.row_loss import fits_row_loss
from grpo_ext.losses import fits_one_pass

Schedule = Literal["one_pass", "rows", "sequences", "logps"]


def choose_schedule(
    config: LossConfig,
    tensors: PolicyTensors,
    wanted: Wanted,
    numerics: Numerics,
    buffer_rows: int,
    valid_rows: int | None,
    grad_scale: float,
) -> Schedule:
    """Choose when a loss forms its gradient. F is one product of all unmasked rows with the head.

    - ``one_pass``: one pass over a row's logits gives its log probability, coefficient dLoss/dlogp and gradient. The
      forward forms all gradients (2F with a frozen head, 3F with a trained one).
    - ``rows``: the same products with three passes over the logits: statistics, coefficients, gradient. For ranks that
      share the vocabulary, and for losses that `RowLoss` does not express.
    - ``sequences``: as ``rows``, in chunks of whole completions, whose coefficients depend on all of their tokens.
    - ``logps``: `linear_selective_log_softmax`, then `policy_loss` (F without a gradient, 2F with a frozen head; with a
      trained one 3F if all logits fit into the buffer, else 4F).
    """
    trains_head = wanted.wants_weight or wanted.wants_bias
    if not any(wanted):
        return "logps"
    if numerics.compute_dtype == torch.float16 and grad_scale == 1.0:
        return "logps"  # coefficients of 1 / tokens leave fp16's range before the loss scale arrives in backward
    if numerics.group is None and fits_row_loss(config, tensors):
        return "one_pass"
    if not trains_head and config.entropy_coef == 0:
        return "logps"
    if fits_one_pass(config, tensors) and config.importance_sampling_level == "token":
        return "rows"  # dLoss/dlogp of a token needs the log probability of no other token
    all_rows_fit = tensors.mask.numel() <= buffer_rows  # then `logps` keeps the logits
    needs_own_completion_only = config.top_entropy_quantile >= 1 or tensors.entropy_threshold is not None
    # Chunks of completions need their lengths on the host, and a CUDA graph capture cannot wait for them.
    capturing = tensors.mask.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    may_wait = valid_rows is None and not capturing
    if not all_rows_fit and may_wait and needs_own_completion_only and tensors.mask.shape[1] <= buffer_rows:
        return "sequences"
    return "logps"
