"""`selective_log_softmax`: log probability (and entropy) of one token per row of logits, with autograd.

Forward reads every logit once and saves three numbers per row; backward reads the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import batch_of_logits, batch_of_tokens, check_logits
from grpo_ext._ops import kernels, logit_transform
from grpo_ext.config import LossConfig
from grpo_ext.vocabulary.sharded_logits import sharded_log_softmax


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, transform: list[float], with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logps, entropy, lse = kernels.row_stats(batch_of_logits(logits), ids, None, transform, with_entropy)
        ctx.save_for_backward(logits, ids, logps, entropy, lse)
        ctx.transform = transform
        ctx.with_entropy = with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @first_order("selective_log_softmax", "differentiate grpo_ext.reference.selective_log_softmax")
    def backward(ctx: Any, grad_logps: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, logps, entropy, lse = ctx.saved_tensors
        grad = kernels.row_gradient(
            batch_of_logits(logits),
            ids,
            None,
            logps,
            entropy if ctx.with_entropy else None,
            lse,
            grad_logps.to(lse.dtype).contiguous(),
            grad_entropy.to(lse.dtype).contiguous() if ctx.with_entropy else None,
            ctx.transform,
        )
        return grad.view(logits.shape), None, None, None


def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    process_group: Any | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log probability of one token per row, without the ``[tokens, vocabulary]`` log-softmax.

    Args:
        logits: ``(B,T,V)`` or ``(N,V)``, fp32, bf16 or fp16 (fp64 on the CPU), any row stride, dense vocabulary.
        ids: int64 ``(B,T)`` or ``(N,)`` in [0, V).
        temperature, logit_softcap, logit_scale: processed logits are
            ``softcap(logit_scale * logits) / temperature`` with ``softcap(u) = c * tanh(u / c)``.
        return_entropy: also return the entropy of each row's distribution, in nats, with gradient.
        process_group: ranks that hold consecutive column shards of the logits, of any sizes, and the same ``ids``,
            which index the whole vocabulary. All ranks get the same results, and each rank gets the gradient of its own
            columns. The upstream gradient must be the same on all ranks.

    Returns:
        ``logp`` of the shape of ``ids``, fp32 (fp64 for fp64 logits), or ``(logp, entropy)``. Backward allocates one
        gradient of the size of the logits.

    Raises:
        ValueError, TypeError: for an invalid shape, dtype or device.
        IndexError: for an id outside [0, V), on the CPU. On a GPU an error would need a host sync: the row's results
            are NaN instead (-inf with a ``process_group``).
    """
    check_logits(logits, ids, "ids")
    config = LossConfig(temperature=temperature, logit_softcap=logit_softcap, logit_scale=logit_scale)
    transform = logit_transform(config.temperature, config.logit_softcap, config.logit_scale)
    flat_ids = batch_of_tokens(ids.contiguous())
    shared = None
    if process_group is not None:
        shared = sharded_log_softmax(batch_of_logits(logits), flat_ids, transform, process_group, return_entropy)
    logps, entropy = shared or _SelectiveLogSoftmax.apply(logits, flat_ids, transform, return_entropy)
    if return_entropy:
        return logps.view(ids.shape), entropy.view(ids.shape)
    return logps.view(ids.shape)
