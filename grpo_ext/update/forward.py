"""The model's forward pass over a micro-batch: what predicts the completion tokens, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.generation.engine import position_ids, shared_prompt_cache
from grpo_ext.modules.fused_head import FusedHead, HeadFunction, output_layer
from grpo_ext.rollouts.rollout import MicroBatch
from grpo_ext.trainer.models import evaluating
from grpo_ext.update.aligned import AlignedBatch, looks_ahead
from grpo_ext.update.packing import PackedBatch, keeps_apart

#: Weights of a layer times positions: what a GPU must be spared before a second pass over the layer, that of the
#: prompts, pays. Half a millisecond of the host for it, forward and backward, at 400 TFLOP/s and 6 operations.
SECOND_PASS = 3e10


class CompletionForward:
    """Computes ``(B, T, V)`` logits that predict a micro-batch's completion tokens, or hands the hidden states that
    they would be made of to a function.

    The last completion token predicts nothing, so it is never fed. With ``share_prompts`` the keys and values of a
    prompt are computed once for all its completions, gradients included: the same mathematics with fewer tokens. On a
    GPU only where that spares more than the pass of its own costs the host, see `positions_that_pay`.

    Args:
        model: the causal language model, unwrapped; its forward signature decides what it is given.
        share_prompts: False where the model must see whole rows (gradient checkpointing drops the cache, a
            wrapper for several processes expects one forward per backward).
        padding_free: lay the sequences end to end where that is possible and takes fewer positions than the other way.

    Attributes:
        tokens: positions that went through the model so far.
        padded_because: why rows are padded in spite of ``padding_free``; None where they are not, or not known yet.
        masked_because: why padded rows need an attention mask; None where they do not, or not known yet.
    """

    def __init__(self, model: nn.Module, share_prompts: bool = True, padding_free: bool = False) -> None:
        base: Any = getattr(model, "get_base_model", lambda: model)()
        names = inspect.signature(base.forward).parameters
        self.keeps_logits = "logits_to_keep" in names
        self.takes_positions = "position_ids" in names
        self.takes_cache = "use_cache" in names
        self.share_prompts = share_prompts and self.keeps_logits and self.takes_positions and self.takes_cache
        self._pays = {"cuda": positions_that_pay(base)}  # by kind of device
        self.tokens = 0
        self.padding_free = padding_free
        self.padded_because: str | None = None
        self._packing_proved = False
        self.masked_because: str | None = None
        self._alignment_proved = False
        if not (self.keeps_logits and self.takes_positions and self.takes_cache):
            self.masked_because = "the model's forward takes no position_ids, use_cache and logits_to_keep"
        if padding_free and not (self.keeps_logits and self.takes_positions and self.takes_cache):
            self._pad_because("the model's forward takes no position_ids, use_cache and logits_to_keep")

    def _pad_because(self, reason: str) -> None:
        self.padding_free, self.padded_because = False, reason

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Logits of ``batch`` in the model's own dtype; row t of a sequence predicts ``completion_ids[:, t]``."""
        width = batch.completion_ids.shape[1]
        return model(**self._inputs(model, batch)).logits[:, -width:]

    def through_head(self, model: nn.Module, batch: MicroBatch, head: FusedHead, function: HeadFunction) -> Tensor:
        """``function`` of the hidden states ``(B, T, H)`` that the logits would be made of, and of the head.

        Raises:
            LookupError: the head turned out not to serve; ``head.reason`` says why.
        """
        width = batch.completion_ids.shape[1]
        laid_out = self._packed(model, batch) or self._aligned(model, batch)
        if laid_out is not None:
            self.tokens += laid_out.positions
            kwargs = laid_out.inputs()
            result = head.run(
                model, lambda: model(**kwargs), lambda hidden, *rest: function(laid_out.by_row(hidden), *rest)
            )
        else:
            inputs = self._inputs(model, batch)
            result = head.run(model, lambda: model(**inputs), lambda hidden, *rest: function(hidden[:, -width:], *rest))
        if result is None:
            if self.padding_free:
                self._pad_because("the fused head is not in use")
            raise LookupError(head.reason)
        return result

    def _packed(self, model: nn.Module, batch: MicroBatch) -> PackedBatch | None:
        """The micro-batch end to end; None where it is not wanted, not possible, or more work."""
        if not self.padding_free:
            return None
        if not self._packing_proved:
            with torch.no_grad(), evaluating(model):
                reason = keeps_apart(model, batch)
            if reason is not None:
                self._pad_because(reason)
                return None
            self._packing_proved = True
        packed = PackedBatch(batch)
        shared = len(batch.prompt_first) * (batch.prompt_ids.shape[1] - 1) + batch.completion_ids.numel()
        return None if self._shares(batch) and shared < packed.positions else packed

    def _aligned(self, model: nn.Module, batch: MicroBatch) -> AlignedBatch | None:
        """The micro-batch with all padding behind the rows; None where prompts are shared or a mask is needed."""
        if self.masked_because is not None or self._shares(batch):
            return None
        if not self._alignment_proved:
            with torch.no_grad(), evaluating(model):
                self.masked_because = looks_ahead(model, batch)
            self._alignment_proved = True
        return None if self.masked_because is not None else AlignedBatch(batch)

    def _shares(self, batch: MicroBatch) -> bool:
        repeated = len(batch.prompt_of_row) - len(batch.prompt_first)
        spared = repeated * (batch.prompt_ids.shape[1] - 1)
        return self.share_prompts and spared > 0 and spared >= self._pays.get(batch.prompt_ids.device.type, 0)

    def _inputs(self, model: nn.Module, batch: MicroBatch) -> dict[str, Any]:
        """Keyword arguments of the model; the keys and values of shared prompts are computed here."""
        if self._shares(batch):
            inputs = self._after_prompts(model, batch)
            if inputs is not None:
                return inputs
            self.share_prompts = False
        return self._whole_rows(batch)

    def _after_prompts(self, model: nn.Module, batch: MicroBatch) -> dict[str, Any] | None:
        first = batch.prompt_first
        cache = shared_prompt_cache(model, batch.prompt_ids[first], batch.prompt_mask[first], batch.prompt_of_row)
        if cache is None:
            return None
        mask = torch.cat([batch.prompt_mask, batch.completion_mask[:, :-1]], dim=1)
        width = batch.completion_ids.shape[1]
        self.tokens += len(first) * (batch.prompt_ids.shape[1] - 1) + batch.completion_ids.numel()
        return {
            "input_ids": torch.cat([batch.prompt_ids[:, -1:], batch.completion_ids[:, :-1]], dim=1),
            "attention_mask": mask,
            "position_ids": position_ids(mask)[:, -width:],
            "past_key_values": cache,
            "use_cache": True,
        }

    def _whole_rows(self, batch: MicroBatch) -> dict[str, Any]:
        mask = torch.cat([batch.prompt_mask, batch.completion_mask[:, :-1]], dim=1)
        ids = torch.cat([batch.prompt_ids, batch.completion_ids[:, :-1]], dim=1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.keeps_logits:
            inputs["logits_to_keep"] = batch.completion_ids.shape[1]
        if self.takes_positions:
            inputs["position_ids"] = position_ids(mask)
        if self.takes_cache:
            inputs["use_cache"] = False
        self.tokens += ids.numel()
        return inputs


def positions_that_pay(model: nn.Module) -> int:
    """Positions that prompts in common have to spare a model on a GPU, so that a pass of their own is worth it."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    layers = getattr(config, "num_hidden_layers", 0)
    head = output_layer(model)
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    ids = {id(p) for module in ends for p in module.parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in ids)
    return int(SECOND_PASS * layers / max(weights, 1))
