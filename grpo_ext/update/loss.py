"""Compute the loss or the log probabilities of a micro-batch in one forward, from hidden states or from logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import grpo_ext
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import TRAINER_BUDGET
from grpo_ext.modules.fused_head import FusedHead, Result
from grpo_ext.output import GRPOLossOutput
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.micro_batch import MicroBatch

#: Maps ``(batch, hidden, weight, bias)`` to a loss or log probabilities; hidden is ``(B, T, H)``.
AtHead = Callable[[MicroBatch, Tensor, Tensor, Tensor | None], Result]

#: Maps entropies and loss mask of a micro-batch, ``(B, T)`` each, to the entropy quantile over all ranks.
Threshold = Callable[[Tensor, Tensor], Tensor | None]


class ModelPass:
    """Run a model over micro-batches and compute the loss or log probabilities of each.

    Args:
        layouts: chooses the layout of the model's input.
        head: the fused head; if it is not in use, the loss is computed from logits.
        config: the constants of the loss.
        threshold: computes the entropy mask's threshold over all ranks; None: over this rank's tokens only.
        memory_budget: bytes of the fused head's buffers; None: `TRAINER_BUDGET` of the device, or the loss's default.

    Attributes:
        passes: number of forward passes so far.
    """

    def __init__(
        self,
        layouts: LayoutChooser,
        head: FusedHead,
        config: LossConfig,
        threshold: Threshold | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.layouts = layouts
        self.head = head
        self.config = config
        self.threshold = threshold
        self.memory_budget = memory_budget
        self.passes = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `config` has issued the same warnings
            #: The fused head computes raw logits, so its loss applies the model's scale and softcap.
            self.head_config = config.replace(logit_scale=head.logit_scale, logit_softcap=head.logit_softcap)

    def loss(self, model: nn.Module, batch: MicroBatch) -> GRPOLossOutput:
        """Compute the loss of a micro-batch; only the field ``loss`` has a gradient."""
        output = self._through_head(model, batch, self._loss_from_hidden)
        return self._loss_from_logits(model, batch) if output is None else output

    @torch.no_grad()
    def logps(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Compute log probabilities ``(B, T)`` of the completion tokens, fp32 without gradient, 0 at padding."""
        logps = self._through_head(model, batch, self._logps_from_hidden)
        if logps is not None:
            return logps
        logits = self.logits(model, batch)
        found: Any = grpo_ext.selective_log_softmax(logits, batch.completion_ids, temperature=self.config.temperature)
        return found.masked_fill(batch.completion_mask == 0, 0.0)

    def _through_head(self, model: nn.Module, batch: MicroBatch, function: AtHead[Result]) -> Result | None:
        """Call ``function`` with batch, hidden states ``(B, T, H)`` and head; None if the fused head is not in use."""
        if not self.head.in_use:
            return None
        layout = self.layouts.choose(model, batch)

        def at_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Result:
            return function(batch, layout.completion_rows(hidden), weight, bias)

        result = self.head.run(model, layout.inputs(), at_head)
        if result is not None:
            self.passes += 1
        elif self.layouts.padding_free:
            self.layouts.stop_packing("the fused head is not in use")
        return result

    def logits(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Compute logits ``(B, T, V)`` in the model's dtype; row t predicts ``completion_ids[:, t]``."""
        layout = self.layouts.choose(model, batch, for_logits=True)
        self.passes += 1
        return layout.completion_rows(model(**layout.inputs()).logits)

    def _loss_from_logits(self, model: nn.Module, batch: MicroBatch) -> GRPOLossOutput:
        logits = self.logits(model, batch)
        threshold = None
        if self.threshold is not None:
            with torch.no_grad():
                _, entropy = grpo_ext.selective_log_softmax(
                    logits, batch.completion_ids, temperature=self.config.temperature, return_entropy=True
                )
            threshold = self.threshold(entropy, batch.loss_mask)
        return grpo_ext.grpo_loss(
            logits,
            batch.completion_ids,
            batch.advantages,
            batch.loss_mask,
            self.config,
            entropy_threshold=threshold,
            inplace=True,
            **optional_arguments(batch),
        )

    def _loss_from_hidden(
        self, batch: MicroBatch, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> GRPOLossOutput:
        threshold = None
        if self.threshold is not None:
            with torch.no_grad():
                _, entropy = self._linear_logps(batch, batch.loss_mask, hidden, weight, bias, return_entropy=True)
            threshold = self.threshold(entropy, batch.loss_mask)
        return grpo_ext.linear_grpo_loss(
            hidden,
            weight,
            batch.completion_ids,
            batch.advantages,
            batch.loss_mask,
            self.head_config,
            bias=bias,
            entropy_threshold=threshold,
            valid_rows=sum(batch.lengths()[1]),
            memory_budget=self._budget(hidden),
            **optional_arguments(batch),
        )

    def _logps_from_hidden(self, batch: MicroBatch, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._linear_logps(batch, batch.completion_mask, hidden, weight, bias)

    def _linear_logps(
        self, batch: MicroBatch, mask: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
    ) -> Any:
        config = self.head_config
        return grpo_ext.linear_selective_log_softmax(
            hidden,
            weight,
            batch.completion_ids,
            bias=bias,
            mask=mask,
            valid_rows=sum(batch.lengths()[1]),
            memory_budget=self._budget(hidden),
            temperature=config.temperature,
            logit_softcap=config.logit_softcap,
            logit_scale=config.logit_scale,
            **options,
        )

    def _budget(self, hidden: Tensor) -> int | None:
        return self.memory_budget or TRAINER_BUDGET.get(hidden.device.type)


def optional_arguments(batch: MicroBatch) -> dict[str, Any]:
    """Return the optional keyword arguments of a loss that the batch holds."""
    return {
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "sampling_logps": batch.sampling_logps,
        "num_items_in_batch": batch.normaliser,
    }
