"""`grpo_loss`: loss from logits, with autograd and the choice between two schedules.

One pass (`grpo_ext::row_loss`) reads every logit once and writes every gradient once. Losses whose rows depend on each
other are staged: row statistics, the policy loss on ``(B,T)`` numbers, then the gradient. Both schedules compute the
gradient of the logits in the forward pass; backward returns it unchanged if the upstream gradient is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import (
    Number,
    PolicyTensors,
    batch_of_logits,
    batch_of_tokens,
    check_logits,
    policy_tensors,
)
from grpo_ext._ops import kernels, logit_transform, loss_spec, statistics_dtype
from grpo_ext.config import LossConfig
from grpo_ext.output import GRPOLossOutput, loss_output
from grpo_ext.policy import with_entropy_threshold

USED_AGAIN = (
    "grpo_loss(inplace=True) has overwritten these logits with their gradient, but the logits, or the base tensor that "
    "they are a view of, were used afterwards; pass inplace=False, or use the logits only before the loss"
)


class _GRPOLoss(torch.autograd.Function):
    """Compute the loss and the logits gradient together.

    `mode`: ``"none"`` computes no gradient, ``"fresh"`` allocates one, ``"overwrite"`` and ``"overwrite_view"`` write
    it over the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        config: LossConfig,
        spec: list[float],
        transform: list[float],
        mode: str,
        *policy: Any,
    ) -> tuple[Tensor | None, ...]:
        ctx.inputs = 6 + len(policy)
        # Outputs without gradient bypass autograd, which is faster; a compiler must see them as outputs.
        detached: list[Any] | None = None
        if len(policy) == 2:
            tensors, detached = policy
        else:
            tensors = PolicyTensors(*policy)
        run = _one_pass if fits_one_pass(config, tensors) else _staged
        loss, logps, entropy, kl, metrics, grad = run(
            batch_of_logits(logits), ids, config, tensors, spec, transform, mode
        )
        ctx.save_for_backward(loss)
        ctx.set_materialize_grads(False)
        ctx.overwrites = mode.startswith("overwrite")
        ctx.grad = grad if grad is None or grad.shape == logits.shape else grad.view(logits.shape)
        if mode == "overwrite":
            # This node becomes the history of the overwritten logits: using them later raises in backward.
            ctx.mark_dirty(logits)
        if mode == "overwrite_view":
            torch.autograd.graph.increment_version(logits)
        # The logits are the first output: autograd matches a retained gradient to inputs and outputs by position.
        overwritten = logits if mode == "overwrite" else None
        if detached is not None:
            detached += (logps, entropy, kl, metrics)
            return overwritten, loss
        ctx.mark_non_differentiable(logps, entropy, kl, metrics)
        return overwritten, loss, logps, entropy, kl, metrics

    @staticmethod
    @first_order("grpo_loss", "differentiate grpo_ext.reference.grpo_loss")
    def backward(
        ctx: Any, grad_logits: Tensor | None, grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logits is not None:
            raise RuntimeError(USED_AGAIN)
        if ctx.grad is None:
            raise RuntimeError(
                "the gradient of grpo_loss was handed over in an earlier backward; compute the loss once per backward"
            )
        no_gradients = (None,) * (ctx.inputs - 1)
        if ctx.grad.dtype == torch.float64 and not ctx.overwrites and grad_loss is not None:
            return ctx.grad * grad_loss, *no_gradients  # gradcheck runs backward repeatedly in fp64
        grad, ctx.grad = ctx.grad, None
        if grad_loss is None:
            return None, *no_gradients
        kernels.scale_rows_(batch_of_logits(grad), grad_loss)
        return grad, *no_gradients


class _OverwrittenView(torch.autograd.Function):
    """Make later uses of an overwritten view, and of its base tensor, raise in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(USED_AGAIN)


def fits_one_pass(config: LossConfig, tensors: PolicyTensors) -> bool:
    """Whether a row's gradient coefficient depends only on the row's log probability and on given numbers.

    If so, statistics and gradient share one pass over the row. Otherwise the coefficient depends on a whole sequence,
    or, for the entropy quantile, on the whole batch.
    """
    if config.loss_type == "vespo" or config.off_policy_mask_threshold is not None:
        return False
    if config.top_entropy_quantile < 1 and tensors.entropy_threshold is None:
        return False
    on_policy = tensors.old_logps is None
    weights_from_this_forward = (
        on_policy
        and config.vllm_importance_sampling_correction
        and tensors.sampling_logps is not None
        and tensors.importance_weights is None
    )
    if weights_from_this_forward and config.vllm_importance_sampling_mode.startswith("sequence"):
        return False
    if config.importance_sampling_level == "token":
        return True
    # The on-policy sequence ratio is exactly 1: its gradient depends only on the advantages, unless a factor of the
    # ratio depends on this forward pass.
    ratio_in_kl = config.beta != 0 and config.use_bias_correction_kl
    return on_policy and not weights_from_this_forward and not ratio_in_kl and config.top_entropy_quantile >= 1


def _one_pass(
    logits: Tensor, ids: Tensor, config: LossConfig, tensors: PolicyTensors, spec: list[float],
    transform: list[float], mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    if mode.startswith("overwrite"):
        return *kernels.row_loss_(logits, ids, *tensors, spec, transform), logits
    *out, grad = kernels.row_loss(logits, ids, *tensors, spec, transform, mode == "fresh")
    loss, logps, entropy, kl, metrics = out
    return loss, logps, entropy, kl, metrics, grad if mode == "fresh" else None


def _staged(
    logits: Tensor, ids: Tensor, config: LossConfig, tensors: PolicyTensors, spec: list[float],
    transform: list[float], mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute row statistics, then the policy loss, then the gradient: coefficients depend on other rows."""
    logps, entropy, lse = kernels.row_stats(logits, ids, tensors.mask, transform, True)
    tensors = with_entropy_threshold(tensors, config, entropy)
    loss, coef, entropy_coef, kl, metrics = kernels.policy_loss(logps, entropy, *tensors, spec)
    if mode == "none":
        return loss, logps, entropy, kl, metrics, None
    bonus = entropy_coef if entropy_coef.numel() else None
    arguments = (logits, ids, tensors.mask, logps, entropy, lse, coef, bonus, transform)
    if mode == "fresh":
        return loss, logps, entropy, kl, metrics, kernels.row_gradient(*arguments)
    kernels.row_gradient_(*arguments)
    return loss, logps, entropy, kl, metrics, logits


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    config: LossConfig,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_items_in_batch: Number | Tensor | None = None,
    entropy_threshold: Number | Tensor | None = None,
    inplace: bool = False,
    grad_scale: float = 1.0,
) -> GRPOLossOutput:
    """GRPO-family loss of a batch of completions from the logits, with gradient.

    Args:
        logits: ``(B,T,V)``, or ``(N,V)`` for one sequence of N tokens; fp32, bf16 or fp16 (fp64 on the CPU), any row
            stride, dense vocabulary. ``logits[b,t]`` predicts ``completion_ids[b,t]``.
        completion_ids: int64 ``(B,T)`` or ``(N,)``.
        advantages: ``(B,)`` or ``(B,T)``; ``(N,)`` for ``(N,V)`` logits. See `grpo_ext.group_advantages`.
        completion_mask: ``(B,T)`` or ``(N,)``, bool, integer or float; rows with mask 0 are never read. Any nonzero
            integer counts as 1. Floats must be 0 or 1; any other float makes the loss NaN on a GPU.
        config: loss type and constants.
        old_logps: behaviour-policy log probabilities ``(B,T)``; None means on-policy, with a ratio of exactly 1.
        ref_logps: reference-model log probabilities ``(B,T)``; required if ``config.beta != 0``.
        sampling_logps: log probabilities ``(B,T)`` reported by the generation engine. Importance weights are computed
            from them (``config.vllm_importance_sampling_*``) unless ``importance_weights`` are given.
        importance_weights: ``(B,)``, ``(B,1)`` or ``(B,T)``, applied without further clamping.
        num_items_in_batch: number or 0-d tensor, the divisor of ``dapo``, ``cispo`` and ``vespo``; None: the sum of
            the mask.
        entropy_threshold: number or 0-d tensor that replaces the local quantile of ``top_entropy_quantile``.
        inplace: write the gradient over the logits; saves ``[tokens, vocabulary]`` memory. The logits must be the
            output of another operation. Using them, or their base tensor, after the loss raises in backward.
        grad_scale: factor on the gradient, applied when the gradient is computed; does not change the loss value.

    Returns:
        GRPOLossOutput: fp32 (fp64 for fp64 logits); ``loss`` has a gradient, the other fields are detached. This call
        computes the gradient if ``logits.requires_grad`` and grad mode is on; only one backward can consume it.

    Raises:
        ValueError, TypeError: for an argument with an invalid shape, dtype or device.
        IndexError: for an id outside [0, V) at an unmasked position, on the CPU. On a GPU an error would need a host
            sync: the row's log probability, loss and gradient are NaN instead, and ``nonfinite_tokens`` counts the row.
        RuntimeError: for ``inplace`` on a leaf that requires grad, or on logits with overlapping rows.

    Source: https://arxiv.org/abs/2402.03300; docs/papers.md lists the paper of each loss type.
    """
    check_logits(logits, completion_ids)
    tensors = policy_tensors(
        completion_ids.shape,
        logits.device,
        statistics_dtype(logits.dtype),
        config,
        advantages=advantages,
        completion_mask=completion_mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        importance_weights=importance_weights,
        num_items_in_batch=num_items_in_batch,
        entropy_threshold=entropy_threshold,
    )
    mode = "none"
    if logits.requires_grad and torch.is_grad_enabled():
        mode = _overwrite_mode(logits) if inplace else "fresh"
    compiling = torch.compiler.is_compiling()
    detached: list[Any] = []
    outputs = _GRPOLoss.apply(
        logits,
        batch_of_tokens(completion_ids.contiguous()),
        config,
        loss_spec(config, float(grad_scale)),
        logit_transform(config.temperature, config.logit_softcap, config.logit_scale),
        mode,
        # autograd processes one argument faster than eight; a compiler must see each tensor as an argument.
        *(tensors if compiling else (tensors, detached)),
    )
    if mode == "overwrite_view" and not compiling:
        _invalidate_view(logits)
    _, loss, logps, entropy, kl, metrics = (*outputs, *detached) if detached else outputs
    return loss_output(loss, logps, entropy, kl, metrics, completion_ids.shape)


def _invalidate_view(logits: Tensor) -> None:
    """Invalidate an overwritten view: autograd cannot rebase a view inside a function that has other outputs."""
    try:
        _OverwrittenView.apply(logits)
    except RuntimeError:  # a view from split, unbind or a custom function, which torch never rebases: mark its base
        _OverwrittenView.apply(logits._base)


def _overwrite_mode(logits: Tensor) -> str:
    """Choose how autograd records that the logits are overwritten."""
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf and logits._base.requires_grad):
        raise RuntimeError(
            "inplace=True would overwrite a leaf that requires grad, or a view of one; pass logits that are the output "
            "of another operation, or inplace=False"
        )
    if not _rows_are_disjoint(logits):
        raise RuntimeError(
            f"inplace=True cannot overwrite logits with overlapping rows, got strides {logits.stride()}; pass "
            "logits.contiguous() or inplace=False"
        )
    # Under torch.compile the overwrite is part of the graph, and the compiler preserves the order of uses.
    return "overwrite_view" if torch.compiler.is_compiling() or logits._is_view() else "overwrite"


def _rows_are_disjoint(logits: Tensor) -> bool:
    """Whether no two rows share memory: each outer stride is at least the span of the faster dimensions."""
    outer = [(stride, size) for stride, size in zip(logits.stride()[:-1], logits.shape[:-1], strict=True) if size > 1]
    if len(outer) == 2 and outer[0][0] > outer[1][0]:
        outer.reverse()
    covered = logits.shape[-1]
    for stride, size in outer:
        if stride < covered:
            return False
        covered += (size - 1) * stride
    return True
