"""The loops over chunks of rows on the probability route; what `chunks` has for logits.

The coefficients of a loss meet a chunk as one factor per row, on tensors of ``[rows, H]``: E itself is never touched
again, so a row's derivative, its gradient and any later multiple of them cost the same two products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext.linear.chunks import put
from grpo_ext.linear.head import HeadGradient
from grpo_ext.linear.probabilities import Chunk, Probabilities
from grpo_ext.linear.rows import row_chunks, sequence_chunks


def log_probabilities(work: Probabilities, derivative: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fills ``work.logps`` and ``work.entropy``.

    Args:
        derivative: form dlogp/dhidden of the active rows on the way. keep: hand out E of all selected rows; only where
            they fit into one chunk.

    Returns:
        The factors of E per token and what rounding its target's element has left over, 0 where E is not kept;
        dlogp/dhidden (tokens, H); E (rows, V).
    """
    jacobian = work.hidden_gradient() if derivative else work.hidden.new_empty(0)
    factors, residuals, kept = work.per_token(), work.per_token(), work.hidden.new_empty(0)
    for start, end in row_chunks(work.selection.count, work.capacity):
        active = min(max(work.selection.active - start, 0), end - start) if derivative else 0
        chunk = work.chunk(start, end, end - start if keep else active)
        if active:
            work.back_to_hidden(chunk.first(active), chunk.factor[:active], jacobian)
        if keep:
            put(factors, chunk.where, chunk.factor)
            put(residuals, chunk.where, chunk.residual)
            kept = chunk.probabilities
    return factors, residuals, work.finish_hidden(jacobian) if derivative else jacobian, kept


def gradients(
    work: Probabilities,
    coef: Tensor,
    head_gradient: HeadGradient,
    wants_hidden: bool,
    kept: Tensor | None,
    factors: Tensor,
    residuals: Tensor,
) -> Tensor:
    """Gradients for given coefficients of the log probabilities, from E made once more (or `kept`, with `factors` and
    `residuals`)."""
    dhidden = work.hidden_gradient() if wants_hidden else work.hidden.new_empty(0)
    coef = coef.reshape(-1)
    for start, end in row_chunks(work.selection.count, work.capacity):
        if kept is None:
            chunk = work.chunk(start, end, end - start)
        else:
            where = work.selection.positions(start, end)
            own = factors.reshape(-1)[where], work.own_columns(where), residuals.reshape(-1)[where]
            chunk = Chunk(where, work.gather(where, end - start), kept, *own)
        last = end == work.selection.count
        _products(work, chunk, chunk.factor * coef[chunk.where], head_gradient, last, dhidden, wants_hidden)
    return work.finish_hidden(dhidden) if wants_hidden else dhidden


def loss_gradients(
    work: Probabilities,
    tensors: PolicyTensors,
    spec: list[float],
    own_row: bool,
    sequence_lengths: list[int] | None,
    head_gradient: HeadGradient,
    wants_hidden: bool,
) -> Tensor:
    """Gradients of a loss whose coefficients follow from a chunk's own rows. Returns that of the hidden states.

    Args:
        own_row: a token's depends on no other row's logits, so the fold of a chunk's sums has it; otherwise the policy
            stage on all tokens (those not seen yet count for nothing) comes between.
        sequence_lengths: rows of each completion among the active ones, where chunks must hold whole completions.
    """
    dhidden = work.hidden_gradient() if wants_hidden else work.hidden.new_empty(0)
    active, count = work.selection.active, work.selection.count
    if sequence_lengths is None:
        chunks = row_chunks(count, work.capacity)
    else:
        chunks = sequence_chunks(sequence_lengths, work.capacity)
        chunks += [(active + s, active + e) for s, e in row_chunks(count - active, work.capacity)]
    shape = tensors.mask.shape
    if own_row:
        work.take_coefficients(tensors, spec)
    for start, end in chunks:
        with_gradient = min(max(active - start, 0), end - start)
        chunk = work.chunk(start, end, with_gradient)
        if not with_gradient:
            continue
        chunk = chunk.first(with_gradient)
        factor = chunk.factor
        if not own_row:
            now = work.logps.view(shape), work.entropy.view(shape)
            _, coef, *_ = torch.ops.grpo_ext.policy_loss(*now, *tensors, spec)
            factor = factor * coef.view(-1)[chunk.where]
        _products(work, chunk, factor, head_gradient, end >= active, dhidden, wants_hidden)
    return work.finish_hidden(dhidden) if wants_hidden else dhidden


def _products(
    work: Probabilities,
    chunk: Chunk,
    factor: Tensor,
    head_gradient: HeadGradient,
    last: bool,
    dhidden: Tensor,
    wants_hidden: bool,
) -> None:
    rows = chunk.hidden if head_gradient.weight is None else work.scaled_hidden(chunk, factor)
    head_gradient.add(chunk.probabilities, rows, factor, last=last)
    if wants_hidden:
        work.back_to_hidden(chunk, factor, dhidden)
