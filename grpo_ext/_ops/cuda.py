"""The operators on CUDA devices: they enqueue work on the current stream and never synchronize.

The host never reads ids, so one outside [0, V) cannot raise: an unmasked row with one gets NaN as its log probability,
loss and gradient, and counts in the metric ``nonfinite_tokens``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.operators import register
from grpo_ext._ops.packing import Params, place, rows_of
from grpo_ext._ops.schemas import PolicyLoss, RowGradient, RowLoss, RowStats, ScaleRows
from grpo_ext._ops.spec import IDENTITY


def workspace(mask: Tensor) -> Tensor:
    """Scratch memory of one call on ``(B,T)`` tokens; the caching allocator keeps it until the stream is done."""
    return mask.new_empty(_C.cuda_workspace_bytes(*mask.shape), dtype=torch.uint8)


class _Cuda:
    def row_stats(self, rows: Params, a: RowStats) -> None:
        _C.cuda_row_stats(*place(a.logits), rows)

    def row_gradient(self, rows: Params, a: RowGradient) -> None:
        _C.cuda_row_gradient(*place(a.logits), rows)

    def policy_loss(self, policy: Params, a: PolicyLoss) -> None:
        _C.cuda_policy_loss(*place(a.logps), policy, workspace(a.tensors.mask).data_ptr())

    def row_loss(self, rows: Params, policy: Params, a: RowLoss) -> None:
        _C.cuda_row_loss(*place(a.logits), rows, policy, workspace(a.tensors.mask).data_ptr())

    def scale_rows(self, a: ScaleRows) -> None:
        factor = a.factor if a.factor.dtype == torch.float32 else a.factor.float()
        _C.cuda_scale_rows(*place(a.grad), rows_of(None, IDENTITY, grad=a.grad), factor.data_ptr())


if _C.CUDA_VERSION and torch.version.cuda is not None:
    register("CUDA", _Cuda())
