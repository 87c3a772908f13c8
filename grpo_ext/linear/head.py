"""The LM head as the products see it: factors of one dtype, a logits buffer, and sums of the gradients.

Everything that multiplies is here. The row kernels between the products are in `vocabulary` and `parallel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext._ops import products, statistics_dtype
from grpo_ext.linear.plan import ChunkPlan, row_stride

Rows = Tensor | slice  # rows of the flattened tokens: indices, or a range


def padded_rows(like: Tensor, rows: int, columns: int, stride: int, dtype: torch.dtype | None = None) -> Tensor:
    """(rows, columns) uninitialized, `stride` elements from row to row, with zeros in the padding between them.

    A product may read past the last column of its left operand: oneDNN's AMX GEMM reads up to the next multiple of 32
    columns and multiplies by 0, so a NaN there becomes a NaN result.
    """
    buffer = like.new_empty((rows, stride), dtype=dtype or like.dtype)
    buffer[:, columns:].zero_()
    return buffer[:, :columns]


class Head:
    """``logits = hidden @ weight.T + bias``, and the product back to the hidden states. In blocks of a fixed shape, but
    in one piece where the product is our own (`grpo_ext._ops.products`).

    Args:
        weight: (V,H), bias: (V,) or None, in any dtype. rows: how many rows the whole call has; the buffers are no
            larger than that needs.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        plan: ChunkPlan,
        compute_dtype: torch.dtype,
        logits_dtype: torch.dtype,
        rows: int,
    ) -> None:
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
        self, hidden: Tensor, where: Rows, count: int, live: Tensor | None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(X, Z)``: `count` rows of hidden states in the products' dtype, and their logits, both in the buffers.

        live: (count,) bool, 0 for masked rows among them, None = there are none. kept: the logits, where an earlier
        call has left them.
        """
        padded = -(-count // self.plan.block) * self.plan.block
        rows = self._hidden[:count]
        if isinstance(where, Tensor) and hidden.dtype == rows.dtype:
            torch.index_select(hidden, 0, where, out=rows)
        else:
            rows.copy_(hidden[where])
        if live is not None:  # 0 times whatever a masked row holds must be 0
            rows.masked_fill_(~live.unsqueeze(1), 0)
        if kept is not None:
            return rows, kept
        if self._buffer is None:
            self._buffer = padded_rows(rows, self.capacity, self.vocab, self.plan.stride, self._logits_dtype)
        if self._own_product:  # in one piece, at the speed of many rows: a row's bits are its own there
            products.logits_product(rows, self.weight, self.bias, self._buffer[:count])
            return rows, self._buffer[:count]
        self._hidden[count:padded].zero_()
        for start in range(0, padded, self.plan.block):
            block = slice(start, start + self.plan.block)
            self._logits_product(self._hidden[block], self._buffer[block])
        return rows, self._buffer[:count]

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

    def factor(self, gradient: Tensor) -> Tensor:
        """The gradient of the logits in the products' dtype."""
        if not self.mixed:
            return gradient
        if self._rounded is None:
            self._rounded = padded_rows(self.weight, self.capacity, self.vocab, self.plan.stride)
        return self._rounded[: gradient.shape[0]].copy_(gradient)

    def back_to_hidden(self, gradient: Tensor, out: Tensor, where: Rows) -> None:
        """``out[where] = gradient @ weight``; `out` is (tokens, H). The chunk's hidden states are no longer needed."""
        widen = out.dtype != self.weight.dtype and out.dtype == torch.float32 and out.is_cuda
        if isinstance(where, slice) and (widen or out.dtype == self.weight.dtype):
            target = out[where]
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
        if isinstance(where, Tensor):
            out.index_copy_(0, where, target.to(out.dtype))
        elif target.dtype != out.dtype:
            out[where] = target


def _onednn_serves(weight: Tensor) -> bool:
    """fp32 on the CPU: torch.mm goes to MKL, which splits a block of few rows badly over threads. oneDNN, which torch
    takes for bf16 anyway, needed 0.75 of its time on one thread and 0.45 on two (128 x 576 x 49152, EPYC)."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class HeadGradient:
    """Sum over chunks of ``gradient.T @ hidden`` and of the gradient itself, in fp32 (fp64 for fp64).

    Args:
        weight, bias: what the gradients are of; None: not wanted.
        accumulate_into: (V,H) fp32 to which the gradient of the weight is added, and which is not returned then.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, accumulate_into: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._given = accumulate_into
        self._sum = accumulate_into
        self._lower: Tensor | None = None  # of fp32 sums in two planes; `_sum` is the upper one then
        self._bias_sum: Tensor | None = None

    def add(self, gradient: Tensor, rows: Tensor, factor: Tensor | None = None, *, last: bool = False) -> None:
        """factor: (rows,) of the gradient's rows, where it is not in them yet; `rows` has it already. last: nothing is
        added after this."""
        if self.weight is not None:
            self._add_product(gradient, rows, last)
        if self.bias is not None:
            if factor is None:
                total = gradient.sum(dim=0, dtype=statistics_dtype(gradient.dtype))
            else:
                total = weighted_rows(gradient, factor)
            self._bias_sum = total if self._bias_sum is None else self._bias_sum.add_(total)

    def _add_product(self, gradient: Tensor, right: Tensor, last: bool) -> None:
        assert self.weight is not None
        wide = statistics_dtype(right.dtype)
        left = gradient.t()
        if self._sum is None and last and self.weight.dtype == right.dtype:
            # A single product needs no wider sum: it accumulates in fp32 inside.
            self._sum = torch.mm(left, right)
        elif self._in_planes(gradient, right):
            first = self._sum is None
            if self._sum is None:
                self._sum, self._lower = right.new_empty(self.weight.shape), right.new_empty(self.weight.shape)
            assert self._lower is not None
            products.head_gradient(gradient, right, self._sum, self._lower, first=first, last=last)
            if last:
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
        """Whether the sum over several products is kept as two planes of 16 bits, whose upper one becomes the gradient:
        a third less memory than an fp32 sum with a rounded copy of it, and nearly half the traffic."""
        assert self.weight is not None
        if self._lower is not None:
            return True
        rounded = self.weight.dtype == right.dtype == torch.bfloat16
        aligned = right.shape[1] % 8 == 0  # the planes are dense, unlike the rows of `right`
        return self._sum is None and rounded and aligned and products.served(gradient, right)

    def results(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the dtypes of what they are of; empty tensors for those that were not wanted."""
        nothing = like.new_empty(0)
        of_weight, of_bias = nothing, nothing
        if self.weight is not None and self._given is None:
            assert self._lower is None, "the last product was not announced"
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


def drop_rows(keep: Tensor, where: Rows, *buffers: Tensor) -> tuple[Rows, int]:
    """Moves the kept rows of the buffers to their front; returns where these rows belong, and their number.

    For the CPU, where a count costs nothing. No more rows are moved than are dropped.
    """
    count = int(keep.sum())
    total = keep.numel()
    if total - count <= total // 16:  # hardly worth the moving
        return where, total
    holes = torch.nonzero(~keep[:count]).flatten()
    movers = torch.nonzero(keep[count:]).flatten() + count
    order = torch.arange(count, device=keep.device)
    order[holes] = movers
    for buffer in buffers:
        buffer.index_copy_(0, holes, buffer.index_select(0, movers))
    index = torch.arange(where.start, where.stop, device=keep.device) if isinstance(where, slice) else where
    return index[order], count
