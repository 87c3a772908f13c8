"""The tensors of a micro-batch, and functions that pad token lists to tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class MicroBatch:
    """B rows, padded to their longest prompt P and their longest completion T.

    Attributes:
        prompt_ids, prompt_mask: ``(B, P)`` int64, left-padded.
        first_row_of_prompt: ``(u,)`` int64, the first row of each distinct prompt.
        prompt_index: ``(B,)`` int64, the number of each row's prompt, an index into ``first_row_of_prompt``.
        completion_ids, completion_mask: ``(B, T)`` int64, right-padded; the mask is 0 at padding.
        loss_mask: ``(B, T)`` int64, 1 at the tokens of the loss.
        advantages: ``(B,)`` fp32.
        old_logps, ref_logps, sampling_logps: ``(B, T)`` fp32 or None.
        normaliser: the loss's ``num_items_in_batch``, divisor of the losses that SPEC section 3 normalises by tokens.
        weight: factor on the loss that accounts for skipped rows, see `kept_rows_weight`.
        known_lengths: tokens of each prompt and of each completion; None computes them in `lengths`.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    first_row_of_prompt: Tensor
    prompt_index: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor
    advantages: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    normaliser: float | None = None
    weight: float = 1.0
    known_lengths: tuple[list[int], list[int]] | None = None

    def lengths(self) -> tuple[list[int], list[int]]:
        """Return the tokens of each prompt and of each completion; host sync only if ``known_lengths`` is None."""
        if self.known_lengths is None:
            self.known_lengths = self.prompt_mask.sum(dim=1).tolist(), self.completion_mask.sum(dim=1).tolist()
        return self.known_lengths


def to_device(values: Tensor | Sequence[Any], device: torch.device | str) -> Tensor:
    """Copy host values to a device without a host sync: a CUDA copy from pageable memory waits for the stream."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return ``(ids, mask)``, both ``(n, longest)`` int64, with the padding before the tokens."""
    width = max(len(row) for row in rows)
    ids = to_device([[pad_id] * (width - len(row)) + list(row) for row in rows], device)
    mask = to_device([[0] * (width - len(row)) + [1] * len(row) for row in rows], device)
    return ids, mask


def right_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return ``(ids, mask)``, both ``(n, longest)`` int64, with the padding after the tokens."""
    width = max(len(row) for row in rows)
    ids = to_device([list(row) + [pad_id] * (width - len(row)) for row in rows], device)
    mask = to_device([[1] * len(row) + [0] * (width - len(row)) for row in rows], device)
    return ids, mask


def unique_rows(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return ``(first, which)``: the first row of each distinct value, and for each row its index into ``first``."""
    seen: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    which = []
    for index, row in enumerate(rows):
        key = tuple(row)
        if key not in seen:
            seen[key] = len(first)
            first.append(index)
        which.append(seen[key])
    return first, which
