"""Layout with prompts padded on the left, completions on the right, and an attention mask over both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext.modules.prompt_cache import position_ids
from grpo_ext.update.micro_batch import MicroBatch


class PaddedLayout:
    """``(B, P + T - 1)`` ids with a mask. Works with every model.

    Args:
        batch: the micro-batch.
        parameters: names of the model's forward parameters; inputs that are not among them are omitted.
    """

    def __init__(self, batch: MicroBatch, parameters: frozenset[str]) -> None:
        self._width = batch.completion_ids.shape[1]
        mask = torch.cat([batch.prompt_mask, batch.completion_mask[:, :-1]], dim=1)
        ids = torch.cat([batch.prompt_ids, batch.completion_ids[:, :-1]], dim=1)
        self._inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "logits_to_keep" in parameters:
            self._inputs["logits_to_keep"] = self._width
        if "position_ids" in parameters:
            self._inputs["position_ids"] = position_ids(mask)
        if "use_cache" in parameters:
            self._inputs["use_cache"] = False
        self.positions = ids.numel()

    def inputs(self) -> dict[str, Any]:
        return self._inputs

    def first_positions(self) -> Tensor:
        ids = self._inputs["input_ids"]
        rows, width = ids.shape
        return torch.arange(rows, device=ids.device) * width + (width - self._width)

    def completion_rows(self, outputs: Tensor) -> Tensor:
        return outputs[:, -self._width :]
