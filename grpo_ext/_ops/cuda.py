"""The operators on CUDA devices: work is enqueued on the current stream, nothing waits for it.

An id outside [0, V) cannot raise here, since nobody looks at it on the host: an unmasked row with one gets NaN as its
log probability, loss and gradient, and counts in the metric ``nonfinite_tokens``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.direct import implements
from grpo_ext._ops.packing import (
    ENTROPY_COEF,
    count_call,
    fresh_outputs,
    given,
    place,
    policy_of,
    policy_outputs,
    rows_of,
    stats_outputs,
    with_all_tensors,
)

if _C.CUDA_VERSION and torch.version.cuda is not None:

    def _workspace(logps: Tensor) -> Tensor:
        """Scratch memory of one call. The caching allocator keeps it until the stream is done with it."""
        batch, length = logps.shape
        return logps.new_empty(_C.cuda_workspace_bytes(batch, length), dtype=torch.uint8)

    @implements("row_stats", "CUDA")
    def _row_stats_cuda(
        logits: Tensor, ids: Tensor, mask: Tensor | None, transform: list[float], with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        count_call()
        logps, entropy = stats_outputs(logits, with_entropy)
        lse = torch.empty_like(logps)
        rows = rows_of(logits, ids=ids, mask=mask, logps=logps, entropy=given(entropy), lse=lse)
        _C.cuda_row_stats(*place(logits), rows, transform)
        return logps, entropy, lse

    def _row_gradient_into_cuda(
        logits: Tensor,
        grad: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        logps: Tensor,
        entropy: Tensor | None,
        lse: Tensor,
        coef: Tensor,
        entropy_coef: Tensor | None,
        transform: list[float],
    ) -> None:
        count_call()
        rows = rows_of(
            logits, grad=grad, ids=ids, mask=mask, logps=logps, entropy=entropy, lse=lse,
            coef=coef, entropy_coef=entropy_coef,
        )  # fmt: skip
        _C.cuda_row_gradient(*place(logits), rows, transform)

    @implements("row_gradient", "CUDA")
    def _row_gradient_cuda(logits: Tensor, *arguments: Any) -> Tensor:
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _row_gradient_into_cuda(logits, grad, *arguments)
        return grad

    @implements("row_gradient_", "CUDA")
    def _row_gradient_inplace_cuda(logits: Tensor, *arguments: Any) -> None:
        _row_gradient_into_cuda(logits, logits, *arguments)

    @implements("policy_loss", "CUDA")
    def _policy_loss_cuda(
        logps: Tensor, entropy: Tensor | None, mask: Tensor, *tensors_and_spec: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count_call()
        *tensors, spec = tensors_and_spec
        loss, kl, metrics = policy_outputs(logps, spec)
        coef = torch.empty_like(logps)
        entropy_coef = torch.empty_like(logps) if spec[ENTROPY_COEF] else logps.new_empty(0)
        policy = policy_of(
            logps.shape, mask, *tensors, logps=logps, entropy=entropy, loss=loss, kl=given(kl), metrics=metrics,
            coef=coef, entropy_coef=given(entropy_coef),
        )  # fmt: skip
        _C.cuda_policy_loss(*place(logps), policy, spec, _workspace(logps).data_ptr())
        return loss, coef, entropy_coef, kl, metrics

    def _row_loss_into_cuda(
        logits: Tensor, grad: Tensor | None, ids: Tensor, mask: Tensor, tensors: tuple[Any, ...], spec: list[float],
        transform: list[float],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
        count_call()
        loss, logps, entropy, kl, metrics = fresh_outputs(logits, spec)
        rows = rows_of(logits, grad=grad, ids=ids, mask=mask, logps=logps, entropy=entropy)
        policy = policy_of(logps.shape, mask, *tensors, logps=logps, entropy=entropy, loss=loss, kl=kl, metrics=metrics)
        _C.cuda_row_loss(*place(logits), rows, transform, policy, spec, _workspace(logps).data_ptr())
        return loss, logps, entropy, kl, metrics

    @implements("row_loss", "CUDA", with_all_tensors)
    def _row_loss_cuda(
        logits: Tensor, ids: Tensor, mask: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        *tensors, spec, transform, with_grad = rest
        grad = logits.new_empty(logits.shape if with_grad else (0,))
        into = grad if with_grad else None
        return *_row_loss_into_cuda(logits, into, ids, mask, tuple(tensors), spec, transform), grad

    @implements("row_loss_", "CUDA", with_all_tensors)
    def _row_loss_inplace_cuda(
        logits: Tensor, ids: Tensor, mask: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        *tensors, spec, transform = rest
        return _row_loss_into_cuda(logits, logits, ids, mask, tuple(tensors), spec, transform)

    @implements("scale_rows_", "CUDA")
    def _scale_rows_cuda(grad: Tensor, factor: Tensor) -> None:
        if factor.dtype != torch.float32:
            factor = factor.float()
        _C.cuda_scale_rows(*place(grad), rows_of(None, grad=grad), factor.data_ptr())
