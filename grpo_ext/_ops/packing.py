"""What every backend shares: arguments as the tuples that the C++ side reads, fresh outputs, the call count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext.output import METRIC_NAMES

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_calls = 0


def kernel_calls() -> int:
    """How many operator calls the compiled kernels have served in this process."""
    return _calls


def count_call() -> None:
    global _calls
    _calls += 1


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def place(tensor: Tensor) -> tuple[int, int]:
    """A CUDA tensor's device number and the handle of the current stream there. `torch.cuda.current_stream` would build
    an object around the handle, which takes 1 µs."""
    device = tensor.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(
    logits: Tensor | None,
    *,
    grad: Tensor | None = None,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    logps: Tensor | None = None,
    entropy: Tensor | None = None,
    lse: Tensor | None = None,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
) -> tuple[Any, ...]:
    """The C++ ``RowParams``, field by field; see ``read_rows`` in csrc/bindings.cpp."""
    some = logits if logits is not None else grad
    assert some is not None
    batch, length, vocab = some.shape
    read, written = (
        (0, 0) if logits is None else logits.stride()[:2],
        (0, 0) if grad is None else grad.stride()[:2],
    )
    return (
        DTYPE_CODES[some.dtype], batch, length, vocab,
        pointer(logits), *read, pointer(grad), *written,
        pointer(ids), pointer(mask), pointer(logps), pointer(entropy), pointer(lse),
        pointer(coef), pointer(entropy_coef),
    )  # fmt: skip


def importance_shape(importance_weights: Tensor | None) -> int:
    """The C++ ``ImportanceShape``: none, per sequence ``(B,)``, per token ``(B,T)``."""
    return 0 if importance_weights is None else importance_weights.dim()


def policy_of(
    shape: torch.Size,
    mask: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    sampling_logps: Tensor | None,
    importance_weights: Tensor | None,
    num_items: Tensor | None,
    entropy_threshold: Tensor | None,
    *,
    logps: Tensor | None,
    entropy: Tensor | None,
    loss: Tensor | None,
    kl: Tensor | None,
    metrics: Tensor | None,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
) -> tuple[Any, ...]:
    """The C++ ``PolicyParams``, field by field; see ``read_policy`` in csrc/bindings.cpp."""
    return (
        *shape, pointer(logps), pointer(entropy), pointer(mask),
        pointer(advantages), advantages.dim() == 2,
        pointer(old_logps), pointer(ref_logps), pointer(sampling_logps),
        pointer(importance_weights), importance_shape(importance_weights),
        pointer(num_items), pointer(entropy_threshold),
        pointer(loss), pointer(coef), pointer(entropy_coef), pointer(kl), pointer(metrics),
    )  # fmt: skip


BETA = _C.LOSS_SPEC_FIELDS.index("beta")
ENTROPY_COEF = _C.LOSS_SPEC_FIELDS.index("entropy_coef")


def policy_outputs(logps: Tensor, spec: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh (loss, kl, metrics); kl is empty where beta is 0."""
    kl = torch.empty_like(logps) if spec[BETA] else logps.new_empty(0)
    return logps.new_empty(()), kl, logps.new_empty(len(METRIC_NAMES))


def fresh_outputs(logits: Tensor, spec: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Fresh (loss, logps, entropy, kl, metrics) of ``row_loss``. Without a kl where beta is 0: an empty tensor costs
    3 µs, and only torch's dispatcher wants one (`with_all_tensors`).
    """
    dtype = statistics_dtype(logits.dtype)
    logps = logits.new_empty(logits.shape[:2], dtype=dtype)
    kl = torch.empty_like(logps) if spec[BETA] else None
    return logps.new_empty(()), logps, torch.empty_like(logps), kl, logps.new_empty(len(METRIC_NAMES))


def with_all_tensors(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The outputs of ``row_loss`` with an empty tensor for a kl that is not there."""
    loss, logps, entropy, kl, *rest = outputs
    return loss, logps, entropy, logps.new_empty(0) if kl is None else kl, *rest


def stats_outputs(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(logits.dtype)
    logps = logits.new_empty(logits.shape[:2], dtype=dtype)
    return logps, torch.empty_like(logps) if with_entropy else logps.new_empty(0)


def given(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None
