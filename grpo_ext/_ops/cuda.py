"""The operators on CUDA devices: work is enqueued on the current stream, nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.packing import rows_of
from grpo_ext._ops.schemas import library

if _C.CUDA_VERSION:

    @torch.library.impl(library, "scale_rows_", "CUDA")
    def _scale_rows_cuda(grad: Tensor, factor: Tensor) -> None:
        with torch.cuda.device(grad.device):
            stream = torch.cuda.current_stream().cuda_stream
            _C.cuda_scale_rows(rows_of(None, grad=grad), factor.float().data_ptr(), stream)
