"""The operators of the compiled extension, registered with torch.library as ``torch.ops.grpo_ext.*``.

These modules allocate outputs and hand raw pointers to ``grpo_ext._C``, without autograd: `grpo_ext.losses`,
`grpo_ext.policy` and `grpo_ext.log_softmax` put the operators into ``torch.autograd.Function``s. `grpo_ext._checks` has
checked the arguments: logits ``(B,T,V)`` with a dense last dimension, everything else contiguous ``(B,T)``
in the statistics' dtype, masks ``torch.bool``, ids ``torch.int64``.
"""

from __future__ import annotations

from grpo_ext._ops import cpu, cuda, schemas
from grpo_ext._ops.direct import kernels
from grpo_ext._ops.packing import DTYPE_CODES, kernel_calls, statistics_dtype
from grpo_ext._ops.spec import logit_transform, loss_spec

__all__ = [
    "DTYPE_CODES",
    "cpu",
    "cuda",
    "kernel_calls",
    "kernels",
    "logit_transform",
    "loss_spec",
    "schemas",
    "statistics_dtype",
]
