"""The probability route: the product with the head stores ``E = exp(z - z_target)`` instead of the logits z.

No pass over ``[tokens, V]`` remains. The product's epilogue sums E, the gradient's products read E unchanged, and a
row's coefficient is multiplied into tensors of ``[tokens, H]``. A tile of E whose sum would reach 2^64 is *recentred*:
its greatest exponent takes the place of z_target. Method and errors: docs/inside/probabilities.md.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops import probability
from grpo_ext._ops.probability import TILE_COLUMNS, ChunkRows
from grpo_ext.linear.head import padded_rows
from grpo_ext.linear.plan import ChunkPlan, Numerics, chunk_plan, row_stride
from grpo_ext.linear.routes import probabilities_reference
from grpo_ext.linear.routes.base import Gradients, Route, Saved, put
from grpo_ext.linear.rows import Rows, copy_rows, rows_between
from grpo_ext.vocabulary.shards import all_gather, shard_sizes

#: Default memory budget in bytes: 4096 rows of 151,936 bf16 probabilities at H = 4096, and the other buffers.
DEFAULT_BUDGET = 1280 << 20

#: The number of rows of a chunk is a multiple of this, the height of a tile.
ROW_STEP = 128

#: Bytes of a chunk's hidden states if no E is stored: they stay in L2, where the tiles of the head reread them.
HIDDEN_BYTES = 32 << 20

#: Bytes of the fp32 buffer for ``E @ weight``, which holds a few thousand rows before they are scaled.
PRODUCT_BYTES = 32 << 20


def probability_plan(
    vocab: int, hidden_size: int, numerics: Numerics, device_type: str, needs_products: bool = True
) -> ChunkPlan:
    """Return the rows per chunk within the budget, which covers E, hidden states, partial sums and fp32 product.

    There are at least as many as on the logits route for the same budget, so completions that fit there fit here.
    Without ``needs_products`` no E is stored, and a chunk has as many rows as keep their hidden states in L2.
    """
    itemsize = numerics.compute_dtype.itemsize
    stride = row_stride(vocab)
    sums = 12 * -(-vocab // TILE_COLUMNS)
    per_row = (stride + hidden_size) * itemsize + sums
    fixed_bytes = PRODUCT_BYTES if device_type == "cuda" else 0
    budget = numerics.memory_budget or DEFAULT_BUDGET
    fitting = max(0, budget - fixed_bytes) // per_row
    if device_type != "cuda" and not numerics.memory_budget:
        fitting = 0
    of_logits = chunk_plan(
        vocab, hidden_size, numerics.compute_dtype, numerics.logits_dtype, device_type, numerics.memory_budget
    )
    step = ROW_STEP if fitting < 2 * ROW_STEP else 2 * ROW_STEP  # CTAs take tiles in pairs
    rows = max(fitting // step * step, of_logits.rows)
    if not needs_products and device_type == "cuda":
        hidden_row = hidden_size * itemsize
        hidden_bytes = min(HIDDEN_BYTES, budget * hidden_row // (hidden_row + sums))
        rows = max(rows, hidden_bytes // hidden_row // ROW_STEP * ROW_STEP)
    return ChunkPlan(min(rows, ROW_STEP), rows, stride)


class ProbabilityChunk(NamedTuple):
    """A chunk whose first `needed` rows have an E. ``factor * E`` is dlogp/dlogits, or the gradient of the logits."""

    rows: Rows
    hidden: Tensor  # (rows, H) in the products' dtype
    product: Tensor  # (needed, V) E; the target's element is minus the sum of the row's others
    factor: Tensor  # (needed,)
    target: Tensor  # (needed,) int32 column of the target on this rank; -1: another rank has it
    residual: Tensor  # (needed,) rounding error of the target's element of E

    def part(self, start: int, stop: int) -> ProbabilityChunk:
        return ProbabilityChunk(rows_between(self.rows, start, stop), *(t[start:stop] for t in self[1:]))


class ProbabilityRoute(Route):
    fused_schedules = ("one_pass", "three_pass")

    def _allocate(self) -> None:
        dtype = self.numerics.statistics_dtype
        self.weight, bias = self.inputs.weight, self.inputs.bias
        if self.weight.dtype != self.numerics.compute_dtype:  # dense, as `choose_route` assumes of a copy
            self.weight = self.weight.to(self.numerics.compute_dtype, memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.vocab, self.hidden_size = self.weight.shape
        scale, _, temperature = self.numerics.transform
        self.slope = scale / temperature  # d(processed logit) / d(raw logit)
        device = self.weight.device.type
        stores = self.needs_products or self.with_top1
        plan = probability_plan(self.vocab, self.hidden_size, self.numerics, device, stores)
        self.capacity = min(plan.rows, -(-self.selection.size // plan.block) * plan.block)
        self.shard: Tensor | None = None  # (2,) int64: first token of this rank, size of the whole vocabulary
        if self.group is not None:
            sizes = shard_sizes(self.vocab, self.group, self.weight.device)
            self.shard = torch.stack([sizes[: dist.get_rank(self.group)].sum(), sizes.sum()])
        self._kernels: ModuleType = probability if self.weight.is_cuda else probabilities_reference
        self._stride = plan.stride
        new = self.weight.new_empty
        tiles = -(-self.vocab // TILE_COLUMNS)
        self._partials = new((tiles, self.capacity, 2), dtype=dtype)
        self._recentred = new((tiles, self.capacity), dtype=dtype)  # references of recentred tiles
        self._reference, self._factor, self._residual = (new(self.capacity, dtype=dtype) for _ in range(3))
        self._target = new(self.capacity, dtype=torch.int32)
        #: What ranks exchange for n rows: 2 n sums, n references, and n exponents of targets, one after the other.
        self._rank_message = new(4 * self.capacity, dtype=dtype)
        #: dLoss/dlogp, which `forward` multiplies into `factor` if set.
        self._coefficients: probability.RowCoefficients | probabilities_reference.RowCoefficients | None = None
        self._probability_buffer: Tensor | None = None
        self._hidden_buffer: Tensor | None = None
        self._product_buffer: Tensor | None = None

    @property
    def _writes_hidden_dtype(self) -> bool:
        """See `Route`. The scaling kernel writes the dtype of the products or of the statistics, and no third one."""
        return self.group is None and self.hidden.dtype == self.weight.dtype

    def differentiate_logps(self) -> None:
        """No-op: ``factor * E`` of `forward` is dlogp/dlogits."""

    def differentiate_loss(self, tensors: PolicyTensors, spec: list[float]) -> None:
        self._coefficients = self._kernels.row_coefficients(tensors, spec)

    def forward(self, start: int, end: int, needed: int) -> ProbabilityChunk:
        count = end - start
        rows = self.selection.rows(start, end)
        chunk_rows = self._chunk_rows(rows, slice(0, count))
        # The kernel gathers rows itself if the product can read the hidden states without a conversion.
        gathers = self._readable_in_place() and (self.mask is not None or isinstance(rows, Tensor))
        X = self._buffer(count) if gathers else self._gather(rows, count)
        reference, target = self._reference[:count], self._target[:count]
        exponent = self._rank_message[3 * count : 4 * count]
        self._kernels.target_reference(
            chunk_rows, self.hidden if gathers else X, X if gathers else None, self.weight, self.bias, self.ids,
            self.slope, self.shard, reference, target, exponent,
        )  # fmt: skip
        if self.group is not None:
            dist.all_reduce(reference, group=self.group)  # 0 except on the target's rank
        stored = count if self.with_top1 else needed
        E = self._probabilities(stored)
        for part in (slice(0, stored), slice(stored, count)):
            if part.start < part.stop:
                self._kernels.product(
                    X[part], self.weight, self.bias, reference[part], target[part], self.slope,
                    E if part.start < stored else None, self._partials[:, part], self._recentred[:, part],
                    exponent[part],
                )  # fmt: skip
        partials, recentred = self._partials[:, :count], self._recentred[:, :count]
        if self.with_top1:
            put(self.is_top1, rows, _is_top1(E, target, exponent, partials))
            E = E[:needed]
        factor, residual = self._factor[:count], self._residual[:count]
        outputs = self.logps, self.entropy, factor, residual, E if needed else None, self.weight.dtype
        rank = -1
        if self.group is not None:
            sums = self._rank_message[: 2 * count].view(count, 2), self._rank_message[2 * count : 3 * count]
            self._kernels.fold(
                chunk_rows, partials, recentred, reference, exponent, target, self.slope, sums, *outputs, None
            )  # fmt: skip
            rank, all_ranks = dist.get_rank(self.group), all_gather(self._rank_message[: 4 * count], self.group)
            partials, recentred = all_ranks[:, : 2 * count].view(-1, count, 2), all_ranks[:, 2 * count : 3 * count]
            exponent = all_ranks[:, 3 * count :].sum(dim=0)  # 0 except on the target's rank
        self._kernels.fold(
            chunk_rows, partials, recentred, reference, exponent, target, self.slope, None, *outputs,
            self._coefficients, rank,
        )  # fmt: skip
        return ProbabilityChunk(rows, X, E, factor[:needed], target[:needed], residual[:needed])

    def rebuild(self, start: int, end: int, saved: Saved) -> ProbabilityChunk:
        if saved.product is None or saved.row_stats is None:
            return self.forward(start, end, end - start)
        rows = self.selection.rows(start, end)
        factor, residual = (statistic.reshape(-1)[rows] for statistic in saved.row_stats)
        hidden, target = self._gather(rows, end - start), self._target_columns(rows)
        return ProbabilityChunk(rows, hidden, saved.product, factor, target, residual)

    def save(self, chunk: ProbabilityChunk, row_stats: Tensor) -> None:
        if chunk.factor.numel():  # only with a saved E
            put(row_stats[0], chunk.rows, chunk.factor)
            put(row_stats[1], chunk.rows, chunk.residual)

    def multiply(self, chunk: ProbabilityChunk, coef: Tensor, entropy_coef: Tensor | None) -> ProbabilityChunk:
        assert entropy_coef is None, "`choose_route` sends the gradient of an entropy to the logits route"
        return chunk._replace(factor=chunk.factor * coef[chunk.rows])

    def accumulate(self, chunk: ProbabilityChunk, gradients: Gradients, *, is_last: bool = False) -> None:
        hidden = chunk.hidden
        if gradients.head.weight is not None:
            hidden = self._buffer(chunk.factor.numel())
            self._kernels.scaled_hidden(chunk.hidden, chunk.factor, hidden)
        gradients.head.add(chunk.product, hidden, chunk.factor, is_last=is_last)
        if gradients.hidden is not None:
            self._back_to_hidden(chunk, gradients.hidden)

    def _back_to_hidden(self, chunk: ProbabilityChunk, out: Tensor) -> None:
        """``out[rows] = factor * (E @ weight)``, with the target's element of E unrounded."""
        count = chunk.factor.numel()
        step = max(1, PRODUCT_BYTES // (4 * self.hidden_size)) if out.is_cuda else max(count, 1)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            product = self._times_weight(chunk.product[part])
            self._kernels.scale(
                self._chunk_rows(chunk.rows, part), product, chunk.factor[part], chunk.residual[part],
                chunk.target[part], self.weight, out,
            )  # fmt: skip

    def _times_weight(self, E: Tensor) -> Tensor:
        """Return ``E @ weight`` in the statistics' dtype; on a GPU in a buffer that the next call overwrites."""
        dtype = self.numerics.statistics_dtype
        if not E.is_cuda:
            return torch.mm(E.to(dtype), self.weight.to(dtype))
        if self._product_buffer is None:
            rows = min(self.capacity, max(1, PRODUCT_BYTES // (4 * self.hidden_size)))
            self._product_buffer = self.weight.new_empty((rows, self.hidden_size), dtype=dtype)
        return torch.mm(E, self.weight, out_dtype=dtype, out=self._product_buffer[: E.shape[0]])

    def _readable_in_place(self) -> bool:
        """Whether the products can read the hidden states without a copy."""
        hidden = self.hidden
        return hidden.dtype == self.weight.dtype and hidden.is_contiguous() and hidden.data_ptr() % 16 == 0

    def _gather(self, rows: Rows, count: int) -> Tensor:
        """Return rows of hidden states in the products' dtype, with zeros in masked rows; a view if possible."""
        if isinstance(rows, slice) and self.mask is None and self._readable_in_place():
            return self.hidden[rows]
        X = self._buffer(count)
        copy_rows(self.hidden, rows, self.unmasked(rows), X)
        return X

    def _target_columns(self, rows: Rows) -> Tensor:
        """Return (rows,) int32: the column of each row's target on this rank; -1 if another rank has it."""
        column = self.ids[rows] if self.shard is None else self.ids[rows] - self.shard[0]
        return torch.where((column >= 0) & (column < self.vocab), column, -1).int()

    def _chunk_rows(self, rows: Rows, part: slice) -> ChunkRows:
        count = part.stop - part.start
        if isinstance(rows, slice):
            return ChunkRows(count, rows.start + part.start, None, self.mask)
        return ChunkRows(count, 0, rows[part], self.mask)

    def _buffer(self, count: int) -> Tensor:
        if self._hidden_buffer is None:
            self._hidden_buffer = self.weight.new_empty((self.capacity, self.hidden_size))
        return self._hidden_buffer[:count]

    def _probabilities(self, needed: int) -> Tensor:
        if needed and self._probability_buffer is None:
            self._probability_buffer = padded_rows(self.weight, self.capacity, self.vocab, self._stride)
        if self._probability_buffer is None:
            return self.weight.new_empty((0, self.vocab))
        return self._probability_buffer[:needed]


def _is_top1(E: Tensor, target: Tensor, exponent: Tensor, partials: Tensor) -> Tensor:
    """Return (rows,) bool: whether the row's target has the first greatest E, after `product` and before `fold`.

    The target's element, 0 until then, becomes its exponential. In a row with a recentred tile the target is not the
    greatest: that tile holds a far greater logit.
    """
    column = target.long()
    E.scatter_(1, column.clamp(min=0).unsqueeze(1), exponent.exp2().to(E.dtype).unsqueeze(1))
    return (E.argmax(1) == column) & (partials[..., 0] >= 0).all(0)
