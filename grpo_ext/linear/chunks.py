"""The loops over chunks of rows: log probabilities, their derivative by the hidden states, gradients of a loss.

Nothing here is ``(tokens, V)``: a chunk's logits live in one buffer, become their own gradient there, and are gone when
the next chunk comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops import statistics_dtype
from grpo_ext.linear.head import Head, HeadGradient, Rows, drop_rows
from grpo_ext.linear.plan import ChunkPlan, chunk_plan
from grpo_ext.linear.policy import RowPolicy
from grpo_ext.linear.rows import Selection, row_chunks, sequence_chunks
from grpo_ext.vocabulary.shards import VocabularyShard, resolve_group, sum_over_ranks
from grpo_ext.vocabulary.statistics import Statistics, Vocabulary, WholeVocabulary, kernels


class Numerics(NamedTuple):
    """How logits are made of hidden states; passes through operators as plain values."""

    transform: list[float]
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    memory_budget: int  # bytes; 0: the default
    group: str  # name of the process group that shares the vocabulary; empty: none

    def plan(self, weight: Tensor) -> ChunkPlan:
        vocab, hidden_size = weight.shape
        return chunk_plan(
            vocab, hidden_size, self.compute_dtype, self.logits_dtype, weight.device.type, self.memory_budget
        )

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.logits_dtype)


class Tokens:
    """What all loops need: tokens flattened to rows, which of them count, outputs per token."""

    def __init__(
        self, hidden: Tensor, ids: Tensor, mask: Tensor | None, selection: Selection, numerics: Numerics
    ) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        # The kernels read dense memory: one dimension, or one sequence, would stay a view with a stride.
        self.ids = ids.reshape(-1).contiguous()
        self.selection = selection
        self.numerics = numerics
        self.group = resolve_group(numerics.group)
        # Masked rows are among the selected ones only where their number was not counted.
        self.mask = None if mask is None else mask.reshape(-1).contiguous()

    def live(self, where: Rows) -> Tensor | None:
        return None if self.mask is None else self.mask[where]

    def per_token(self) -> Tensor:
        return torch.zeros(self.ids.shape, dtype=self.numerics.statistics_dtype, device=self.ids.device)

    def hidden_gradient(self) -> Tensor:
        """(tokens, H) of zeros; fp32 where the shares of several ranks are still to be added."""
        dtype = self.hidden.dtype
        if self.group is not None and dtype != torch.float64:
            dtype = torch.float32
        return torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)

    def finish_hidden(self, gradient: Tensor) -> Tensor:
        if self.group is not None:
            gradient = sum_over_ranks(gradient, self.group)
        return gradient.to(self.hidden.dtype)


class Rowwise(Tokens):
    """With the head whose products leave logits, and the row kernels for its vocabulary."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        selection: Selection,
        numerics: Numerics,
    ) -> None:
        super().__init__(hidden, ids, mask, selection, numerics)
        self.head = Head(
            weight,
            bias,
            numerics.plan(weight),
            numerics.compute_dtype,
            numerics.logits_dtype,
            selection.count,
        )
        self.kernels: Vocabulary = WholeVocabulary(numerics.transform)
        if self.group is not None:
            self.kernels = VocabularyShard(numerics.transform, weight.shape[0], self.group)


def put(out: Tensor, where: Rows, values: Tensor) -> None:
    if isinstance(where, slice):
        out[where] = values
    else:
        out.index_copy_(0, where, values)


def join(first: Statistics, second: Statistics) -> Statistics:
    if second.logps.numel() == 0:
        return first
    return Statistics(*(torch.cat([a, b]) if a.numel() else a for a, b in zip(first, second, strict=True)))


def log_probabilities(
    work: Rowwise, with_entropy: bool, derivative: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, lse) per token, 0 where masked; dlogp/dhidden (tokens, H); the logits of all selected rows.

    Args:
        derivative: form dlogp/dhidden of the active rows on the way: backward then has to scale its rows only, whatever
            the upstream gradient; lse is left out.
        keep: hand out the logits; only where all rows fit into one chunk.
    """
    logps, entropy, lse = work.per_token(), work.per_token(), work.per_token()
    jacobian = work.hidden_gradient() if derivative else work.hidden.new_empty(0)
    kept = jacobian.new_empty(0)
    for start, end in row_chunks(work.selection.count, work.head.capacity):
        where = work.selection.positions(start, end)
        rows = end - start
        active = min(max(work.selection.active - start, 0), rows) if derivative else 0
        ids, live = work.ids[where], work.live(where)
        _, Z = work.head.logits(work.hidden, where, rows, live)
        if active:
            stats = work.kernels.derivative_(Z[:active], ids[:active], None if live is None else live[:active])
            own = slice(start, start + active) if isinstance(where, slice) else where[:active]
            work.head.back_to_hidden(work.head.factor(Z[:active]), jacobian, own)
        if active < rows:
            rest = work.kernels.statistics(
                Z[active:], ids[active:], None if live is None else live[active:], with_entropy
            )
            stats = join(stats, rest) if active else rest
        for out, values in zip((logps, entropy, lse), stats, strict=True):
            if values.numel() == rows:
                put(out, where, values)
        if keep:
            kept = Z
    if derivative:
        jacobian = work.finish_hidden(jacobian)
    return logps, entropy, lse, jacobian, kept


def gradients(
    work: Rowwise,
    stats: tuple[Tensor, Tensor, Tensor],
    coef: Tensor,
    entropy_coef: Tensor | None,
    head_gradient: HeadGradient,
    wants_hidden: bool,
    kept: Tensor | None,
) -> Tensor:
    """Gradients for given coefficients, from logits made once more (or `kept`). Returns that of the hidden states."""
    dhidden = work.hidden_gradient() if wants_hidden else work.hidden.new_empty(0)
    logps, entropy, lse = (t.reshape(-1) for t in stats)
    coef = coef.reshape(-1)
    entropy_coef = None if entropy_coef is None else entropy_coef.reshape(-1)
    for start, end in row_chunks(work.selection.count, work.head.capacity):
        where = work.selection.positions(start, end)
        ids, live = work.ids[where], work.live(where)
        X, Z = work.head.logits(work.hidden, where, end - start, live, kept)
        if lse.numel():
            own = Statistics(logps[where], entropy[where] if entropy.numel() else entropy, lse[where])
        else:
            own = work.kernels.statistics(Z, ids, live, True)
        of_entropy = None if entropy_coef is None else entropy_coef[where]
        work.kernels.gradient_(Z, ids, live, own, coef[where], of_entropy)
        keep = coef[where] != 0 if of_entropy is None else None
        last = end == work.selection.count
        _products(work, X, Z, where, keep, head_gradient, last, dhidden, wants_hidden)
    return work.finish_hidden(dhidden) if wants_hidden else dhidden


def loss_gradients(
    work: Rowwise,
    tensors: PolicyTensors,
    spec: list[float],
    row_policy: RowPolicy | None,
    sequence_lengths: list[int] | None,
    head_gradient: HeadGradient,
    wants_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities, entropies, and the gradients of a loss whose coefficients follow from a chunk's own rows.

    Args:
        row_policy: one pass over the logits makes statistics and gradient; None: statistics, the policy stage on all
            tokens (those not seen yet count for nothing), gradient.
        sequence_lengths: rows of each completion among the active ones, where chunks must hold whole completions.

    Returns:
        logps, entropy (tokens,), and the gradient of the hidden states.
    """
    logps, entropy = work.per_token(), work.per_token()
    dhidden = work.hidden_gradient() if wants_hidden else work.hidden.new_empty(0)
    active, count = work.selection.active, work.selection.count
    if sequence_lengths is None:
        chunks = row_chunks(count, work.head.capacity)
    else:
        chunks = sequence_chunks(sequence_lengths, work.head.capacity)
        chunks += [(active + s, active + e) for s, e in row_chunks(count - active, work.head.capacity)]
    for start, end in chunks:
        where = work.selection.positions(start, end)
        rows = end - start
        with_gradient = min(max(active - start, 0), rows)
        ids, live = work.ids[where], work.live(where)
        X, Z = work.head.logits(work.hidden, where, rows, live)
        own = slice(start, start + with_gradient) if isinstance(where, slice) else where[:with_gradient]
        keep: Tensor | None = None
        if row_policy is not None and with_gradient:
            first = None if live is None else live[:with_gradient]
            stats, keep = _one_pass(work, row_policy, Z[:with_gradient], ids[:with_gradient], first, own)
            if with_gradient < rows:
                last = None if live is None else live[with_gradient:]
                rest = work.kernels.statistics(Z[with_gradient:], ids[with_gradient:], last, True)
                stats = join(stats, rest)
        else:
            stats = work.kernels.statistics(Z, ids, live, True)
        put(logps, where, stats.logps)
        put(entropy, where, stats.entropy)
        if not with_gradient:
            continue
        G = Z[:with_gradient]
        if row_policy is None:
            shape = tensors.mask.shape
            _, coef, bonus, _, _ = kernels.policy_loss(logps.view(shape), entropy.view(shape), *tensors, spec)
            coef = coef.view(-1)[own]
            of_entropy = bonus.view(-1)[own] if bonus.numel() else None
            keep = coef != 0 if of_entropy is None else None
            first = None if live is None else live[:with_gradient]
            work.kernels.gradient_(G, ids[:with_gradient], first, stats.first(with_gradient), coef, of_entropy)
        _products(work, X[:with_gradient], G, own, keep, head_gradient, end >= active, dhidden, wants_hidden)
    return logps, entropy, work.finish_hidden(dhidden) if wants_hidden else dhidden


def _one_pass(
    work: Rowwise, policy: RowPolicy, Z: Tensor, ids: Tensor, live: Tensor | None, where: Rows
) -> tuple[Statistics, Tensor | None]:
    """Statistics, the gradient over Z and, on the CPU, which rows of it are not 0."""
    mask = torch.ones_like(ids, dtype=torch.bool) if live is None else live
    arguments = policy.rows(where, mask)
    axis = 1 if policy.as_column else 0
    _, logps, entropy, _, _ = kernels.row_loss_(
        Z.unsqueeze(axis), ids.unsqueeze(axis), *arguments, policy.spec, work.numerics.transform
    )
    keep = None
    if not Z.is_cuda:
        _, coef, bonus, _, _ = kernels.policy_loss(logps, entropy, *arguments, policy.spec)
        keep = coef.flatten() != 0 if not bonus.numel() else None
    return Statistics(logps.flatten(), entropy.flatten(), logps.new_empty(0)), keep


def _products(
    work: Rowwise,
    X: Tensor,
    Z: Tensor,
    where: Rows,
    keep: Tensor | None,
    head_gradient: HeadGradient,
    last: bool,
    dhidden: Tensor,
    wants_hidden: bool,
) -> None:
    """The products with a chunk's logits gradient; rows of zeros leave first where that costs no wait."""
    if keep is not None and not Z.is_cuda:
        where, count = drop_rows(keep, where, Z, X)
        X, Z = X[:count], Z[:count]
    gradient = work.head.factor(Z)
    head_gradient.add(gradient, X, last=last)
    if wants_hidden:
        work.head.back_to_hidden(gradient, dhidden, where)  # into the memory of X
