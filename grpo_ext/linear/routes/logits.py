"""The logits route: row kernels overwrite a chunk of logits with the gradient of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext.linear.head import Head, drop_rows
from grpo_ext.linear.routes.base import Gradients, Route, Saved, put
from grpo_ext.linear.row_loss import RowLoss
from grpo_ext.linear.rows import Rows, rows_between
from grpo_ext.vocabulary.shards import VocabularyShard
from grpo_ext.vocabulary.statistics import Statistics, Vocabulary, WholeVocabulary


class LogitsChunk(NamedTuple):
    """A chunk whose tensors are views of the buffers of `Head`."""

    rows: Rows
    hidden: Tensor  # (rows, H) in the products' dtype
    product: Tensor  # (rows, V) logits, or their gradient
    ids: Tensor  # (rows,)
    unmasked: Tensor | None  # (rows,) bool; None: all of them
    stats: Statistics | None = None
    nonzero: Tensor | None = None  # (rows,) bool: rows whose gradient is not 0; None: unknown

    def part(self, start: int, stop: int) -> LogitsChunk:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        stats = self.stats and Statistics(*map(cut, self.stats))  # type: ignore[arg-type]
        rows = rows_between(self.rows, start, stop)
        return LogitsChunk._make([rows, *map(cut, self[1:5]), stats, cut(self.nonzero)])


class LogitsRoute(Route):
    fused_schedules = ("one_pass",)

    def _allocate(self) -> None:
        self.head = Head(self.inputs.weight, self.inputs.bias, self.numerics, self.selection.size)
        self.capacity = self.head.capacity
        transform = self.numerics.transform
        self.vocabulary: Vocabulary = WholeVocabulary(transform)
        if self.group is not None:
            self.vocabulary = VocabularyShard(transform, self.inputs.weight.shape[0], self.group)
        #: Kernel with which `forward` overwrites logits by their gradient; None: `forward` computes statistics only.
        self._overwrite: Callable[[LogitsChunk], tuple[Statistics, Tensor | None]] | None = None

    def differentiate_logps(self) -> None:
        vocabulary = self.vocabulary  # `self` in the lambda would be a reference cycle that keeps the buffers alive
        self._overwrite = lambda c: (vocabulary.derivative_(c.product, c.ids, c.unmasked), None)

    def differentiate_loss(self, tensors: PolicyTensors, spec: list[float]) -> None:
        row_loss = RowLoss(tensors, spec, self.numerics.transform)
        self._overwrite = lambda c: row_loss.overwrite(c.product, c.ids, c.unmasked, c.rows)

    def _chunk(self, start: int, end: int, saved_logits: Tensor | None = None) -> LogitsChunk:
        rows = self.selection.rows(start, end)
        ids, unmasked = self.ids[rows], self.unmasked(rows)
        hidden, logits = self.head.logits(self.hidden, rows, end - start, unmasked, saved_logits)
        return LogitsChunk(rows, hidden, logits, ids, unmasked)

    def forward(self, start: int, end: int, needed: int) -> LogitsChunk:
        chunk = self._chunk(start, end)
        if self.with_top1:
            self._put_top1(chunk)
        overwritten = 0 if self._overwrite is None else needed
        if self._overwrite is not None and overwritten:
            front = chunk.part(0, overwritten)
            stats, nonzero = self._overwrite(front)
            self._put(front.rows, stats)
            chunk = chunk._replace(nonzero=nonzero)
        if overwritten < end - start:
            rest = chunk.part(overwritten, end - start) if overwritten else chunk
            stats = self.vocabulary.statistics(rest.product, rest.ids, rest.unmasked, self.with_entropy)
            self._put(rest.rows, stats)
            chunk = chunk if overwritten else chunk._replace(stats=stats)
        return chunk

    def _put_top1(self, chunk: LogitsChunk) -> None:
        # Softcap and temperature keep the order of logits, a negative scale reverses it.
        greatest = chunk.product.argmin(1) if self.numerics.transform[0] < 0 else chunk.product.argmax(1)
        is_top1 = greatest == chunk.ids
        put(self.is_top1, chunk.rows, is_top1 if chunk.unmasked is None else is_top1 & chunk.unmasked)

    def _put(self, rows: Rows, stats: Statistics) -> None:
        put(self.logps, rows, stats.logps)
        if self.with_entropy and stats.entropy is not None:
            put(self.entropy, rows, stats.entropy)

    def rebuild(self, start: int, end: int, saved: Saved) -> LogitsChunk:
        chunk = self._chunk(start, end, saved.product)
        if saved.row_stats is None:
            stats = self.vocabulary.statistics(chunk.product, chunk.ids, chunk.unmasked, True)
        else:
            entropy = None if saved.entropy is None else saved.entropy.reshape(-1)[chunk.rows]
            stats = Statistics(saved.logps.reshape(-1)[chunk.rows], entropy, saved.row_stats[0].reshape(-1)[chunk.rows])
        return chunk._replace(stats=stats)

    def save(self, chunk: LogitsChunk, row_stats: Tensor) -> None:
        assert chunk.stats is not None
        assert chunk.stats.lse is not None
        put(row_stats[0], chunk.rows, chunk.stats.lse)

    def multiply(self, chunk: LogitsChunk, coef: Tensor, entropy_coef: Tensor | None) -> LogitsChunk:
        assert chunk.stats is not None
        coef = coef[chunk.rows]
        entropy_coef = None if entropy_coef is None else entropy_coef[chunk.rows]
        self.vocabulary.gradient_(chunk.product, chunk.ids, chunk.unmasked, chunk.stats, coef, entropy_coef)
        return chunk._replace(nonzero=None if chunk.product.is_cuda or entropy_coef is not None else coef != 0)

    def accumulate(self, chunk: LogitsChunk, gradients: Gradients, *, is_last: bool = False) -> None:
        rows, X, Z = chunk.rows, chunk.hidden, chunk.product
        if chunk.nonzero is not None:  # on the CPU only, where counting rows is no host sync
            rows, count = drop_rows(chunk.nonzero, rows, Z, X)
            X, Z = X[:count], Z[:count]
        gradient = self.head.in_compute_dtype(Z)
        gradients.head.add(gradient, X, is_last=is_last)
        if gradients.hidden is not None:
            self.head.back_to_hidden(gradient, gradients.hidden, rows)
