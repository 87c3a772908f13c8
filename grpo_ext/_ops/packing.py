"""Arguments as the dicts that the C++ side reads by name, fresh outputs, and the call count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext.output import METRIC_NAMES

if TYPE_CHECKING:
    from grpo_ext._ops.schemas import PolicyTensors

#: The fields of a C++ ``...Params`` struct by name; addresses are integers, 0: none.
Params = dict[str, Any]

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


def matrix(name: str, tensor: Tensor) -> Params:
    """The fields ``name`` and ``name_stride`` of a matrix with dense rows."""
    return {name: tensor.data_ptr(), f"{name}_stride": tensor.stride(0)}


def rows_of(
    logits: Tensor | None,
    transform: list[float],
    *,
    grad: Tensor | None = None,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    logps: Tensor | None = None,
    entropy: Tensor | None = None,
    lse: Tensor | None = None,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
) -> Params:
    """The C++ ``RowParams`` of logits and their gradient, of which one may be missing."""
    some = logits if logits is not None else grad
    assert some is not None
    batch, length, vocab = some.shape
    read = (0, 0, 0) if logits is None else logits.stride()
    written = (0, 0, 0) if grad is None else grad.stride()
    scale, softcap, temperature = transform
    return {
        "dtype": DTYPE_CODES[some.dtype],
        "batch": batch,
        "length": length,
        "vocab": vocab,
        "logits": pointer(logits),
        "logits_stride_batch": read[0],
        "logits_stride_position": read[1],
        "grad": pointer(grad),
        "grad_stride_batch": written[0],
        "grad_stride_position": written[1],
        "ids": pointer(ids),
        "mask": pointer(mask),
        "transform": (scale, softcap, 1 / temperature),
        "logps": pointer(logps),
        "entropy": pointer(entropy),
        "lse": pointer(lse),
        "coef": pointer(coef),
        "entropy_coef": pointer(entropy_coef),
    }


def policy_of(
    tensors: PolicyTensors,
    spec: list[float],
    *,
    logps: Tensor | None,
    entropy: Tensor | None,
    loss: Tensor | None,
    kl: Tensor | None,
    metrics: Tensor | None,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
) -> Params:
    """The C++ ``PolicyParams``."""
    batch, length = tensors.mask.shape
    weights = tensors.importance_weights
    return {
        "batch": batch,
        "length": length,
        "logps": pointer(logps),
        "entropy": pointer(entropy),
        "mask": pointer(tensors.mask),
        "advantages": pointer(tensors.advantages),
        "advantages_per_token": tensors.advantages.dim() == 2,
        "old_logps": pointer(tensors.old_logps),
        "ref_logps": pointer(tensors.ref_logps),
        "sampling_logps": pointer(tensors.sampling_logps),
        "importance": pointer(weights),
        "importance_shape": 0 if weights is None else weights.dim(),  # ImportanceShape: (B,) or (B,T)
        "num_items": pointer(tensors.num_items),
        "entropy_threshold": pointer(tensors.entropy_threshold),
        "spec": spec,
        "loss": pointer(loss),
        "coef": pointer(coef),
        "entropy_coef": pointer(entropy_coef),
        "kl": pointer(kl),
        "metrics": pointer(metrics),
    }


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


def none_if_empty(tensor: Tensor) -> Tensor | None:
    """Return None for an empty tensor, which stands for an output that the arguments turn off."""
    return tensor if tensor.numel() else None
