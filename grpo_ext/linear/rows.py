"""Which rows of a call enter the products, in which order, and in which chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext.config import LossConfig

Rows = Tensor | slice  # rows of the flattened tokens: int64 indices, or a range


def rows_between(rows: Rows, start: int, stop: int) -> Rows:
    """``rows[start:stop]``, of a range too."""
    return slice(rows.start + start, rows.start + stop) if isinstance(rows, slice) else rows[start:stop]


class Selection(NamedTuple):
    """The rows of a call: first those whose gradient may differ from 0, then the other unmasked ones."""

    indices: Tensor | None  # (size,) int64 into the flattened tokens; None: all of them, in order
    size: int
    gradient_rows: int  # how many of them may have a gradient
    exact: bool  # no masked row is among them

    def rows(self, start: int, end: int) -> Rows:
        return slice(start, end) if self.indices is None else self.indices[start:end]

    def gradient_rows_between(self, start: int, end: int) -> int:
        return min(max(self.gradient_rows - start, 0), end - start)


class RowArguments(NamedTuple):
    """Which rows an operator takes: those selected already, or the masks to select them by."""

    mask: Tensor | None  # bool, shape of the ids; None: all rows
    gradient_mask: Tensor | None  # bool, where a gradient may differ from 0; None: as the mask
    valid_rows: int | None  # bound on the unmasked rows
    indices: Tensor | None = None  # with the next two: a `Selection`
    gradient_rows: int | None = None  # None: select inside the operator
    exact: bool = False

    def select(self, total: int) -> tuple[Selection, Tensor | None]:
        """The selection among ``total`` rows, and the mask if masked rows may be in it."""
        if self.gradient_rows is None:
            selection = select_rows(self.mask, self.gradient_mask, total, self.valid_rows)
        else:
            size = total if self.indices is None else self.indices.numel()
            selection = Selection(self.indices, size, self.gradient_rows, self.exact)
        return selection, None if selection.exact else self.mask


def select_rows(
    mask: Tensor | None, gradient_mask: Tensor | None, total: int, valid_rows: int | None = None
) -> Selection:
    """Select the rows of ``total`` that enter a product.

    Args:
        mask: bool, None = all rows. gradient_mask: bool, None = as the mask.
        valid_rows: an upper bound on the number of unmasked rows. With it the host does not wait for the device: masked
            rows fill the selection up to the bound and are ignored. More unmasked rows than that fail a device assert.

    Without the bound the host waits once, for two counts, unless both masks are None. A CUDA graph capture cannot wait:
    all rows are selected then, and masked ones are ignored.
    """
    if mask is None and gradient_mask is None:
        return Selection(None, total, total, True)
    device = (mask if mask is not None else gradient_mask).device  # type: ignore[union-attr]
    mask = torch.ones(total, dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
    gradient_mask = mask if gradient_mask is None else gradient_mask.reshape(-1) & mask
    exact = False
    if valid_rows is not None:
        count = min(valid_rows, total)
        torch._assert_async(mask.sum() <= count, "valid_rows is less than the number of unmasked rows")
        gradient_rows = count
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        count = gradient_rows = total
    else:
        count, gradient_rows = torch.stack([mask.sum(), gradient_mask.sum()]).tolist()
        exact = True
    if count == total and gradient_rows == total:
        return Selection(None, total, total, exact)
    return Selection(_order(mask, gradient_mask)[:count], count, gradient_rows, exact)


def select_sequences(mask: Tensor, gradient_mask: Tensor | None) -> tuple[Selection, list[int]]:
    """Select rows of (B,T) tokens so that completions stay whole; also the rows of each with a gradient."""
    gradient_mask = mask if gradient_mask is None else mask & gradient_mask.any(dim=1, keepdim=True)
    counts = torch.cat([mask.sum().unsqueeze(0), gradient_mask.sum(dim=1)]).tolist()
    lengths = counts[1:]
    order = _order(mask.flatten(), gradient_mask.flatten())
    return Selection(order[: counts[0]], counts[0], sum(lengths), True), lengths


def _order(mask: Tensor, gradient_mask: Tensor) -> Tensor:
    return torch.argsort(2 - mask.to(torch.uint8) - gradient_mask.to(torch.uint8), stable=True)


def sequence_chunks(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """Row ranges of whole sequences, each of at most `capacity` rows; no length exceeds that."""
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
    """Ranges of at most `capacity` rows that cover ``[start, count)``."""
    step = max(capacity, 1)
    return [(first, min(first + step, count)) for first in range(start, count, step)]


def gradient_mask(config: LossConfig, tensors: PolicyTensors) -> Tensor | None:
    """(B,T) bool: where the gradient may differ from 0, as far as known before any logit; None = everywhere.

    An advantage (or a given weight) of 0 removes the policy term, not the KL term nor the entropy bonus. At sequence
    level the tokens of a completion share one ratio: one token with an advantage keeps the whole completion.
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
