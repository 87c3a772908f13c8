"""The numerics and sizes of a call: dtypes of the products, rows that share the logits buffer.

A logits product has the same shape for any number of rows, ``block`` rows times the head. So its kernel never changes,
and the bits of a row do not depend on the other rows. The buffer holds as many whole blocks as the memory budget
allows. On a Hopper GPU the product is our own (`grpo_ext._ops.products`): its bits do not depend on the number of rows,
so it takes all rows of the buffer at once.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_ext._ops import statistics_dtype

#: Default memory budget in bytes for logits and the buffers beside them. CUDA: 4096 rows of 151,936 bf16 logits and
#: their hidden states. CPU: a few hundred rows; more do not make a product faster.
DEFAULT_BUDGET = {"cuda": 1220 << 20, "cpu": 128 << 20}

#: A trainer's default budget. It costs up to 15 % more of the head's time (H 1024, head trained), and takes no more
#: memory beside the layers than other trainers' chunks.
TRAINER_BUDGET = {"cuda": 512 << 20}

#: Rows of one logits product. Larger blocks waste more on the last one, half a block on average; smaller ones fill
#: neither the GPU (1024 x 151,936 is 36 waves of 128 x 256 tiles on 132 SMs) nor the packed panels of a CPU product.
BLOCK = {"cuda": 1024, "cpu": 128}

#: Rows of the buffers start at multiples of this many elements: aligned for any vocabulary and hidden size, and the
#: gradient products of V = 50257 run on the kernels of V = 50304.
ROW_ALIGNMENT = 64


def row_stride(columns: int) -> int:
    """Elements between two rows of a buffer with that many columns."""
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """``block`` rows to a logits product, ``rows`` rows (a multiple of it) in the buffer, ``stride`` between rows."""

    block: int
    rows: int
    stride: int


def chunk_plan(
    vocab: int,
    hidden_size: int,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    device_type: str,
    memory_budget: int | None,
) -> ChunkPlan:
    """The plan that fits `memory_budget` bytes. It depends on the head, never on the number of rows."""
    budget = memory_budget or DEFAULT_BUDGET.get(device_type, DEFAULT_BUDGET["cuda"])
    stride = row_stride(vocab)
    per_row = stride * logits_dtype.itemsize + row_stride(hidden_size) * compute_dtype.itemsize
    if logits_dtype != compute_dtype:  # the gradient is rounded into a buffer of its own
        per_row += stride * compute_dtype.itemsize
    fitting = max(1, budget // per_row)
    block = BLOCK.get(device_type, BLOCK["cuda"])
    while block > fitting:
        block //= 2
    return ChunkPlan(block, fitting // block * block, stride)


class Numerics(NamedTuple):
    """How logits are formed of hidden states, and in how much memory."""

    transform: list[float]  # `grpo_ext._ops.logit_transform`
    compute_dtype: torch.dtype  # of the factors of the products
    logits_dtype: torch.dtype
    memory_budget: int | None  # bytes; None: the default
    group: str | None  # name of the process group that shares the vocabulary

    def plan(self, weight: Tensor) -> ChunkPlan:
        vocab, hidden_size = weight.shape
        return chunk_plan(
            vocab, hidden_size, self.compute_dtype, self.logits_dtype, weight.device.type, self.memory_budget
        )

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.logits_dtype)


def product_dtypes(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the factors of the products, dtype of the logits).

    Under autocast the factors have autocast's dtype, as in ``torch.nn.functional.linear``. The logits have the same
    dtype unless `logits_dtype` asks for float32.
    """
    compute = hidden.dtype
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and compute != torch.float64:
        compute = torch.get_autocast_dtype(kind)
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {_name(hidden.dtype)} and weight {_name(weight.dtype)}: run under torch.autocast, or cast one "
            f"of them, e.g. hidden.to({_name(weight.dtype)})"
        )
    logits = logits_dtype or compute
    if logits not in (compute, torch.float32):
        raise TypeError(
            f"logits_dtype must be None, 'float32' or the dtype of the product ({_name(compute)}), got {_name(logits)}"
        )
    if compute == torch.float64:
        logits = compute
    if kind == "cpu" and logits != compute:
        compute = logits  # no mixed products on the CPU: the factors are widened instead, which is exact
    return compute, logits


def parse_logits_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """``"float32"`` and ``torch.float32`` are the same."""
    if value is None or isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"logits_dtype must be None, 'float32' or a torch.dtype, got {value!r}")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype)
