"""The logits route: row kernels turn a chunk of logits into its own gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext.linear.head import Head, drop_rows
from grpo_ext.linear.routes.base import Gradients, Inputs, Route, Saved, put
from grpo_ext.linear.row_loss import RowLoss
from grpo_ext.linear.rows import Rows, Selection, rows_between
from grpo_ext.vocabulary.shards import VocabularyShard
from grpo_ext.vocabulary.statistics import Statistics, Vocabulary, WholeVocabulary


class LogitsChunk(NamedTuple):
    """A chunk, in the buffers of `Head`."""

    rows: Rows
    hidden: Tensor  # (rows, H) in the products' dtype
    product: Tensor  # (rows, V) logits, or their gradient
    ids: Tensor  # (rows,)
    unmasked: Tensor | None  # (rows,) bool; None: all of them
    stats: Statistics | None = None
    nonzero: Tensor | None = None  # (rows,) bool: rows with a gradient; None: not known

    def part(self, start: int, stop: int) -> LogitsChunk:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        stats = self.stats and Statistics(*map(cut, self.stats))  # type: ignore[arg-type]
        rows, hidden, product, ids = rows_between(self.rows, start, stop), self.hidden, self.product, self.ids
        return LogitsChunk(
            rows, hidden[start:stop], product[start:stop], ids[start:stop], cut(self.unmasked), stats, cut(self.nonzero)
        )


class LogitsRoute(Route):
    fused_schedules = ("one_pass",)

    def __init__(
        self, inputs: Inputs, mask: Tensor | None, selection: Selection, with_entropy: bool = True, stores: bool = True
    ) -> None:
        super().__init__(inputs, mask, selection, with_entropy)
        self.head = Head(inputs.weight, inputs.bias, self.numerics, selection.size)
        self.capacity = self.head.capacity
        transform = self.numerics.transform
        self.vocabulary: Vocabulary = WholeVocabulary(transform)
        if self.group is not None:
            self.vocabulary = VocabularyShard(transform, inputs.weight.shape[0], self.group)
        #: Overwrites logits with a gradient that is known within the same pass.
        self._overwrite: Callable[[LogitsChunk], tuple[Statistics, Tensor | None]] | None = None

    def differentiate_logps(self) -> None:
        vocabulary = self.vocabulary  # a reference to `self` would be a cycle, which keeps the buffers
        self._overwrite = lambda c: (vocabulary.derivative_(c.product, c.ids, c.unmasked), None)

    def differentiate_loss(self, tensors: PolicyTensors, spec: list[float]) -> None:
        row_loss = RowLoss(tensors, spec, self.numerics.transform)
        self._overwrite = lambda c: row_loss.overwrite(c.product, c.ids, c.unmasked, c.rows)

    def _chunk(self, start: int, end: int, kept: Tensor | None = None) -> LogitsChunk:
        rows = self.selection.rows(start, end)
        ids, unmasked = self.ids[rows], self.unmasked(rows)
        return LogitsChunk(rows, *self.head.logits(self.hidden, rows, end - start, unmasked, kept), ids, unmasked)

    def forward(self, start: int, end: int, needed: int) -> LogitsChunk:
        chunk = self._chunk(start, end)
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

    def _put(self, rows: Rows, stats: Statistics) -> None:
        put(self.logps, rows, stats.logps)
        if self.with_entropy and stats.entropy is not None:
            put(self.entropy, rows, stats.entropy)

    def again(self, start: int, end: int, saved: Saved) -> LogitsChunk:
        chunk = self._chunk(start, end, saved.product)
        if saved.rows is None:
            stats = self.vocabulary.statistics(chunk.product, chunk.ids, chunk.unmasked, True)
        else:
            entropy = None if saved.entropy is None else saved.entropy.reshape(-1)[chunk.rows]
            stats = Statistics(saved.logps.reshape(-1)[chunk.rows], entropy, saved.rows[0].reshape(-1)[chunk.rows])
        return chunk._replace(stats=stats)

    def save(self, chunk: LogitsChunk, rows: Tensor) -> None:
        assert chunk.stats is not None
        assert chunk.stats.lse is not None
        put(rows[0], chunk.rows, chunk.stats.lse)

    def multiply(self, chunk: LogitsChunk, coef: Tensor, entropy_coef: Tensor | None) -> LogitsChunk:
        assert chunk.stats is not None
        coef = coef[chunk.rows]
        entropy_coef = None if entropy_coef is None else entropy_coef[chunk.rows]
        self.vocabulary.gradient_(chunk.product, chunk.ids, chunk.unmasked, chunk.stats, coef, entropy_coef)
        return chunk._replace(nonzero=None if chunk.product.is_cuda or entropy_coef is not None else coef != 0)

    def accumulate(self, chunk: LogitsChunk, gradients: Gradients, *, is_last: bool = False) -> None:
        rows, X, Z = chunk.rows, chunk.hidden, chunk.product
        if chunk.nonzero is not None:  # on the CPU, where counting needs no wait
            rows, count = drop_rows(chunk.nonzero, rows, Z, X)
            X, Z = X[:count], Z[:count]
        left = self.head.left_factor(Z)
        gradients.head.add(left, X, is_last=is_last)
        if gradients.hidden is not None:
            self.head.back_to_hidden(left, gradients.hidden, rows)
