"""Layout that computes each distinct prompt once and shares its keys and values, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.modules.inspection import output_layer
from grpo_ext.modules.prompt_cache import position_ids, shared_prompt_cache
from grpo_ext.update.micro_batch import MicroBatch

#: On a GPU the extra pass over the prompts pays if ``weights per layer * saved positions`` exceeds this. The pass costs
#: 0.5 ms of host time per layer, forward and backward. In that time a GPU does 2e11 operations (400 TFLOP/s), and each
#: saved position saves 6 per weight.
MIN_SAVED_WORK = 3e10


class UnsharableStateError(TypeError):
    """Raised if the model's cache holds more than keys and values of all positions: rows cannot share that state."""


class SharedPromptLayout:
    """``(B, T)`` ids behind a key-value cache of all but the last prompt token.

    Raises:
        UnsharableStateError: the cache of the prompts cannot be shared.
    """

    def __init__(self, model: nn.Module, batch: MicroBatch) -> None:
        first = batch.first_row_of_prompt
        self._cache = shared_prompt_cache(model, batch.prompt_ids[first], batch.prompt_mask[first], batch.prompt_index)
        if self._cache is None:
            raise UnsharableStateError("the model keeps state other than plain keys and values")
        self._batch = batch
        self.positions = shared_positions(batch)

    def inputs(self) -> dict[str, Any]:
        batch = self._batch
        mask = torch.cat([batch.prompt_mask, batch.completion_mask[:, :-1]], dim=1)
        return {
            "input_ids": torch.cat([batch.prompt_ids[:, -1:], batch.completion_ids[:, :-1]], dim=1),
            "attention_mask": mask,
            "position_ids": position_ids(mask)[:, -batch.completion_ids.shape[1] :],
            "past_key_values": self._cache,
            "use_cache": True,
        }

    def first_positions(self) -> Tensor:
        rows, width = self._batch.completion_ids.shape
        return torch.arange(rows, device=self._batch.completion_ids.device) * width

    def completion_rows(self, outputs: Tensor) -> Tensor:
        return outputs[:, -self._batch.completion_ids.shape[1] :]


def shared_positions(batch: MicroBatch) -> int:
    """Count the positions of the layout: each distinct prompt once, and all completions."""
    return len(batch.first_row_of_prompt) * (batch.prompt_ids.shape[1] - 1) + batch.completion_ids.numel()


def saved_positions(batch: MicroBatch) -> int:
    """Count the prompt positions that repeat those of another row."""
    return (len(batch.prompt_index) - len(batch.first_row_of_prompt)) * (batch.prompt_ids.shape[1] - 1)


def least_saving_on_gpu(model: nn.Module) -> int:
    """Return how many positions must be saved for the extra pass to pay on a GPU, see `MIN_SAVED_WORK`."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    layers = getattr(config, "num_hidden_layers", 0)
    head = output_layer(model)
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    ids = {id(p) for module in ends for p in module.parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in ids)
    return int(MIN_SAVED_WORK * layers / max(weights, 1))
