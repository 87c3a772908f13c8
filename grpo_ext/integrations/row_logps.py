"""Log probabilities from logits, with an optional backward that overwrites the logits; used by the logits drop-ins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import check_logits
from grpo_ext._ops import kernels, logit_transform


class _RowLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, mask: Tensor, transform: list[float], overwrite: bool) -> Tensor:
        logps, _, lse = kernels.row_stats(logits[:, : ids.shape[1]], ids, mask, transform, False)
        ctx.save_for_backward(logits, ids, mask, logps, lse)
        ctx.transform, ctx.overwrite = transform, overwrite
        result: Tensor = logps
        return result

    @staticmethod
    @first_order("the log probability of a drop-in", "differentiate grpo_ext.reference.selective_log_softmax")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, mask, logps, lse = ctx.saved_tensors
        coef = torch.where(mask, grad, 0.0).to(lse.dtype).contiguous()
        result = logits.detach() if ctx.overwrite else logits.detach().clone()
        length = ids.shape[1]
        kernels.row_gradient_(result[:, :length], ids, mask, logps, None, lse, coef, None, ctx.transform)
        result[:, length:].zero_()
        if ctx.overwrite:
            # Another backward that saved these logits then raises autograd's in-place error.
            torch.autograd.graph.increment_version(logits)
        return result, None, None, None, None


def row_logps(logits: Tensor, ids: Tensor, mask: Tensor, *, temperature: float = 1.0, overwrite: bool) -> Tensor:
    """Log probabilities of ``ids`` with gradient: ``(B,T)``, fp32 (fp64 for fp64 logits), 0 at masked positions.

    Args:
        logits: ``(B, T or more, V)``; row t predicts id t; rows from T on are not read and get gradient 0.
        ids: int64 ``(B,T)``. mask: bool ``(B,T)``; logits and ids at masked positions are not read.
        overwrite: backward writes the gradient over the logits, unless they are a leaf or not contiguous.
    """
    check_logits(logits[:, : ids.shape[1]], ids, "ids")
    if mask.shape != ids.shape:
        raise ValueError(f"the mask must have the shape of the ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
    transform = logit_transform(temperature, None, 1.0)
    overwrite = overwrite and not logits.is_leaf and logits.is_contiguous()
    logps: Tensor = _RowLogps.apply(logits, ids.contiguous(), mask.contiguous(), transform, overwrite)
    return logps
