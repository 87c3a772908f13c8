"""Micro-batches without padding: all sequences end to end in one row, told apart by their position ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.rollouts.rollout import MicroBatch

#: Greatest relative difference of the logits of a sequence alone and beside others, by their dtype.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}


class PackedBatch:
    """The real tokens of a micro-batch as ``(1, N)``, without the last token of each row, which predicts nothing.

    Attributes:
        positions: N.
    """

    def __init__(self, batch: MicroBatch) -> None:
        ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).bool()
        last = mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(dim=1)
        fed = mask.clone()
        fed[torch.arange(len(mask), device=mask.device), last] = False
        counted = mask.cumsum(dim=1) - 1
        # A position predicts the completion token after it: it is fed, and the next one is a completion token.
        width = batch.prompt_ids.shape[1]
        predicts = torch.zeros_like(fed)
        predicts[:, width - 1 : -1] = batch.completion_mask.bool()
        self._ids = ids[fed].unsqueeze(0)
        self._position_ids = counted[fed].unsqueeze(0)
        self._keep = torch.nonzero(predicts[fed]).flatten()
        self._where = torch.nonzero(batch.completion_mask.flatten()).flatten()
        self._shape = batch.completion_ids.shape
        self.positions = self._ids.shape[1]

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a model of transformers; its head sees the positions that predict a token only."""
        return {
            "input_ids": self._ids,
            "position_ids": self._position_ids,
            "logits_to_keep": self._keep,
            "use_cache": False,
        }

    def by_row(self, hidden: Tensor) -> Tensor:
        """``(1, M, H)`` of the kept positions as ``(B, T, H)``, zeros where there is no token."""
        size = hidden.shape[-1]
        rows = hidden.new_zeros((self._shape.numel(), size)).index_copy(0, self._where, hidden.reshape(-1, size))
        return rows.view(*self._shape, size)


def keeps_apart(model: nn.Module, batch: MicroBatch) -> str | None:
    """Why a model mixes sequences that lie end to end, found by trying; None where it keeps them apart."""
    row = (batch.prompt_mask.sum(dim=1) + batch.completion_mask.sum(dim=1)).argmax()
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)[row].bool()
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)[row][mask][-16:].unsqueeze(0)
    count = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    alone = model(input_ids=ids, position_ids=count, use_cache=False, logits_to_keep=1).logits[0, -1]
    try:
        # In front of it lies the same sequence backwards, so that a model which looks there sees something else.
        both, positions = torch.cat([ids.flip(1), ids], dim=1), torch.cat([count, count], dim=1)
        beside = model(input_ids=both, position_ids=positions, use_cache=False, logits_to_keep=1).logits[0, -1]
    except (RuntimeError, ValueError, TypeError) as error:
        return f"the model's attention refuses sequences that lie end to end ({type(error).__name__})"
    bound = TOLERANCE.get(alone.dtype, 1e-4) * alone.float().norm()
    if bool((beside.float() - alone.float()).norm() <= bound):
        return None
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or "its attention"
    return f"the model does not keep sequences apart that lie end to end ({attention})"
