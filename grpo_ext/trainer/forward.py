"""The model's forward pass over a micro-batch: the logits of the completion tokens and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.trainer.generation import position_ids, shared_prompt_cache
from grpo_ext.trainer.rollout import MicroBatch


class CompletionForward:
    """Computes ``(B, T, V)`` logits that predict a micro-batch's completion tokens, in the model's own dtype.

    The last completion token predicts nothing, so it is never fed. With ``share_prompts`` the keys and values of a
    prompt are computed once for all its completions, gradients included: the same mathematics with fewer tokens.

    Args:
        model: the causal language model, unwrapped; its forward signature decides what it is given.
        share_prompts: False where the model must see whole rows (gradient checkpointing drops the cache, a
            wrapper for several processes expects one forward per backward).
    """

    def __init__(self, model: nn.Module, share_prompts: bool = True) -> None:
        base: Any = getattr(model, "get_base_model", lambda: model)()
        names = inspect.signature(base.forward).parameters
        self.keeps_logits = "logits_to_keep" in names
        self.takes_positions = "position_ids" in names
        self.takes_cache = "use_cache" in names
        self.share_prompts = share_prompts and self.keeps_logits and self.takes_positions and self.takes_cache

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Logits of ``batch``; row t of a sequence predicts ``completion_ids[:, t]``."""
        if self.share_prompts and batch.prompt_ids.shape[1] > 1 and len(batch.prompt_first) < len(batch.prompt_of_row):
            logits = self._shared(model, batch)
            if logits is not None:
                return logits
            self.share_prompts = False
        return self._whole_rows(model, batch)

    def _shared(self, model: nn.Module, batch: MicroBatch) -> Tensor | None:
        first = batch.prompt_first
        cache = shared_prompt_cache(model, batch.prompt_ids[first], batch.prompt_mask[first], batch.prompt_of_row)
        if cache is None:
            return None
        mask = torch.cat([batch.prompt_mask, batch.completion_mask[:, :-1]], dim=1)
        width = batch.completion_ids.shape[1]
        return model(
            input_ids=torch.cat([batch.prompt_ids[:, -1:], batch.completion_ids[:, :-1]], dim=1),
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -width:],
            past_key_values=cache,
            use_cache=True,
        ).logits

    def _whole_rows(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        mask = torch.cat([batch.prompt_mask, batch.completion_mask[:, :-1]], dim=1)
        width = batch.completion_ids.shape[1]
        kwargs: dict[str, object] = {}
        if self.keeps_logits:
            kwargs["logits_to_keep"] = width
        if self.takes_positions:
            kwargs["position_ids"] = position_ids(mask)
        if self.takes_cache:
            kwargs["use_cache"] = False
        ids = torch.cat([batch.prompt_ids, batch.completion_ids[:, :-1]], dim=1)
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits[:, -width:]
