"""Call the products with the LM head on Hopper GPUs (csrc/cuda/gemm_sm90/products.h) on the current stream."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.packing import DTYPE_CODES, count_call, matrix, place, pointer


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def supports(*matrices: Tensor) -> bool:
    """Whether the kernels accept these matrices: on a Hopper GPU, dense rows that start at multiples of 16 bytes."""
    if not matrices[0].is_cuda or not _C.CUDA_HOPPER_PRODUCTS or not _is_hopper(matrices[0].get_device()):
        return False
    return all(
        m.dim() == 2 and m.stride(1) == 1 and m.stride(0) * m.itemsize % 16 == 0 and m.data_ptr() % 16 == 0
        for m in matrices
    )


def logits_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute ``out = hidden @ weight.T + bias``. A row's bits depend neither on other rows nor on their number.

    Args:
        hidden: (rows, H), bf16 or fp16.
        weight: (V, H), dtype of ``hidden``.
        bias: (V,) fp32, or None.
        out: (rows, V), dtype of ``hidden`` or fp32.
    """
    count_call()
    params = {
        "dtype": DTYPE_CODES[hidden.dtype],
        "rows": hidden.shape[0],
        "vocab": weight.shape[0],
        "hidden_size": hidden.shape[1],
        **matrix("hidden", hidden),
        **matrix("weight", weight),
        "bias": pointer(bias),
        "out_dtype": DTYPE_CODES[out.dtype],
        **matrix("out", out),
    }
    _C.cuda_logits_product(*place(hidden), params)


def head_gradient(left: Tensor, right: Tensor, upper: Tensor, lower: Tensor, *, first: bool, last: bool) -> None:
    """Add ``left.T @ right`` to an fp32 sum that is stored in two planes of 16 bits.

    Args:
        left: (rows, V) bf16.
        right: (rows, H) bf16.
        upper: (V, H), 16-bit elements, dense: the upper halves of the fp32 words.
        lower: (V, H), like ``upper``: the lower halves.
        first: the planes hold no sum yet.
        last: round the sum to bf16 into ``upper``; ``lower`` is then meaningless.

    Raises:
        ValueError: both ``first`` and ``last``; use `torch.mm` for a single product.
    """
    count_call()
    params = {
        "dtype": DTYPE_CODES[left.dtype],
        "rows": left.shape[0],
        "vocab": left.shape[1],
        "hidden_size": right.shape[1],
        **matrix("left", left),
        **matrix("right", right),
        "upper": pointer(upper),
        "lower": pointer(lower),
        "first": first,
        "last": last,
    }
    _C.cuda_head_gradient(*place(left), params)
