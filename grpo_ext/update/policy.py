"""Losses and log probabilities of micro-batches: through the fused head where the model allows it, else from logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import grpo_ext
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import TRAINER_BUDGET
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.output import GRPOLossOutput
from grpo_ext.rollouts.rollout import MicroBatch
from grpo_ext.update.forward import CompletionForward

#: Entropies and loss mask, ``(B, T)`` each, of this rank's tokens to the quantile over all ranks.
Threshold = Callable[[Tensor, Tensor], Tensor | None]


class Policy:
    """One pass of a model over a micro-batch, and what the run wants to know from it.

    Args:
        forward: feeds the model.
        head: the fused head, or why there is none.
        config: the constants of the loss.
        threshold: asked for the entropy threshold of each micro-batch; None leaves it to the loss.
        memory_budget: bytes of the fused head's buffers; None: `TRAINER_BUDGET`, else the losses' own default.

    Attributes:
        passes: passes over a micro-batch so far.
    """

    def __init__(
        self,
        forward: CompletionForward,
        head: FusedHead,
        config: LossConfig,
        threshold: Threshold | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.forward = forward
        self.head = head
        self.config = config
        self.threshold = threshold
        self.memory_budget = memory_budget
        self.passes = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the config was made
            #: The same loss from the head's own product, which the model's softcap and scale have not touched.
            self.head_config = config.replace(logit_scale=head.logit_scale, logit_softcap=head.logit_softcap)

    def loss(self, model: nn.Module, batch: MicroBatch) -> GRPOLossOutput:
        """The loss of a micro-batch; ``loss`` has the gradient."""
        if self.head.serves:
            try:
                return self._fused_loss(model, batch)
            except LookupError:
                if self.head.serves:
                    raise  # an IndexError or KeyError of somebody else
                # Otherwise the first call has found why not; the trainer says so.
        self.passes += 1
        logits = self.forward(model, batch)
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
            **_companions(batch),
        )

    def _fused_loss(self, model: nn.Module, batch: MicroBatch) -> GRPOLossOutput:
        made: list[GRPOLossOutput] = []

        def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            threshold = None
            if self.threshold is not None:
                with torch.no_grad():
                    _, entropy = grpo_ext.linear_selective_log_softmax(
                        hidden,
                        weight,
                        batch.completion_ids,
                        bias=bias,
                        mask=batch.loss_mask,
                        valid_rows=sum(batch.lengths()[1]),
                        return_entropy=True,
                        memory_budget=self._budget(hidden),
                        **self._logit_options(),
                    )
                threshold = self.threshold(entropy, batch.loss_mask)
            output = grpo_ext.linear_grpo_loss(
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
                **_companions(batch),
            )
            made.append(output)
            return output.loss

        loss = self.forward.through_head(model, batch, self.head, from_hidden)
        self.passes += 1
        return made[-1]._replace(loss=loss)

    @torch.no_grad()
    def logps(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Log probabilities of the completion tokens ``(B, T)``, fp32 without gradient, 0 where there is no token."""
        if self.head.serves:
            try:
                result = self.forward.through_head(
                    model, batch, self.head, lambda *head: self._logps_from_hidden(batch, *head)
                )
                self.passes += 1
                return result
            except LookupError:
                if self.head.serves:
                    raise
        self.passes += 1
        logits = self.forward(model, batch)
        logps: Any = grpo_ext.selective_log_softmax(logits, batch.completion_ids, temperature=self.config.temperature)
        return logps.masked_fill(batch.completion_mask == 0, 0.0)

    def _logps_from_hidden(self, batch: MicroBatch, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logps: Any = grpo_ext.linear_selective_log_softmax(
            hidden,
            weight,
            batch.completion_ids,
            bias=bias,
            mask=batch.completion_mask,
            valid_rows=sum(batch.lengths()[1]),
            memory_budget=self._budget(hidden),
            **self._logit_options(),
        )
        return logps

    def _budget(self, hidden: Tensor) -> int | None:
        return self.memory_budget or TRAINER_BUDGET.get(hidden.device.type)

    def _logit_options(self) -> dict[str, Any]:
        config = self.head_config
        return {
            "temperature": config.temperature,
            "logit_softcap": config.logit_softcap,
            "logit_scale": config.logit_scale,
        }


def _companions(batch: MicroBatch) -> dict[str, Any]:
    return {
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "sampling_logps": batch.sampling_logps,
        "num_items_in_batch": batch.normaliser,
    }
