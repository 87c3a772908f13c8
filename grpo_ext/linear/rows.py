"""Which rows of a call enter the products, in which order, and in which chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext.config import LossConfig

Rows = Tensor | slice  # rows of the flattened tokens: int64 indices, or a range


def rows_between(rows: Rows, start: int, stop: int) -> Rows:
    """``rows[start:stop]``, also if ``rows`` is a range."""
    return slice(rows.start + start, rows.start + stop) if isinstance(rows, slice) else rows[start:stop]


def copy_rows(hidden: Tensor, rows: Rows, unmasked: Tensor | None, out: Tensor) -> None:
    """``out = hidden[rows]`` in the dtype of ``out``, with zeros in masked rows.

    Args:
        unmasked: (rows,) bool; None: all rows are unmasked.
    """
    if isinstance(rows, Tensor) and hidden.dtype == out.dtype:
        torch.index_select(hidden, 0, rows, out=out)
    else:
        out.copy_(hidden[rows])
    if unmasked is not None:  # a masked row may hold NaN, and 0 * NaN is NaN
        out.masked_fill_(~unmasked.unsqueeze(1), 0)


class Selection(NamedTuple):
    """The rows of a call: first those whose gradient may differ from 0, then the other unmasked ones."""

    indices: Tensor | None  # (size,) int64 into the flattened tokens; None: all tokens, in order
    size: int
    gradient_rows: int  # number of leading rows that may have a gradient
    excludes_masked: bool  # no masked row is selected

    def rows(self, start: int, end: int) -> Rows:
        return slice(start, end) if self.indices is None else self.indices[start:end]

    def gradient_rows_between(self, start: int, end: int) -> int:
        return min(max(self.gradient_rows - start, 0), end - start)


class RowArguments(NamedTuple):
    """An operator's row arguments: the masks, and the fields of a `Selection` if the rows are selected already."""

    mask: Tensor | None  # bool, shape of the ids; None: no row is masked
    gradient_mask: Tensor | None  # bool: rows whose gradient may differ from 0; None: all unmasked rows
    valid_rows: int | None  # upper bound on the number of unmasked rows; None: count them
    indices: Tensor | None = None
    gradient_rows: int | None = None  # None: the operator selects the rows
    excludes_masked: bool = False

    def select(self, total: int) -> tuple[Selection, Tensor | None]:
        """Return the selection among ``total`` rows, and the mask if it may include masked rows."""
        if self.gradient_rows is None:
            selection = select_rows(self.mask, self.gradient_mask, total, self.valid_rows)
        else:
            size = total if self.indices is None else self.indices.numel()
            selection = Selection(self.indices, size, self.gradient_rows, self.excludes_masked)
        return selection, None if selection.excludes_masked else self.mask


def select_rows(
    mask: Tensor | None, gradient_mask: Tensor | None, total: int, valid_rows: int | None = None
) -> Selection:
    """Select the rows of ``total`` that enter a product.

    Args:
        mask: bool; None: no row is masked. gradient_mask: bool; None: all unmasked rows.
        valid_rows: an upper bound on the number of unmasked rows. With it there is no host sync: masked rows fill the
            selection up to the bound and are ignored. More unmasked rows than the bound fail a device assert.

    Without the bound a host sync reads two counts, unless both masks are None. A CUDA graph capture cannot synchronize,
    so it selects all rows and ignores the masked ones.
    """
    if mask is None and gradient_mask is None:
        return Selection(None, total, total, True)
    device = (mask if mask is not None else gradient_mask).device  # type: ignore[union-attr]
    mask = torch.ones(total, dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
    gradient_mask = mask if gradient_mask is None else gradient_mask.reshape(-1) & mask
    excludes_masked = False
    if valid_rows is not None:
        count = min(valid_rows, total)
        torch._assert_async(mask.sum() <= count, "valid_rows is less than the number of unmasked rows")
        gradient_rows = count
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        count = gradient_rows = total
    else:
        count, gradient_rows = torch.stack([mask.sum(), gradient_mask.sum()]).tolist()
        excludes_masked = True
    if count == total and gradient_rows == total:
        return Selection(None, total, total, excludes_masked)
    return Selection(_order(mask, gradient_mask)[:count], count, gradient_rows, excludes_masked)


def select_sequences(mask: Tensor, gradient_mask: Tensor | None) -> tuple[Selection, list[int]]:
    """Select rows of (B,T) tokens so that completions stay whole; also return the gradient rows of each completion."""
    gradient_mask = mask if gradient_mask is None else mask & gradient_mask.any(dim=1, keepdim=True)
    counts = torch.cat([mask.sum().unsqueeze(0), gradient_mask.sum(dim=1)]).tolist()
    lengths = counts[1:]
    order = _order(mask.flatten(), gradient_mask.flatten())
    return Selection(order[: counts[0]], counts[0], sum(lengths), True), lengths


def _order(mask: Tensor, gradient_mask: Tensor) -> Tensor:
    return torch.argsort(2 - mask.to(torch.uint8) - gradient_mask.to(torch.uint8), stable=True)


def sequence_chunks(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """Return ranges of at most `capacity` rows that hold whole sequences; no length may exceed `capacity`."""
    chunks: list[tuple[int, int]] = []
    start = end = 0
    for length in lengths:
        if end + length - start > capacity:
            chunks.append((start, end))
            start = end
        end += length
    if end > start:
        chunks.append((start, end))
    return chunks


def row_chunks(count: int, capacity: int, start: int = 0) -> list[tuple[int, int]]:
    """Return ranges of at most `capacity` rows that cover ``[start, count)``."""
    step = max(capacity, 1)
    return [(first, min(first + step, count)) for first in range(start, count, step)]


def gradient_mask(config: LossConfig, tensors: PolicyTensors) -> Tensor | None:
    """Return (B,T) bool: tokens whose gradient may differ from 0, judged without logits; None: all tokens.

    An advantage or importance weight of 0 removes the policy term, but neither the KL term nor the entropy bonus. At
    sequence level the tokens of a completion share one ratio, so one nonzero advantage keeps the whole completion.
    """
    if config.beta != 0 or config.entropy_coef != 0:
        return None
    nonzero = tensors.advantages != 0
    weights = tensors.importance_weights
    if weights is not None and config.loss_type != "vespo":
        if weights.dim() > nonzero.dim():
            nonzero = nonzero.unsqueeze(1)
        elif nonzero.dim() > weights.dim():
            weights = weights.unsqueeze(1)
        nonzero = nonzero & (weights != 0)
    if nonzero.dim() == 1:
        nonzero = nonzero.unsqueeze(1)
    if config.importance_sampling_level == "sequence":
        nonzero = (nonzero & tensors.mask).any(dim=1, keepdim=True)
    return nonzero.expand(tensors.mask.shape)
