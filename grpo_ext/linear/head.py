"""The products of the logits route with the head, and the sums of the head's gradient on either route.

The row kernels between the products are in `grpo_ext.vocabulary`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext._ops import products, statistics_dtype
from grpo_ext.linear.plan import Numerics, row_stride
from grpo_ext.linear.rows import Rows


def padded_rows(like: Tensor, rows: int, columns: int, stride: int, dtype: torch.dtype | None = None) -> Tensor:
    """(rows, columns) uninitialized, `stride` elements from row to row, with zeros in the padding between them.

    A product may read past the last column of its left operand: oneDNN's AMX GEMM reads up to the next multiple of 32
    columns and multiplies by 0, so a NaN there becomes a NaN result.
    """
    buffer = like.new_empty((rows, stride), dtype=dtype or like.dtype)
    buffer[:, columns:].zero_()
    return buffer[:, :columns]


class Head:
    """Multiply hidden states with the head, and gradients of logits with it. The product with the hidden states runs in
    blocks of a fixed shape, or in one piece if it is our own (`grpo_ext._ops.products`).

    Args:
        weight: (V,H), bias: (V,) or None, in any dtype. rows: of the whole call; the buffers hold at most that many.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, numerics: Numerics, rows: int) -> None:
        plan, compute_dtype, logits_dtype = numerics.plan(weight), numerics.compute_dtype, numerics.logits_dtype
        self.weight = weight.to(compute_dtype)
        self.vocab, hidden_size = weight.shape
        sixteen_bits = compute_dtype in (torch.bfloat16, torch.float16)
        self._own_product = sixteen_bits and hidden_size % 8 == 0 and products.served(self.weight)
        self.bias = None if bias is None else bias.to(torch.float32 if self._own_product else logits_dtype).contiguous()
        self.plan = plan
        self.capacity = min(plan.rows, -(-rows // plan.block) * plan.block)
        self.mixed = logits_dtype != compute_dtype
        self._logits_dtype = logits_dtype
        self._buffer: Tensor | None = None
        self._hidden = padded_rows(self.weight, self.capacity, hidden_size, row_stride(hidden_size))
        self._rounded: Tensor | None = None
        self._product: Tensor | None = None

    def logits(
        self, hidden: Tensor, rows: Rows, count: int, unmasked: Tensor | None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(X, Z)``: `count` rows of hidden states in the products' dtype, and their logits, both in the buffers.

        unmasked: (count,) bool; None: all of them are. kept: the logits, if an earlier call has saved them.
        """
        padded = -(-count // self.plan.block) * self.plan.block
        X = self._hidden[:count]
        if isinstance(rows, Tensor) and hidden.dtype == X.dtype:
            torch.index_select(hidden, 0, rows, out=X)
        else:
            X.copy_(hidden[rows])
        if unmasked is not None:  # 0 times whatever a masked row holds must be 0
            X.masked_fill_(~unmasked.unsqueeze(1), 0)
        if kept is not None:
            return X, kept
        if self._buffer is None:
            self._buffer = padded_rows(X, self.capacity, self.vocab, self.plan.stride, self._logits_dtype)
        Z = self._buffer[:count]
        if self._own_product:  # in one piece: it is faster, and a row's bits do not depend on the number of rows
            products.logits_product(X, self.weight, self.bias, Z)
            return X, Z
        self._hidden[count:padded].zero_()
        for start in range(0, padded, self.plan.block):
            block = slice(start, start + self.plan.block)
            self._logits_product(self._hidden[block], self._buffer[block])
        return X, Z

    def _logits_product(self, rows: Tensor, out: Tensor) -> None:
        transposed = self.weight.t()
        if _onednn_serves(self.weight):
            out.copy_(torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], ""))
        elif self.mixed and self.bias is not None:
            torch.addmm(self.bias, rows, transposed, out_dtype=out.dtype, out=out)
        elif self.mixed:
            torch.mm(rows, transposed, out_dtype=out.dtype, out=out)
        elif self.bias is not None:
            torch.addmm(self.bias, rows, transposed, out=out)
        else:
            torch.mm(rows, transposed, out=out)

    def left_factor(self, gradient: Tensor) -> Tensor:
        """The gradient of the logits in the products' dtype."""
        if not self.mixed:
            return gradient
        if self._rounded is None:
            self._rounded = padded_rows(self.weight, self.capacity, self.vocab, self.plan.stride)
        return self._rounded[: gradient.shape[0]].copy_(gradient)

    def back_to_hidden(self, gradient: Tensor, out: Tensor, rows: Rows) -> None:
        """``out[rows] = gradient @ weight``; `out` is (tokens, H). May overwrite the X of `logits`."""
        widen = out.dtype != self.weight.dtype and out.dtype == torch.float32 and out.is_cuda
        if isinstance(rows, slice) and (widen or out.dtype == self.weight.dtype):
            target = out[rows]
        elif widen:
            if self._product is None:
                self._product = out.new_empty((self.capacity, out.shape[1]))
            target = self._product[: gradient.shape[0]]
        else:
            target = self._hidden[: gradient.shape[0]]
        if widen:
            torch.mm(gradient, self.weight, out_dtype=out.dtype, out=target)
        else:
            torch.mm(gradient, self.weight, out=target)
        if isinstance(rows, Tensor):
            out.index_copy_(0, rows, target.to(out.dtype))
        elif target.dtype != out.dtype:
            out[rows] = target


def _onednn_serves(weight: Tensor) -> bool:
    """Whether oneDNN forms the product: in fp32 on the CPU. torch.mm calls MKL there, which splits a block of few rows
    badly over threads: oneDNN needed 0.75 of its time on one thread and 0.45 on two (128 x 576 x 49152, EPYC)."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class HeadGradient:
    """Sum ``gradient.T @ hidden`` and the gradient itself over chunks, in fp32 (fp64 for fp64).

    Args:
        weight, bias: the parameters; None: their gradient is not wanted.
        accumulate_into: (V,H) fp32 to which the gradient of the weight is added; it is not returned then.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, accumulate_into: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._given = accumulate_into
        self._sum = accumulate_into
        self._lower: Tensor | None = None  # low 16 bits of an fp32 sum; `_sum` has the high ones
        self._bias_sum: Tensor | None = None

    def add(self, gradient: Tensor, right: Tensor, factor: Tensor | None = None, *, is_last: bool = False) -> None:
        """Add a chunk.

        Args:
            gradient: (rows, V). right: (rows, H) hidden states, times ``factor`` if that is given.
            factor: (rows,) to multiply the gradient's rows by; None: 1.
            is_last: nothing is added after this.
        """
        if self.weight is not None:
            self._add_product(gradient, right, is_last)
        if self.bias is not None:
            if factor is None:
                total = gradient.sum(dim=0, dtype=statistics_dtype(gradient.dtype))
            else:
                total = weighted_rows(gradient, factor)
            self._bias_sum = total if self._bias_sum is None else self._bias_sum.add_(total)

    def _add_product(self, gradient: Tensor, right: Tensor, is_last: bool) -> None:
        assert self.weight is not None
        wide = statistics_dtype(right.dtype)
        left = gradient.t()
        if self._sum is None and is_last and self.weight.dtype == right.dtype:
            # A single product needs no wider sum: it accumulates in fp32 itself.
            self._sum = torch.mm(left, right)
        elif self._in_planes(gradient, right):
            is_first = self._sum is None
            if self._sum is None:
                self._sum, self._lower = right.new_empty(self.weight.shape), right.new_empty(self.weight.shape)
            assert self._lower is not None
            products.head_gradient(gradient, right, self._sum, self._lower, first=is_first, last=is_last)
            if is_last:
                self._lower = None
        elif self._sum is None:
            self._sum = right.new_empty(self.weight.shape, dtype=wide)
            if right.dtype == wide:
                torch.mm(left, right, out=self._sum)
            elif right.is_cuda:
                torch.mm(left, right, out_dtype=wide, out=self._sum)
            else:
                self._sum.copy_(torch.mm(left, right))
        elif right.dtype == self._sum.dtype:
            torch.addmm(self._sum, left, right, out=self._sum)
        elif right.is_cuda:
            torch.addmm(self._sum, left, right, out_dtype=wide, out=self._sum)
        else:
            self._sum.add_(torch.mm(left, right))

    def _in_planes(self, gradient: Tensor, right: Tensor) -> bool:
        """Whether the sum of several products lies in two planes of 16 bits, whose upper one becomes the gradient. That
        takes a third less memory than an fp32 sum with a rounded copy, and nearly half the traffic."""
        assert self.weight is not None
        if self._lower is not None:
            return True
        rounded = self.weight.dtype == right.dtype == torch.bfloat16
        aligned = right.shape[1] % 8 == 0  # the planes are dense, unlike the rows of `right`
        return self._sum is None and rounded and aligned and products.served(gradient, right)

    def results(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias in their dtypes; empty if not wanted."""
        nothing = like.new_empty(0)
        of_weight, of_bias = nothing, nothing
        if self.weight is not None and self._given is None:
            assert self._lower is None, "add(is_last=True) is missing"
            of_weight = torch.zeros_like(self.weight) if self._sum is None else self._sum.to(self.weight.dtype)
        if self.bias is not None:
            of_bias = torch.zeros_like(self.bias) if self._bias_sum is None else self._bias_sum.to(self.bias.dtype)
        return of_weight, of_bias


def weighted_rows(gradient: Tensor, factor: Tensor) -> Tensor:
    """``factor @ gradient`` in fp32 (fp64 for fp64)."""
    wide = statistics_dtype(gradient.dtype)
    row = factor.to(gradient.dtype).unsqueeze(0)
    if gradient.dtype == wide:
        return torch.mm(row, gradient).squeeze(0)
    if gradient.is_cuda:
        return torch.mm(row, gradient, out_dtype=wide).squeeze(0)
    return torch.mm(row.to(wide), gradient.to(wide)).squeeze(0)


def drop_rows(nonzero: Tensor, rows: Rows, *buffers: Tensor) -> tuple[Rows, int]:
    """Move the nonzero rows of the buffers to their front; return which rows these are, and their number.

    For the CPU, where a count needs no wait. At most as many rows are moved as are dropped.
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
