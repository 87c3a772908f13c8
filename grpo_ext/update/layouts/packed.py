"""Layout that concatenates all sequences in one row without padding; position ids restart at 0 to separate them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.update.layouts.layout import same_logits, scatter_tokens
from grpo_ext.update.micro_batch import MicroBatch, to_device


class PackedLayout:
    """``(1, N)`` ids: the tokens of all rows, without the last token of each."""

    def __init__(self, batch: MicroBatch) -> None:
        ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).bool()
        last = mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(dim=1)
        is_input = mask.clone()
        is_input[torch.arange(len(mask), device=mask.device), last] = False
        position_in_row = mask.cumsum(dim=1) - 1
        # A position predicts a completion token if the next position holds one.
        width = batch.prompt_ids.shape[1]
        predicts = torch.zeros_like(is_input)
        predicts[:, width - 1 : -1] = batch.completion_mask.bool()
        self._ids = ids[is_input].unsqueeze(0)
        self._position_ids = position_in_row[is_input].unsqueeze(0)
        self._keep = torch.nonzero(predicts[is_input]).flatten()
        self._scatter_index = torch.nonzero(batch.completion_mask.flatten()).flatten()
        self._shape = batch.completion_ids.shape
        self._lengths = batch.lengths()
        self.positions = self._ids.shape[1]

    def inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self._ids,
            "position_ids": self._position_ids,
            "logits_to_keep": self._keep,
            "use_cache": False,
        }

    def first_positions(self) -> Tensor:
        ends = itertools.accumulate(p + c - 1 for p, c in zip(*self._lengths, strict=True))
        return to_device([end - c for end, c in zip(ends, self._lengths[1], strict=True)], self._ids.device)

    def completion_rows(self, outputs: Tensor) -> Tensor:
        """See `Layout`. Positions without a completion token hold zeros."""
        return scatter_tokens(outputs.squeeze(0), self._scatter_index, self._shape)


def reason_against_packing(model: nn.Module, batch: MicroBatch) -> str | None:
    """Run one sequence with and without another before it; return why its logits change, None if they do not."""
    row = (batch.prompt_mask.sum(dim=1) + batch.completion_mask.sum(dim=1)).argmax()
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)[row].bool()
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)[row][mask][-16:].unsqueeze(0)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits[0, -1]
    try:
        # Reversed ids in front: a model that attends to them computes other logits.
        both, restarted = torch.cat([ids.flip(1), ids], dim=1), torch.cat([positions, positions], dim=1)
        got = model(input_ids=both, position_ids=restarted, use_cache=False, logits_to_keep=1).logits[0, -1]
    except (RuntimeError, ValueError, TypeError) as error:
        return f"the model's attention does not run on packed sequences ({type(error).__name__})"
    if same_logits(got, expected):
        return None
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or "its attention"
    return f"the model does not separate packed sequences ({attention})"
