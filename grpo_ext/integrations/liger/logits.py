"""Liger-Kernel's `triton_grpo_loss` and `fused_selective_log_softmax`, computed by this package's row kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._checks import Number, checked_mask, poisoned
from grpo_ext.integrations.liger.terms import clipped, config_of, divisor, per_token, token_losses, token_mean
from grpo_ext.integrations.row_logps import row_logps
from grpo_ext.policy import policy_loss


def _logps(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Return log probabilities ``(B,L)``, 0 at masked positions, and the mask as bool."""
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] < 1:
        raise ValueError(
            f"logits must be (B, L+1, V), one row more than there are ids, got {tuple(getattr(logits, 'shape', ()))}"
        )
    if ids.shape != (logits.shape[0], logits.shape[1] - 1):
        raise ValueError(
            f"completion_ids must be {(logits.shape[0], logits.shape[1] - 1)} for logits {tuple(logits.shape)}, got "
            f"{tuple(ids.shape)}: the last row of logits predicts nothing"
        )
    right = None
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    else:
        mask, right = checked_mask("completion_mask", mask)
    return poisoned(right, row_logps(logits, ids, mask, temperature=temperature, overwrite=inplace)), mask


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log probabilities of the last L ids, without gradient.

    Args:
        logits: ``(B, L+1, V)``; the last row of each completion predicts nothing and is not read.
        input_ids: int64 ``(B, >= L)``; the last L are scored. mask: the same shape or None; masked positions give 0.

    Returns:
        fp32 ``(B, L)``.
    """
    length = logits.shape[1] - 1
    ids = input_ids[:, input_ids.shape[1] - length :]
    mask = None if mask is None else mask[:, mask.shape[1] - length :]
    return _logps(logits, ids, mask, temperature, False)[0]


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: Any = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: Any = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Number | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Any:
    """GRPO loss from logits.

    Args:
        logits: ``(B, L+1, V)``, fp32, bf16 or fp16. old_logp, ref_logp: ``(B, L)`` or None. advantages: ``(B,)``.
        completion_ids, completion_mask: ``(B, L)``; logits and ids at masked positions are not read.
        inplace: backward writes the gradient over ``logits`` and marks them as changed; leaves are not overwritten.
        max_completion_length: divisor of ``dr_grpo``; None: L.
        reduce: whether to return the reduced loss instead of one value per token.
        vllm_is_ratio: ``(B,)``, ``(B, 1)`` or ``(B, L)``.
        num_items_in_batch: tokens of the generation batch on all ranks, for dapo, cispo and vespo.

    Returns:
        ``reduce=False``: loss (with gradient), KL term (None if beta is 0) and clipping flag of each token, fp32
        ``(B, L)``, 0 at masked positions. ``reduce=True``: ``(loss, [kl mean, clip ratio])``, without the kl mean if
        beta is 0.
    """
    logps, mask = _logps(logits, completion_ids, completion_mask, temperature, inplace)
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages must be ({mask.shape[0]},), one per completion, got {tuple(advantages.shape)}")
    config = config_of(
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon=eps_low,
        epsilon_high=eps_high,
        delta=delta,
        beta=beta,
        use_bias_correction_kl=use_bias_correction_kl,
        max_completion_length=max_completion_length or max(mask.shape[1], 1),
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    weights = per_token("vllm_is_ratio", vllm_is_ratio, mask.shape)
    flags = clipped(logps.detach(), old_logp, advantages, mask, config)
    if not reduce:
        losses, kl = token_losses(logps, old_logp, ref_logp, advantages, weights, mask, config)
        return losses, kl, flags
    out = policy_loss(
        logps, advantages, mask, config, old_logps=old_logp, ref_logps=ref_logp, importance_weights=weights,
        num_items_in_batch=divisor(num_items_in_batch),
    )  # fmt: skip
    metrics = [] if out.kl is None else [token_mean(out.kl, mask)]
    return out.loss, [*metrics, token_mean(flags, mask)]
