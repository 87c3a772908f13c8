"""Check the arguments of the loss functions and convert them to the form that the operators expect.

Each error names the argument, describes the value, and suggests a remedy.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext._ops import DTYPE_CODES
from grpo_ext._ops.schemas import PolicyTensors
from grpo_ext.config import LossConfig, plain_value

Number = int | float


def describe(value: Any) -> str:
    """Describe a value for an error message: shape, dtype and device of a tensor, or the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


def batch_of_logits(logits: Tensor) -> Tensor:
    """View ``(N,V)`` logits as one sequence ``(1,N,V)``; return ``(B,T,V)`` logits unchanged."""
    return logits if logits.dim() == 3 else logits.unsqueeze(0)


def batch_of_tokens(tensor: Tensor) -> Tensor:
    """View ``(N,)`` values as one sequence ``(1,N)``; return ``(B,T)`` values unchanged."""
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(0)


def check_logits(logits: Tensor, ids: Tensor, ids_name: str = "completion_ids") -> None:
    """Require ``(B,T,V)`` or ``(N,V)`` logits with a dense vocabulary, and ``ids`` with their leading shape."""
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise ValueError(f"logits must be a (B,T,V) or (N,V) tensor, got {describe(logits)}")
    if logits.dtype not in DTYPE_CODES:
        raise TypeError(
            f"logits must be float32, bfloat16, float16 or float64, got {describe(logits)}; cast them first"
        )
    if logits.dtype == torch.float64 and logits.device.type != "cpu":
        raise TypeError(f"float64 logits are supported on the CPU only, got {describe(logits)}; pass float32")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits have an empty vocabulary: {describe(logits)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"the vocabulary dimension of logits must be dense, got strides {logits.stride()}; pass logits.contiguous()"
        )
    check_ids(ids, ids_name, logits, "logits")


def check_ids(ids: Tensor, name: str, source: Tensor, source_name: str) -> None:
    """Require int64 ``ids`` with the leading shape and the device of ``source``, which predicts them."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {describe(ids)}; pass {name}.long()")
    if ids.shape != source.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape of {source_name} {tuple(source.shape[:-1])}, got {describe(ids)}; "
            f"{source_name}[:, t] predicts {name}[:, t]: slice both to the completion"
        )
    check_device(name, ids, source.device, source_name)


def check_device(name: str, tensor: Tensor, device: torch.device, other: str) -> None:
    """Require ``tensor`` to be on ``device``, the device of the argument named ``other``."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, {other} on {device}; move it: {name}.to({str(device)!r})")


def check_config(config: LossConfig) -> None:
    if not isinstance(config, LossConfig):
        raise TypeError(f"config must be a LossConfig, got {describe(config)}; pass grpo_ext.LossConfig(...)")


def check_real(name: str, tensor: Tensor) -> None:
    """Reject complex numbers: a conversion would drop their imaginary parts."""
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {describe(tensor)}; pass {name}.real")


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor detached, contiguous and with this dtype.

    A tensor that already fits is returned itself: the three conversions cost 4 µs. A compiler always gets a new
    tensor, because it rejects the same tensor as two inputs (``old_logps`` may be ``ref_logps``).
    """
    plain = tensor.dtype == dtype and not tensor.requires_grad and tensor.is_contiguous()
    if plain and not torch.compiler.is_compiling():
        return tensor
    return tensor.detach().to(dtype).contiguous()


class _Tokens(NamedTuple):
    """Reference shape, device and dtype for tensors with one value per token or per sequence."""

    argument: str  # name of the argument with this shape, for error messages
    shape: torch.Size  # (B,T) or (N,)
    device: torch.device
    dtype: torch.dtype  # of the statistics


def checked_mask(name: str, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convert a mask to bool: any nonzero integer counts as 1; a float must be 0 or 1.

    Returns:
        The bool mask, and a 0-d bool tensor or None. Float values on a GPU, or under a compiler, cannot be checked
        without a synchronization. For those the 0-d tensor is True if all values are 0 or 1; pass it to `poisoned`.

    Raises:
        TypeError: for complex numbers.
        ValueError: for a float other than 0 and 1 (NaN included), on the CPU.
    """
    if mask.is_complex():
        raise TypeError(f"{name} must be of bool, integers or floats, got {describe(mask)}; pass {name}.bool()")
    if not mask.is_floating_point():
        return _plain(mask, torch.bool), None
    mask = mask.detach()
    ones = mask != 0
    right = ((mask == 1) == ones).all()
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return ones.contiguous(), right
    if not bool(right):
        wrong = mask[(mask == 1) != ones][0]
        raise ValueError(
            f"{name} must hold 0 and 1 only, got {float(wrong):g}: a token counts or does not; weigh tokens by "
            "(B,T) advantages instead"
        )
    return ones.contiguous(), None


def poisoned(right: Tensor | None, tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by NaN if `checked_mask` found an invalid mask that it could not report on the host."""
    return tensor if right is None else torch.where(right, tensor, math.nan)


def _token_tensor(name: str, tensor: Tensor | None, tokens: _Tokens) -> Tensor | None:
    """Check a tensor with one number per token; return it detached, with the dtype of the statistics."""
    if tensor is None:
        return None
    _check_companion(name, tensor, tokens)
    return _plain(tensor, tokens.dtype)


def _check_companion(name: str, tensor: Tensor, tokens: _Tokens) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(tensor)}; pass one value per token")
    check_real(name, tensor)
    if tensor.shape != tokens.shape:
        raise ValueError(
            f"{name} must have the shape of {tokens.argument} {tuple(tokens.shape)}, got {describe(tensor)}"
        )
    check_device(name, tensor, tokens.device, tokens.argument)


def _sequence_or_token_tensor(name: str, tensor: Tensor, tokens: _Tokens) -> Tensor:
    """Check, detach and cast a tensor with one number per sequence, ``(B,)`` or ``(B,1)``, or per token, ``(B,T)``."""
    shape = tokens.shape
    allowed = "(B,), (B,1) or (B,T)" if len(shape) == 2 else "(N,)"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(tensor)}; pass {allowed}")
    check_real(name, tensor)
    check_device(name, tensor, tokens.device, tokens.argument)
    if tensor.shape == shape or tensor.shape == shape[:1]:
        return _plain(tensor, tokens.dtype)
    if len(shape) == 2 and tensor.shape == (shape[0], 1):
        return _plain(tensor.reshape(shape[0]), tokens.dtype)  # a column slice keeps its stride
    raise ValueError(f"{name} must be {allowed} for {tokens.argument} {tuple(shape)}, got {describe(tensor)}")


def _scalar_tensor(name: str, value: Number | Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Convert a number or a one-element tensor to a 0-d tensor on the device, without a host sync."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = plain_value(name, value, "float")
        if math.isnan(value):
            raise ValueError(f"{name} must be a number, got nan; pass None to omit it")
        return torch.full((), float(value), dtype=dtype, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got {describe(value)}")
    check_real(name, value)
    return value.detach().to(device=device, dtype=dtype, non_blocking=True).reshape(())


def policy_tensors(
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    config: LossConfig,
    *,
    tokens_argument: str = "completion_ids",
    advantages: Tensor,
    completion_mask: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    sampling_logps: Tensor | None,
    importance_weights: Tensor | None,
    num_items_in_batch: Number | Tensor | None,
    entropy_threshold: Number | Tensor | None,
) -> PolicyTensors:
    """Check and convert all tensor arguments of a loss except logits and ids.

    Args:
        shape: shape of the ids, ``(B,T)``, or ``(N,)`` for one sequence of N tokens.
        tokens_argument: name, for errors, of the argument that has this shape and device.
    """
    check_config(config)
    tokens = _Tokens(tokens_argument, shape, device, dtype)
    _check_companion("completion_mask", completion_mask, tokens)
    mask, right = checked_mask("completion_mask", completion_mask)
    if advantages is None:
        raise TypeError("advantages must be a tensor, got None; see grpo_ext.group_advantages")
    if config.beta != 0 and ref_logps is None:
        raise ValueError(
            f"beta={config.beta} needs ref_logps, the reference model's log probabilities {tuple(shape)}; pass them "
            "or set beta=0"
        )
    threshold = _scalar_tensor("entropy_threshold", entropy_threshold, device, dtype)
    weights = importance_weights
    tensors = PolicyTensors(
        mask,
        poisoned(right, _sequence_or_token_tensor("advantages", advantages, tokens)),
        _token_tensor("old_logps", old_logps, tokens),
        _token_tensor("ref_logps", ref_logps, tokens) if config.beta != 0 else None,
        _token_tensor("sampling_logps", sampling_logps, tokens),
        None if weights is None else _sequence_or_token_tensor("importance_weights", weights, tokens),
        _scalar_tensor("num_items_in_batch", num_items_in_batch, device, dtype),
        threshold if config.top_entropy_quantile < 1 else None,
    )
    if len(shape) == 2:
        return tensors
    # (N,) tensors are one sequence of N tokens.
    one: Any = tuple(None if x is None or x.dim() == 0 else x.reshape(1, -1) for x in tensors)
    return PolicyTensors(*one)._replace(num_items=tensors.num_items, entropy_threshold=tensors.entropy_threshold)
