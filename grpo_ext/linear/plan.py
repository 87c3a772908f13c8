"""The numerics and sizes of a call: dtypes of the products, number of rows in the logits buffer.

Logits are computed in products of one fixed shape, ``block`` rows times the head. The library's kernel is then always
the same, and the bits of a row do not depend on the other rows. The buffer holds as many whole blocks as the memory
budget allows. On a Hopper GPU our own kernel (`grpo_ext._ops.products`) multiplies all rows of the buffer at once: its
bits do not depend on the number of rows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_ext._ops import statistics_dtype

#: Default memory budget in bytes for logits and the buffers of the same rows. CUDA: 4096 rows of 151,936 bf16 logits
#: and their hidden states. CPU: a few hundred rows; more do not make a product faster.
DEFAULT_BUDGET = {"cuda": 1220 << 20, "cpu": 128 << 20}

#: A trainer's default budget in bytes. The head takes up to 15 % longer than with `DEFAULT_BUDGET` (H 1024, head
#: trained), and needs no more memory than the chunks of other trainers.
TRAINER_BUDGET = {"cuda": 512 << 20}

#: Rows of one logits product. Larger blocks waste more on the last one, half a block on average. With smaller ones the
#: idle part of a GPU's last wave of tiles weighs more (1024 x 151,936 is 36 waves of 128 x 256 tiles on 132 SMs), and
#: they do not fill the packed panels of a CPU product.
BLOCK = {"cuda": 1024, "cpu": 128}

#: Rows of the buffers start at multiples of this many elements. They are aligned for any vocabulary and hidden size:
#: gradient products of V = 50257 use the fast kernels of V = 50304.
ROW_ALIGNMENT = 64


def row_stride(columns: int) -> int:
    """Return the number of elements from one row to the next in a buffer with that many columns."""
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """Sizes of the logits buffer and of its products."""

    block: int  # rows of one logits product
    rows: int  # rows of the buffer, a multiple of `block`
    stride: int  # elements from one row to the next


def chunk_plan(
    vocab: int,
    hidden_size: int,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    device_type: str,
    memory_budget: int | None,
) -> ChunkPlan:
    """Return the plan that fits `memory_budget` bytes; it does not depend on the number of rows of a call."""
    budget = memory_budget or DEFAULT_BUDGET.get(device_type, DEFAULT_BUDGET["cuda"])
    stride = row_stride(vocab)
    per_row = stride * logits_dtype.itemsize + row_stride(hidden_size) * compute_dtype.itemsize
    if logits_dtype != compute_dtype:  # the rounded gradient has its own buffer
        per_row += stride * compute_dtype.itemsize
    fitting = max(1, budget // per_row)
    block = BLOCK.get(device_type, BLOCK["cuda"])
    while block > fitting:
        block //= 2
    return ChunkPlan(block, fitting // block * block, stride)


class Numerics(NamedTuple):
    """How logits are computed from hidden states, and in how much memory."""

    transform: list[float]  # from raw to processed logits, see `grpo_ext._ops.logit_transform`
    compute_dtype: torch.dtype  # of the factors of the products
    logits_dtype: torch.dtype
    memory_budget: int | None  # bytes; None: `DEFAULT_BUDGET`
    group: str | None  # name of the process group over which the vocabulary is split; None: it is whole

    def plan(self, weight: Tensor) -> ChunkPlan:
        vocab, hidden_size = weight.shape
        return chunk_plan(
            vocab, hidden_size, self.compute_dtype, self.logits_dtype, weight.device.type, self.memory_budget
        )

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.logits_dtype)


def product_dtypes(
    hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | str | None
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of the products' factors and the dtype of the logits.

    Under autocast the factors have autocast's dtype, as in ``torch.nn.functional.linear``. The logits have the dtype of
    the factors unless `logits_dtype` is float32.
    """
    wanted = getattr(torch, logits_dtype, None) if isinstance(logits_dtype, str) else logits_dtype
    if logits_dtype is not None and not isinstance(wanted, torch.dtype):
        raise TypeError(f"logits_dtype must be None, 'float32' or a torch.dtype, got {logits_dtype!r}")
    compute = hidden.dtype
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and compute != torch.float64:
        compute = torch.get_autocast_dtype(kind)
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: run under torch.autocast, or cast one "
            f"of them, e.g. hidden.to({weight.dtype})"
        )
    logits = wanted or compute
    if logits not in (compute, torch.float32):
        raise TypeError(f"logits_dtype must be None, 'float32' or the dtype of the product ({compute}), got {logits}")
    if compute == torch.float64:
        logits = compute
    if kind == "cpu" and logits != compute:
        compute = logits  # the CPU has no products of mixed dtypes; widening the factors is exact
    return compute, logits
