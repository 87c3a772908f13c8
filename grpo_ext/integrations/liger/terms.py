"""Helpers of both Liger drop-ins: config of a call, divisor, clipping flags, loss of each token."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from grpo_ext import reference
from grpo_ext._checks import Number
from grpo_ext.config import CLIPPED_LOSS_TYPES, LossConfig


@functools.lru_cache(maxsize=256)
def config_of(**fields: Any) -> LossConfig:
    """Build a validated config, cached by its fields so that its warnings appear once."""
    if fields["delta"] is not None and fields["loss_type"] not in CLIPPED_LOSS_TYPES:
        raise ValueError(
            f"delta={fields['delta']} bounds the ratio of a clipped loss, and loss_type={fields['loss_type']!r} is not "
            f"one of {', '.join(sorted(CLIPPED_LOSS_TYPES))}: pass delta=None"
        )
    return LossConfig(**fields)


def divisor(num_items_in_batch: Number | Tensor | None) -> Number | Tensor | None:
    """Liger's divisor ``max(num_items / ranks, 1)``; None if ``num_items_in_batch`` is None."""
    if num_items_in_batch is None:
        return None
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if isinstance(num_items_in_batch, Tensor):
        return (num_items_in_batch.float() / ranks).clamp(min=1.0)
    return max(float(num_items_in_batch) / ranks, 1.0)


def per_token(name: str, weights: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Convert ``(B,)``, ``(B,1)`` or ``(B,L)`` to ``(B,1)`` or ``(B,L)``."""
    if weights is None:
        return None
    if weights.shape == shape[:1]:
        return weights.unsqueeze(1)
    if weights.dim() == 2 and weights.shape[0] == shape[0] and weights.shape[1] in (1, shape[1]):
        return weights
    raise ValueError(
        f"{name} has shape {tuple(weights.shape)}, the completions {tuple(shape)}: pass ({shape[0]},), ({shape[0]}, 1) "
        f"or {tuple(shape)}"
    )


def ratios(new: Tensor, old: Tensor | None, mask: Tensor, config: LossConfig) -> Tensor:
    """Importance ratios ``(B,L)``, or ``(B,1)`` at sequence level; differentiable."""
    difference = reference.log_ratio(new, None if old is None else torch.where(mask, old.detach().float(), 0.0))
    return reference.ratio_exponent(difference, mask, config.importance_sampling_level).exp()


@torch.no_grad()
def clipped(new: Tensor, old: Tensor | None, advantages: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """``(B,L)`` fp32: 1 if the clip or cap is active; a sequence's flag is repeated for each of its tokens."""
    ratio, A = ratios(new, old, mask, config), advantages.unsqueeze(1)
    if config.loss_type in CLIPPED_LOSS_TYPES:
        flags = ((ratio < 1 - config.epsilon) & (A < 0)) | ((ratio > 1 + config.clip_high) & (A > 0))
    elif config.loss_type == "cispo":
        flags = (ratio > config.clip_high) & (A > 0)
    else:
        flags = torch.zeros_like(mask)
    return (flags & mask).float()


def token_losses(
    new: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    advantages: Tensor,
    weights: Tensor | None,
    mask: Tensor,
    config: LossConfig,
) -> tuple[Tensor, Tensor | None]:
    """Loss and KL term of each token, ``(B,L)``, 0 at masked positions; the loss is differentiable by ``new``."""
    A = advantages.detach().float().unsqueeze(1)
    exact_old = None if old is None else torch.where(mask, old.detach().float(), 0.0)
    ratio = ratios(new, old, mask, config)
    weights = None if weights is None else weights.detach().float()
    if weights is not None and weights.shape == mask.shape:
        weights = torch.where(mask, weights, 1.0)
    loss = reference.policy_term(new, reference.log_ratio(new, exact_old), ratio, A, weights, config)
    if weights is not None and config.loss_type != "vespo":
        loss = loss * weights
    loss = loss.expand_as(mask)
    kl = None
    if config.beta != 0:
        if ref is None:
            raise ValueError(f"beta={config.beta} needs ref_logp, the reference model's log probabilities (B, L)")
        kl = reference.kl_k3(new, torch.where(mask, ref.detach().float(), 0.0))
        if config.use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + config.beta * kl
        kl = torch.where(mask, kl.detach(), 0.0)
    return torch.where(mask, loss, 0.0), kl


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over unmasked positions; 0 for an empty mask."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
