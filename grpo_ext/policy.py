"""`policy_loss`: GRPO-family loss from log probabilities of the policy (the model being trained); entropy quantile.

`grpo_ext.losses` runs the same operator after computing log probabilities from logits, `grpo_ext.linear` after
computing them from hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import Number, PolicyTensors, batch_of_tokens, check_device, describe, policy_tensors
from grpo_ext._ops import kernels, loss_spec, statistics_dtype
from grpo_ext.config import LossConfig
from grpo_ext.output import GRPOLossOutput, loss_output


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, entropy: Tensor | None, spec: list[float], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, coef, entropy_coef, kl, metrics = kernels.policy_loss(logps, entropy, *tensors, spec)
        ctx.save_for_backward(coef, entropy_coef, loss)
        ctx.has_entropy = entropy is not None
        ctx.mark_non_differentiable(kl, metrics)
        return loss, kl, metrics

    @staticmethod
    @first_order("policy_loss", "differentiate grpo_ext.reference.policy_loss")
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        coef, entropy_coef, _loss = ctx.saved_tensors
        grad_entropy = None
        if ctx.has_entropy and ctx.needs_input_grad[1]:
            grad_entropy = grad_loss * entropy_coef if entropy_coef.numel() else torch.zeros_like(coef)
        return grad_loss * coef, grad_entropy, None, *(None for _ in PolicyTensors._fields)


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    config: LossConfig,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_items_in_batch: Number | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_threshold: Number | Tensor | None = None,
    grad_scale: float = 1.0,
) -> GRPOLossOutput:
    """GRPO-family loss from log probabilities (SPEC sections 2 to 4).

    Args:
        logps: ``(B,T)`` or ``(N,)`` (one sequence), log probabilities of the completion tokens, with gradient.
        entropy: entropies with the shape of ``logps``; required if ``top_entropy_quantile < 1`` or
            ``entropy_coef != 0``. ``entropy_coef`` also gives them a gradient.

    The other arguments, the result and the errors are those of `grpo_loss`. The config's temperature, softcap and scale
    are ignored.
    """
    if not isinstance(logps, Tensor) or not logps.is_floating_point():
        raise TypeError(
            f"logps must be a floating-point tensor, got {describe(logps)}; pass log probabilities, not ids"
        )
    if logps.dim() not in (1, 2):
        raise ValueError(f"logps must be (B,T) or (N,), got {describe(logps)}")
    dtype = statistics_dtype(logps.dtype)
    tensors = policy_tensors(
        logps.shape,
        logps.device,
        dtype,
        config,
        tokens_argument="logps",
        advantages=advantages,
        completion_mask=completion_mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        importance_weights=importance_weights,
        num_items_in_batch=num_items_in_batch,
        entropy_threshold=entropy_threshold,
    )
    if entropy is None and (config.entropy_coef != 0 or config.top_entropy_quantile < 1):
        raise ValueError("entropy_coef and top_entropy_quantile need entropies: pass entropy=, shape of logps")
    if entropy is not None:
        if not isinstance(entropy, Tensor) or entropy.shape != logps.shape:
            raise ValueError(f"entropy must have the shape of logps {tuple(logps.shape)}, got {describe(entropy)}")
        check_device("entropy", entropy, logps.device, "logps")
        entropy = entropy.to(dtype)
    return checked_policy_loss(logps.to(dtype), entropy, tensors, config, float(grad_scale))


def checked_policy_loss(
    logps: Tensor, entropy: Tensor | None, tensors: PolicyTensors, config: LossConfig, grad_scale: float
) -> GRPOLossOutput:
    """`policy_loss` of checked arguments; ``logps`` and ``entropy`` in the statistics' dtype."""
    flat_logps = batch_of_tokens(logps.contiguous())
    flat_entropy = None if entropy is None else batch_of_tokens(entropy.contiguous())
    tensors = with_entropy_threshold(tensors, config, flat_entropy)
    loss, kl, metrics = _PolicyLoss.apply(flat_logps, flat_entropy, loss_spec(config, grad_scale), *tensors)
    return loss_output(loss, _masked(flat_logps, tensors), _masked(flat_entropy, tensors), kl, metrics, logps.shape)


def _masked(values: Tensor | None, tensors: PolicyTensors) -> Tensor | None:
    """Detach the values and set masked positions to 0."""
    return None if values is None else torch.where(tensors.mask, values.detach(), 0.0)


def with_entropy_threshold(tensors: PolicyTensors, config: LossConfig, entropy: Tensor | None) -> PolicyTensors:
    """Fill in the local entropy quantile if the config needs a threshold and the caller passed none."""
    if config.top_entropy_quantile >= 1 or tensors.entropy_threshold is not None:
        return tensors
    assert entropy is not None  # checked by policy_loss
    threshold = masked_quantile(entropy.detach(), tensors.mask, 1 - config.top_entropy_quantile)
    return tensors._replace(entropy_threshold=threshold)


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """Quantile of the unmasked values by linear interpolation, 0-d, without a host sync; 0 for an empty mask."""
    ordered = torch.where(mask, values, torch.inf).flatten().sort().values
    if ordered.numel() == 0:
        return values.new_zeros(())
    position = q * (mask.sum() - 1).clamp(min=0).to(torch.float64)
    below = position.floor()
    # gather: indexing with a 0-d tensor would read it on the host.
    low, high = ordered.gather(0, torch.stack([below, position.ceil()]).long()).unbind()
    value = low + (position - below).to(values.dtype) * torch.where(high == low, 0.0, high - low)
    return torch.where(mask.any(), value, 0.0).to(values.dtype)
