"""Which rows of a call are looked at, and in which order."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext.config import LossConfig


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of a call: first the ``active`` ones, whose gradient may differ from 0, then the other unmasked ones."""

    index: Tensor | None  # (count,) int64 into the flattened tokens; None: all of them, in order
    count: int
    active: int
    exact: bool  # no masked row is among them

    def positions(self, start: int, end: int) -> Tensor | slice:
        return slice(start, end) if self.index is None else self.index[start:end]


def select_rows(mask: Tensor | None, active: Tensor | None, total: int, valid_rows: int | None = None) -> Selection:
    """Compacts ``total`` rows to those that count.

    Args:
        mask: bool, None = all rows. active: bool, None = as the mask.
        valid_rows: an upper bound on the number of unmasked rows that the caller knows. Then nothing waits for the
            device; with fewer unmasked rows than that, masked ones fill up (and are ignored); with more, an assertion
            on the device fails.

    Without it, one wait for two counts, unless neither mask nor activity is given. While a CUDA graph is recorded
    nobody can wait: all rows are taken then, masked ones are ignored.
    """
    if mask is None and active is None:
        return Selection(None, total, total, True)
    device = (mask if mask is not None else active).device  # type: ignore[union-attr]
    mask = torch.ones(total, dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
    active = mask if active is None else active.reshape(-1) & mask
    exact = False
    if valid_rows is not None:
        count = min(valid_rows, total)
        torch._assert_async(mask.sum() <= count, "valid_rows is less than the number of unmasked rows")
        counted_active = count
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        count = counted_active = total
    else:
        count, counted_active = torch.stack([mask.sum(), active.sum()]).tolist()
        exact = True
    if count == total and counted_active == total:
        return Selection(None, total, total, exact)
    return Selection(_order(mask, active)[:count], count, counted_active, exact)


def select_sequences(mask: Tensor, active: Tensor | None) -> tuple[Selection, list[int]]:
    """The same for (B,T) tokens, where completions stay whole; also the rows of each active completion."""
    active = mask if active is None else mask & active.any(dim=1, keepdim=True)
    counts = torch.cat([mask.sum().unsqueeze(0), active.sum(dim=1)]).tolist()
    lengths = counts[1:]
    order = _order(mask.flatten(), active.flatten())
    return Selection(order[: counts[0]], counts[0], sum(lengths), True), lengths


def _order(mask: Tensor, active: Tensor) -> Tensor:
    return torch.argsort(2 - mask.to(torch.uint8) - active.to(torch.uint8), stable=True)


def sequence_chunks(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """Row ranges of whole sequences, each at most `capacity` rows; every length is at most that."""
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


def row_chunks(count: int, capacity: int) -> list[tuple[int, int]]:
    return [(start, min(start + capacity, count)) for start in range(0, count, max(capacity, 1))]


def active_tokens(config: LossConfig, tensors: PolicyTensors) -> Tensor | None:
    """(B,T) bool: where the gradient may differ from 0, from what is known before any logit; None = everywhere.

    An advantage (or a given weight) of 0 removes the policy term; a KL term or an entropy bonus stays. At sequence
    level the tokens of a completion share one ratio, so one of them with an advantage keeps all.
    """
    if config.beta != 0 or config.entropy_coef != 0:
        return None
    active = tensors.advantages != 0
    weights = tensors.importance_weights
    if weights is not None and config.loss_type != "vespo":
        if weights.dim() > active.dim():
            active = active.unsqueeze(1)
        elif active.dim() > weights.dim():
            weights = weights.unsqueeze(1)
        active = active & (weights != 0)
    if active.dim() == 1:
        active = active.unsqueeze(1)
    if config.importance_sampling_level == "sequence":
        active = (active & tensors.mask).any(dim=1, keepdim=True)
    return active.expand(tensors.mask.shape)
