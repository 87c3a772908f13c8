"""Check and convert the arguments of `linear_grpo_loss` and `linear_selective_log_softmax`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from grpo_ext._checks import check_device, check_ids, checked_mask, describe
from grpo_ext._ops import DTYPE_CODES, logit_transform, statistics_dtype
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import Numerics, product_dtypes
from grpo_ext.linear.routes.base import Wanted
from grpo_ext.vocabulary.shards import group_name

#: Takes weight and bias of a sharded head, and returns a context manager inside which the head is whole. That yields
#: the whole (weight, bias), or None if it fills the given tensors in place (ZeRO-3).
Gather = Callable[[Tensor, Tensor | None], AbstractContextManager[tuple[Tensor, Tensor | None] | None]]


def unsharded(tensor: Tensor | None) -> Tensor | None:
    """Gather a sharded parameter (DTensor) to a plain tensor; autograd differentiates the gathering."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@contextlib.contextmanager
def whole_head(
    gather: Gather | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the whole head for the products; check it if it had to be gathered."""
    if gather is None:
        yield weight, bias
        return
    with gather(weight, bias) as gathered:
        weight, bias = (weight, bias) if gathered is None else gathered
        check_head(hidden, weight, bias, weight_grad)
        yield weight, bias


def checked_head(
    hidden: Tensor, ids: Tensor, ids_name: str, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None,
    gather: Gather | None, memory_budget: int | None, valid_rows: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Check the arguments that both functions share; return weight and bias as plain tensors."""
    check_hidden(hidden, ids, ids_name)
    if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
        raise ValueError(f"memory_budget must be None or a number of bytes above 0, got {memory_budget!r}")
    if valid_rows is not None and (not isinstance(valid_rows, int) or valid_rows < 0):
        raise ValueError(f"valid_rows must be None or a count of rows, at least 0, got {valid_rows!r}")
    plain, plain_bias = unsharded(weight), unsharded(bias)
    assert plain is not None
    if gather is None:
        check_head(hidden, plain, plain_bias, weight_grad)
    return plain, plain_bias


def check_hidden(hidden: Tensor, ids: Tensor, ids_name: str) -> None:
    """Check ``hidden (B,T,H)`` or ``(N,H)``, and ids int64 of its leading shape."""
    if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be a (B,T,H) or (N,H) tensor, got {describe(hidden)}")
    if hidden.dtype not in DTYPE_CODES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {describe(hidden)}; cast it first")
    if hidden.dtype == torch.float64 and hidden.device.type != "cpu":
        raise TypeError(f"float64 is supported on the CPU only, hidden is {describe(hidden)}; pass float32")
    check_ids(ids, ids_name, hidden, "hidden")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None) -> None:
    """Check ``weight (V,H)``, ``bias (V,)`` and ``weight_grad (V,H)``, fp32 (fp64 for fp64)."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V,H) with H = {hidden.shape[-1]}, the last dimension of hidden; got {describe(weight)}: "
            "pass lm_head.weight, and gather= for a head that is sharded"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has an empty vocabulary: {describe(weight)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a floating-point tensor, got {describe(weight)}; dequantise the head first")
    check_device("weight", weight, hidden.device, "hidden")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},), one value per row of weight, got {describe(bias)}")
        check_device("bias", bias, hidden.device, "hidden")
    if weight_grad is not None:
        dtype = statistics_dtype(weight.dtype)
        if weight_grad.shape != weight.shape or weight_grad.dtype != dtype or not weight_grad.is_contiguous():
            raise ValueError(
                f"weight_grad must be a contiguous {tuple(weight.shape)} tensor of {dtype}, got {describe(weight_grad)}"
            )
        check_device("weight_grad", weight_grad, hidden.device, "hidden")


def check_mask(mask: Tensor | None, ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Check the shape and device of a mask.

    Returns:
        The two results of `checked_mask`: the bool mask, and a tensor for `poisoned` or None. (None, None) for None.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(f"mask must be a tensor of the shape of ids {tuple(ids.shape)}, got {describe(mask)}")
    check_device("mask", mask, ids.device, "ids")
    return checked_mask("mask", mask)


def numerics_of(
    config: LossConfig, hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | str | None,
    memory_budget: int | None, process_group: Any | None,
) -> Numerics:  # fmt: skip
    compute, logits = product_dtypes(hidden, weight, logits_dtype)
    transform = logit_transform(config.temperature, config.logit_softcap, config.logit_scale)
    return Numerics(transform, compute, logits, memory_budget, group_name(process_group))


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wanted:
    if not torch.is_grad_enabled():
        return Wanted(False, False, False)
    return Wanted(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
