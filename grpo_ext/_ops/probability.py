"""Call the kernels of the probability route (csrc/cuda/probability/probability.h) on the current stream.

`grpo_ext.linear.routes.probabilities` allocates the tensors. `grpo_ext.linear.routes.probabilities_reference` has each
kernel in plain torch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.cuda import workspace
from grpo_ext._ops.packing import DTYPE_CODES, Params, count_call, matrix, place, pointer, policy_of

if TYPE_CHECKING:
    from grpo_ext._ops.schemas import PolicyTensors

#: Vocabulary columns per partial sum (kTileColumns of the kernel).
TILE_COLUMNS = 256


@dataclasses.dataclass(frozen=True)
class ChunkRows:
    """The rows of a chunk: row i is token ``index[i]``, or ``first + i`` without an index."""

    count: int
    first: int
    index: Tensor | None  # (count,) int64
    mask: Tensor | None  # (tokens,) bool; None: none masked

    def params(self) -> Params:
        return {
            "count": self.count,
            "first": self.first,
            "index": pointer(self.index),
            "mask": pointer(self.mask),
        }


@dataclasses.dataclass(frozen=True)
class RowCoefficients:
    """Inputs of `fold` for a loss whose dLoss/dlogp of a token depends on no other row's logits."""

    tensors: PolicyTensors  # kept alive: `policy` holds their addresses
    policy: Params
    workspace: Tensor
    constants: int  # address in `workspace`


def row_coefficients(tensors: PolicyTensors, spec: list[float]) -> RowCoefficients:
    """Compute the sequences' constants, from which `fold` computes each row's coefficient."""
    count_call()
    policy = policy_of(tensors, spec, logps=None, entropy=None, loss=None, kl=None, metrics=None)
    memory = workspace(tensors.mask)
    constants = _C.cuda_sequence_constants(*place(tensors.mask), policy, memory.data_ptr())
    return RowCoefficients(tensors, policy, memory, constants)


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
    """Gather the chunk's rows, and set each row's reference, target column and exponent (TargetParams)."""
    count_call()
    params = {
        "dtype": DTYPE_CODES[hidden.dtype],
        "rows": rows.params(),
        "hidden_size": hidden.shape[1],
        "vocab": weight.shape[0],
        "shard": pointer(shard),
        **matrix("hidden", hidden),
        "gathered": pointer(gathered),
        **matrix("weight", weight),
        "bias": pointer(bias),
        "ids": pointer(ids),
        "slope": slope / math.log(2),
        "reference": pointer(reference),
        "target": pointer(target),
        "exponent": pointer(exponent),
    }
    _C.cuda_target_reference(*place(hidden), params)


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
    """Compute E, unless ``probabilities`` is None, and the partial sums (ProductParams)."""
    count_call()
    params = {
        "dtype": DTYPE_CODES[hidden.dtype],
        "rows": hidden.shape[0],
        "vocab": weight.shape[0],
        "hidden_size": hidden.shape[1],
        **matrix("hidden", hidden),
        **matrix("weight", weight),
        "bias": pointer(bias),
        "reference": pointer(reference),
        "target": pointer(target),
        "slope": slope / math.log(2),
        "probabilities": pointer(probabilities),
        "stride": 0 if probabilities is None else probabilities.stride(0),
        "partials": pointer(partials),
        "partials_stride": partials.stride(0) // 2,
        "recentred": pointer(recentred),
        "recentred_stride": recentred.stride(0),
        "exponent": pointer(exponent),
    }
    _C.cuda_probability_product(*place(hidden), params)


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
    """Fold the partial sums into log probabilities, entropies and row factors, or into ``sums`` (FoldParams)."""
    count_call()
    params = {
        "dtype": DTYPE_CODES[dtype],
        "rows": rows.params(),
        "tiles": partials.shape[0],
        "partials": pointer(partials),
        "partials_stride": partials.stride(0) // 2,
        "recentred": pointer(recentred),
        "recentred_stride": recentred.stride(0),
        "reference": pointer(reference),
        "exponent": pointer(exponent),
        "target": pointer(target),
        "slope": slope,
        "sums": 0 if sums is None else pointer(sums[0]),
        "recentred_sums": 0 if sums is None else pointer(sums[1]),
        "logps": pointer(logps),
        "entropy": pointer(entropy),
        "factor": pointer(factor),
        "residual": pointer(residual),
        "probabilities": pointer(probabilities),
        "stride": 0 if probabilities is None else probabilities.stride(0),
        "stored": 0 if probabilities is None else probabilities.shape[0],
        "vocab": 0 if probabilities is None else probabilities.shape[1],
        "rank": rank,
        "constants": 0 if coefficients is None else coefficients.constants,
        "policy": None if coefficients is None else coefficients.policy,
    }
    _C.cuda_fold_partials(*place(partials), params)


def scale(
    rows: ChunkRows,
    product: Tensor,
    factor: Tensor,
    residual: Tensor | None,
    target: Tensor | None,
    weight: Tensor,
    out: Tensor,
) -> None:
    """Write ``factor * (product + residual * weight[target])`` to the rows' tokens (ScaleParams)."""
    count_call()
    params = {
        "dtype": DTYPE_CODES[weight.dtype],
        "out_dtype": DTYPE_CODES[out.dtype],
        "rows": rows.params(),
        "hidden_size": product.shape[1],
        "product": pointer(product),
        "factor": pointer(factor),
        "residual": pointer(residual),
        "target": pointer(target),
        **matrix("weight", weight),
        "out": pointer(out),
    }
    _C.cuda_scale_product(*place(product), params)


def scaled_hidden(hidden: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write ``factor * hidden``, rounded once."""
    count_call()
    params = {
        "dtype": DTYPE_CODES[hidden.dtype],
        "rows": hidden.shape[0],
        "hidden_size": hidden.shape[1],
        **matrix("hidden", hidden),
        "factor": pointer(factor),
        "out": pointer(out),
    }
    _C.cuda_scaled_hidden(*place(hidden), params)
