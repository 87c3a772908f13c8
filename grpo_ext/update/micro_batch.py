"""Tensors of one micro-batch, and the padding that makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass
class MicroBatch:
    """B rows, trimmed to their longest prompt P and their longest completion T.

    Attributes:
        prompt_ids, prompt_mask: ``(B, P)`` int64, left-padded.
        distinct_prompts: ``(u,)`` int64, one row of each distinct prompt.
        prompt_index: ``(B,)`` int64, the distinct prompt of each row.
        completion_ids, completion_mask: ``(B, T)`` int64, right-padded; the mask marks the tokens that exist.
        loss_mask: ``(B, T)`` int64, the tokens that are trained on.
        advantages: ``(B,)`` fp32.
        old_logps, ref_logps, sampling_logps: ``(B, T)`` fp32 or None.
        normaliser: divisor of the token-normalised losses.
        weight: factor on the loss that makes up for rows that were left out.
        known_lengths: tokens of each prompt and of each completion, see `lengths`.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    distinct_prompts: Tensor
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
        """Tokens of each prompt and of each completion; synchronizes the device only if they are not known."""
        if self.known_lengths is None:
            self.known_lengths = self.prompt_mask.sum(dim=1).tolist(), self.completion_mask.sum(dim=1).tolist()
        return self.known_lengths


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """``(ids, mask)``, both ``(n, longest)`` int64, with the padding before the tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def right_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """``(ids, mask)``, both ``(n, longest)`` int64, with the padding after the tokens."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def unique_rows(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """``(first, which)``: the first row of each distinct value, and for each row the index of its distinct value."""
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
