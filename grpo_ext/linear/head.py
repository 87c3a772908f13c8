"""`Head`: the matrix products of the logits route. `HeadGradient`: the gradient of the head, on both routes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._ops import products, statistics_dtype
from grpo_ext.linear.plan import Numerics, row_stride
from grpo_ext.linear.rows import Rows, copy_rows


def padded_rows(like: Tensor, rows: int, columns: int, stride: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate (rows, columns) without values, `stride` elements from row to row, and zero the padding between rows.

    A product may read past the last column of its left operand: oneDNN's AMX GEMM reads up to the next multiple of 32
    columns and multiplies by 0, so a NaN there becomes a NaN result.
    """
    buffer = like.new_empty((rows, stride), dtype=dtype or like.dtype)
    buffer[:, columns:].zero_()
    return buffer[:, :columns]


def multiply(left: Tensor, right: Tensor, out: Tensor, add: Tensor | None = None) -> None:
    """``out = left @ right + add``. On a GPU an fp32 ``out`` takes the unrounded product of 16-bit factors."""
    options: dict[str, Any] = {} if out.dtype == left.dtype else {"out_dtype": out.dtype}
    if add is None:
        torch.mm(left, right, out=out, **options)
    else:
        torch.addmm(add, left, right, out=out, **options)


class Head:
    """Multiply hidden states and gradients of logits with the head.

    The product of hidden states runs in blocks of a fixed shape, or as a whole on our own kernel
    (`grpo_ext._ops.products`).

    Args:
        weight: (V,H), bias: (V,) or None, in any dtype.
        rows: number of rows of the whole call; the buffers hold no more, rounded up to blocks.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, numerics: Numerics, rows: int) -> None:
        plan, compute_dtype, logits_dtype = numerics.plan(weight), numerics.compute_dtype, numerics.logits_dtype
        self.weight = weight.to(compute_dtype)
        self.vocab, hidden_size = weight.shape
        sixteen_bits = compute_dtype in (torch.bfloat16, torch.float16)
        self._own_product = sixteen_bits and hidden_size % 8 == 0 and products.supports(self.weight)
        self.bias = None if bias is None else bias.to(torch.float32 if self._own_product else logits_dtype).contiguous()
        self.plan = plan
        self.capacity = min(plan.rows, -(-rows // plan.block) * plan.block)
        self.mixed = logits_dtype != compute_dtype
        self._logits_dtype = logits_dtype
        self._logits_buffer: Tensor | None = None
        self._hidden_buffer = padded_rows(self.weight, self.capacity, hidden_size, row_stride(hidden_size))
        self._rounded_gradient: Tensor | None = None
        self._hidden_gradient: Tensor | None = None

    def logits(
        self, hidden: Tensor, rows: Rows, count: int, unmasked: Tensor | None, saved_logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(X, Z)``: `count` rows of hidden states in the products' dtype and their logits, in the buffers.

        Args:
            unmasked: (count,) bool; None: all rows are unmasked.
            saved_logits: Z of an earlier call, which is returned instead of a new product.
        """
        padded = -(-count // self.plan.block) * self.plan.block
        X = self._hidden_buffer[:count]
        copy_rows(hidden, rows, unmasked, X)
        if saved_logits is not None:
            return X, saved_logits
        if self._logits_buffer is None:
            self._logits_buffer = padded_rows(X, self.capacity, self.vocab, self.plan.stride, self._logits_dtype)
        Z = self._logits_buffer[:count]
        if self._own_product:  # without blocks: this is faster, and a row's bits do not depend on the number of rows
            products.logits_product(X, self.weight, self.bias, Z)
            return X, Z
        self._hidden_buffer[count:padded].zero_()
        for start in range(0, padded, self.plan.block):
            block = slice(start, start + self.plan.block)
            self._logits_product(self._hidden_buffer[block], self._logits_buffer[block])
        return X, Z

    def _logits_product(self, rows: Tensor, out: Tensor) -> None:
        if _uses_onednn(self.weight):
            out.copy_(torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], ""))
        else:
            multiply(rows, self.weight.t(), out, self.bias)

    def in_compute_dtype(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the logits in the products' dtype, rounded into a buffer if it has another."""
        if not self.mixed:
            return gradient
        if self._rounded_gradient is None:
            self._rounded_gradient = padded_rows(self.weight, self.capacity, self.vocab, self.plan.stride)
        return self._rounded_gradient[: gradient.shape[0]].copy_(gradient)

    def back_to_hidden(self, gradient: Tensor, out: Tensor, rows: Rows) -> None:
        """``out[rows] = gradient @ weight``; `out` is (tokens, H). May overwrite the X of `logits`."""
        widen = out.dtype != self.weight.dtype and out.dtype == torch.float32 and out.is_cuda
        if isinstance(rows, slice) and (widen or out.dtype == self.weight.dtype):
            target = out[rows]
        elif widen:
            if self._hidden_gradient is None:
                self._hidden_gradient = out.new_empty((self.capacity, out.shape[1]))
            target = self._hidden_gradient[: gradient.shape[0]]
        else:
            target = self._hidden_buffer[: gradient.shape[0]]
        multiply(gradient, self.weight, target)
        if isinstance(rows, Tensor):
            out.index_copy_(0, rows, target.to(out.dtype))
        elif target.dtype != out.dtype:
            out[rows] = target


def _uses_onednn(weight: Tensor) -> bool:
    """Whether oneDNN forms the product: in fp32 on the CPU.

    torch.mm would call MKL, which splits a block of few rows badly over threads. oneDNN took 0.75 of MKL's time on one
    thread and 0.45 on two (128 x 576 x 49152, EPYC).
    """
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class HeadGradient:
    """Sum the gradients of weight and bias over chunks, in fp32 (fp64 for fp64).

    Args:
        weight, bias: the parameters; None: their gradient is not wanted.
        accumulate_into: (V,H) fp32 to which the weight's gradient is added; `results` then returns none for it.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, accumulate_into: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._external_sum = accumulate_into
        self._sum = accumulate_into
        self._low_bits: Tensor | None = None  # low 16 bits of the fp32 sum if `_sum` is its high 16 bits
        self._bias_sum: Tensor | None = None

    def add(self, gradient: Tensor, hidden: Tensor, factor: Tensor | None = None, *, is_last: bool = False) -> None:
        """Add ``gradient.T @ hidden`` to the weight's sum, and the column sums of ``factor * gradient`` to the bias's.

        Args:
            gradient: (rows, V) gradient of the logits, without ``factor``.
            hidden: (rows, H) hidden states, already multiplied by ``factor``.
            factor: (rows,); None: 1.
            is_last: no other chunk follows.
        """
        if self.weight is not None:
            self._add_product(gradient, hidden, is_last)
        if self.bias is not None:
            dtype = statistics_dtype(gradient.dtype)
            if factor is None:
                total = gradient.sum(dim=0, dtype=dtype)
            else:
                total = gradient.new_empty((1, gradient.shape[1]), dtype=dtype)
                row = factor.to(gradient.dtype).unsqueeze(0)
                if not gradient.is_cuda:
                    row, gradient = row.to(dtype), gradient.to(dtype)
                multiply(row, gradient, total)
                total = total.squeeze(0)
            self._bias_sum = total if self._bias_sum is None else self._bias_sum.add_(total)

    def _add_product(self, gradient: Tensor, hidden: Tensor, is_last: bool) -> None:
        assert self.weight is not None
        left, previous = gradient.t(), self._sum
        if previous is None and is_last and self.weight.dtype == hidden.dtype:
            self._sum = torch.mm(left, hidden)  # the only chunk: the product itself accumulates in fp32
        elif self._splits_sum(gradient, hidden):
            if self._sum is None:
                self._sum, self._low_bits = hidden.new_empty(self.weight.shape), hidden.new_empty(self.weight.shape)
            assert self._low_bits is not None
            products.head_gradient(gradient, hidden, self._sum, self._low_bits, first=previous is None, last=is_last)
            if is_last:
                self._low_bits = None
        else:
            if self._sum is None:
                self._sum = hidden.new_empty(self.weight.shape, dtype=statistics_dtype(hidden.dtype))
            if hidden.is_cuda or hidden.dtype == self._sum.dtype:
                multiply(left, hidden, self._sum, previous)
            elif previous is None:
                self._sum.copy_(torch.mm(left, hidden))
            else:
                self._sum.add_(torch.mm(left, hidden))

    def _splits_sum(self, gradient: Tensor, hidden: Tensor) -> bool:
        """Whether the fp32 sum of several products is stored as high and low 16 bits.

        The high bits become the bf16 gradient in place. This takes two thirds of the memory of an fp32 sum and its
        rounded copy, and about half of their traffic.
        """
        assert self.weight is not None
        if self._low_bits is not None:
            return True
        rounded = self.weight.dtype == hidden.dtype == torch.bfloat16
        aligned = hidden.shape[1] % 8 == 0  # H is the row stride of both halves
        return self._sum is None and rounded and aligned and products.supports(gradient, hidden)

    def results(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias in their dtypes; empty tensors for those not wanted."""
        of_weight = of_bias = like.new_empty(0)
        if self.weight is not None and self._external_sum is None:
            assert self._low_bits is None, "add(is_last=True) is missing"
            of_weight = torch.zeros_like(self.weight) if self._sum is None else self._sum.to(self.weight.dtype)
        if self.bias is not None:
            of_bias = torch.zeros_like(self.bias) if self._bias_sum is None else self._bias_sum.to(self.bias.dtype)
        return of_weight, of_bias


def drop_rows(nonzero: Tensor, rows: Rows, *buffers: Tensor) -> tuple[Rows, int]:
    """Move the rows of the buffers whose gradient is not 0 to the front; return those rows and their number.

    For the CPU only: counting rows of a CUDA tensor is a host sync. No more rows move than are dropped.

    Args:
        nonzero: (rows,) bool. rows: of the flattened tokens. buffers: (rows, ...), changed in place.
    """
    count = int(nonzero.sum())
    total = nonzero.numel()
    if total - count <= total // 16:  # moving would cost more than it saves
        return rows, total
    holes = torch.nonzero(~nonzero[:count]).flatten()
    movers = torch.nonzero(nonzero[count:]).flatten() + count
    order = torch.arange(count, device=nonzero.device)
    order[holes] = movers
    for buffer in buffers:
        buffer.index_copy_(0, holes, buffer.index_select(0, movers))
    index = torch.arange(rows.start, rows.stop, device=nonzero.device) if isinstance(rows, slice) else rows
    return index[order], count
