"""The kernels around and of the probability product (csrc/cuda/probability/probability.h), called with tensors.

Work is enqueued on the current stream of the tensors' device. Tensors are as `grpo_ext.linear.probabilities` makes
them; `grpo_ext.linear.probabilities_reference` says in plain torch what each computes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.packing import DTYPE_CODES, count_call, place, pointer, policy_of

if TYPE_CHECKING:
    from grpo_ext._checks import PolicyTensors

#: Vocabulary columns to a partial sum, as in the kernel.
TILE_COLUMNS = 256


@dataclasses.dataclass(frozen=True)
class ChunkRows:
    """The rows of a chunk: row i is token ``index[i]``, or ``first + i`` without an index."""

    count: int
    first: int
    index: Tensor | None  # (count,) int64
    mask: Tensor | None  # (tokens,) bool; None: all count

    def packed(self) -> tuple[int, int, int, int]:
        return self.count, self.first, pointer(self.index), pointer(self.mask)


@dataclasses.dataclass(frozen=True)
class RowCoefficients:
    """A loss in which dLoss/dlogp of a token depends on no other row's logits, ready for `fold`; see
    `row_coefficients`."""

    tensors: PolicyTensors  # whose addresses are in `packed`
    packed: tuple[Any, ...]
    spec: list[float]
    workspace: Tensor


def row_coefficients(tensors: PolicyTensors, spec: list[float]) -> RowCoefficients:
    count_call()
    mask = tensors.mask
    packed = policy_of(mask.shape, *tensors, logps=None, entropy=None, loss=None, kl=None, metrics=None)
    workspace = mask.new_empty(_C.cuda_workspace_bytes(*mask.shape), dtype=torch.uint8)
    _C.cuda_policy_terms(*place(mask), packed, spec, workspace.data_ptr())
    return RowCoefficients(tensors, packed, spec, workspace)


def target_reference(
    rows: ChunkRows,
    hidden: Tensor,
    gathered: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    slope: float,
    shard: Tensor | None,
    reference: Tensor,
    target: Tensor,
    exponent: Tensor,
) -> None:
    count_call()
    _C.cuda_target_reference(
        *place(hidden), rows.packed(),
        (
            DTYPE_CODES[hidden.dtype], hidden.shape[1], weight.shape[0], pointer(shard),
            hidden.data_ptr(), hidden.stride(0), pointer(gathered),
            weight.data_ptr(), weight.stride(0), pointer(bias), ids.data_ptr(), slope / math.log(2),
            reference.data_ptr(), target.data_ptr(), exponent.data_ptr(),
        ),
    )  # fmt: skip


def product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: Tensor,
    target: Tensor,
    slope: float,
    probabilities: Tensor | None,
    partials: Tensor,
    recentred: Tensor,
    exponent: Tensor,
) -> None:
    count_call()
    _C.cuda_probability_product(
        *place(hidden),
        (
            DTYPE_CODES[hidden.dtype], hidden.shape[0], weight.shape[0], hidden.shape[1],
            hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), pointer(bias),
            reference.data_ptr(), target.data_ptr(), slope / math.log(2),
            pointer(probabilities), 0 if probabilities is None else probabilities.stride(0),
            partials.data_ptr(), partials.stride(0) // 2, recentred.data_ptr(), recentred.stride(0),
            exponent.data_ptr(),
        ),
    )  # fmt: skip


def fold(
    rows: ChunkRows,
    partials: Tensor,
    recentred: Tensor,
    reference: Tensor,
    exponent: Tensor,
    target: Tensor,
    slope: float,
    sums: tuple[Tensor, Tensor] | None,
    logps: Tensor,
    entropy: Tensor,
    factor: Tensor,
    residual: Tensor,
    probabilities: Tensor | None,
    dtype: torch.dtype,
    coefficients: RowCoefficients | None,
    rank: int = -1,
) -> None:
    count_call()
    policy: tuple[Any, ...] = ()
    spec: list[float] = []
    workspace = 0
    if coefficients is not None:
        policy, spec = coefficients.packed, coefficients.spec
        workspace = coefficients.workspace.data_ptr()
    _C.cuda_fold_partials(
        *place(partials), rows.packed(),
        (
            DTYPE_CODES[dtype], partials.shape[0], partials.data_ptr(), partials.stride(0) // 2,
            recentred.data_ptr(), recentred.stride(0), reference.data_ptr(),
            exponent.data_ptr(), target.data_ptr(), slope, *((0, 0) if sums is None else map(pointer, sums)),
            logps.data_ptr(), entropy.data_ptr(), factor.data_ptr(), residual.data_ptr(), pointer(probabilities),
            0 if probabilities is None else probabilities.stride(0),
            *((0, 0) if probabilities is None else probabilities.shape), rank,
        ),
        policy, spec, workspace,
    )  # fmt: skip


def scale(
    rows: ChunkRows,
    product: Tensor,
    factor: Tensor,
    residual: Tensor | None,
    target: Tensor | None,
    weight: Tensor,
    out: Tensor,
) -> None:
    count_call()
    _C.cuda_scale_product(
        *place(product), rows.packed(),
        (
            DTYPE_CODES[weight.dtype], DTYPE_CODES[out.dtype], product.shape[1], product.data_ptr(), factor.data_ptr(),
            pointer(residual), pointer(target), weight.data_ptr(), weight.stride(0), out.data_ptr(),
        ),
    )  # fmt: skip


def scaled_hidden(hidden: Tensor, factor: Tensor, out: Tensor) -> None:
    count_call()
    _C.cuda_scaled_hidden(
        *place(hidden),
        (
            DTYPE_CODES[hidden.dtype], hidden.shape[0], hidden.shape[1], hidden.data_ptr(), hidden.stride(0),
            factor.data_ptr(), out.data_ptr(),
        ),
    )  # fmt: skip
