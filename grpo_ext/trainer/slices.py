"""Slices of a generation batch: choose the rows to compute, build micro-batches, compute old and reference logps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.modules.inspection import eval_mode
from grpo_ext.output import METRIC_NAMES
from grpo_ext.rollouts.batching import BatchPlan
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.trainer.config import GRPOConfig
from grpo_ext.update.loss import ModelPass
from grpo_ext.update.metrics import MetricBuffer
from grpo_ext.update.micro_batch import MicroBatch
from grpo_ext.update.reference_model import ReferenceModel
from grpo_ext.update.skipping import kept_rows_weight, rows_with_gradient


class Slices:
    """Build one micro-batch per slice, from the rows that have a gradient and with all inputs of the loss.

    Args:
        args: the run's parameters.
        plan: the run's batch numbers.
        model_pass: runs the model.
        reference: the model of the KL term; None if there is no KL term.
        metrics: collects the metrics.
        pad_id: token id of padding.
        autocast: the policy's autocast context, for the reference.
        may_skip_backward: whether a micro-batch with no gradient may skip backward. False with several processes or a
            gradient scaler; its shortest row is then kept. A slice without rows always skips: it is empty on every
            process.
        dropout: whether two passes in train mode differ. The old log probabilities of replayed slices are then
            computed in eval mode before the first update.
    """

    def __init__(
        self,
        args: GRPOConfig,
        plan: BatchPlan,
        model_pass: ModelPass,
        reference: ReferenceModel | None,
        metrics: MetricBuffer,
        pad_id: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        may_skip_backward: bool,
        dropout: bool,
    ) -> None:
        self.args = args
        self.plan = plan
        self.model_pass = model_pass
        self.reference = reference
        self.metrics = metrics
        self.pad_id = pad_id
        self.autocast = autocast
        self.may_skip_backward = may_skip_backward
        self.replays_with_dropout = dropout and plan.num_iterations > 1
        # Counts at the last call of `add_metrics`, and the reference's passes since then.
        self._positions = self._passes = self._reference_passes = 0

    def kept(self, rollout: Rollout, index: int) -> list[int]:
        """Return the positions in slice ``index`` of the rows that go through the model."""
        rows = rollout.rows_of(index)
        if not self.args.skip_zero_gradient_sequences:
            return list(range(len(rows)))
        advantages = [float(rollout.advantages[row]) for row in rows]
        kept = rows_with_gradient(self.model_pass.config, advantages, [rollout.in_loss[row] for row in rows])
        if kept or not rows or self.may_skip_backward:
            return kept
        lengths = [len(rollout.prompt_ids[row]) + len(rollout.completion_ids[row]) for row in rows]
        return [lengths.index(min(lengths))]

    def micro_batch(self, rollout: Rollout, index: int, kept: list[int]) -> MicroBatch:
        """Build the micro-batch of the rows at positions ``kept``, weighted so that its loss is that of the slice."""
        batch = rollout.micro_batch(index, self.pad_id, self.args.device, kept)
        rows = rollout.rows_of(index)
        tokens = [len(rollout.completion_ids[row]) * rollout.in_loss[row] for row in rows]
        kept_tokens = sum(tokens[position] for position in kept)
        count: float = len(rows)
        total: float = sum(tokens)
        if rollout.slice_sizes is not None:  # filled slices differ in size; divide by what an unfilled slice would hold
            lengths = zip(rollout.completion_ids, rollout.in_loss, strict=True)
            total = sum(len(ids) for ids, use in lengths if use) / len(rollout.slice_sizes)
            count = rollout.rows_per_slice
        batch.weight = kept_rows_weight(self.args.loss_type, count, len(kept), total, kept_tokens)
        return batch

    def add_logps(self, model: nn.Module, unwrapped: nn.Module, rollout: Rollout, regenerated: bool = False) -> None:
        """Store old and reference log probabilities in a new generation batch, before its first update.

        Reference log probabilities are computed only if beta is not 0.

        Old log probabilities are computed for slices whose first update follows an optimizer step. Before that step the
        policy is still the one that sampled. The update's own forward then gives the old log probabilities, and replays
        reuse them. With dropout that forward differs from a replay, so replayed slices get them here.

        Args:
            regenerated: a resumed run generates the batch again and may continue at any slice, so all slices get old
                log probabilities.
        """
        for index in range(self.plan.steps_per_generation):
            after_step = regenerated or not self.plan.is_on_policy(rollout.start, index)
            needs_old = after_step or self.replays_with_dropout
            kept = self.kept(rollout, index)
            if not kept or (not needs_old and self.reference is None):
                continue
            batch = rollout.micro_batch(index, self.pad_id, self.args.device, kept)
            if needs_old:
                with eval_mode(model):
                    old = self.model_pass.logps(model, batch)
                rollout.old_logps[index] = rollout.expand_to_slice(index, kept, old)
            if self.reference is not None:
                passes = self.model_pass.passes
                with self.reference.using(unwrapped) as reference, self.autocast():
                    ref = self.model_pass.logps(reference, batch)
                rollout.ref_logps[index] = rollout.expand_to_slice(index, kept, ref)
                self._reference_passes += self.model_pass.passes - passes

    def zero_loss(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Return loss 0 for a slice without rows for the model; set missing gradients of parameters to 0."""
        if self.may_skip_backward:  # else another micro-batch of the step runs backward
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # without one the optimizer would skip it
        sampled = rollout.sampling_logps is not None
        self.metrics.add_loss(dict.fromkeys(METRIC_NAMES, 0.0), self.args.beta != 0, sampled)
        for name in ("time/forward", "time/backward"):
            self.metrics.add(name, 0.0, reduce="sum")
        return torch.zeros((), device=self.args.device)

    def add_metrics(self, rollout: Rollout, rows: int, kept_rows: int) -> None:
        """Add the metrics of the passes since the last call: those of a micro-batch, and of `add_logps` before it.

        ``tokens/padded`` is for comparison: the positions of one pass that skips no row and pads each to the longest
        prompt and completion of the generation batch.

        Args:
            rows, kept_rows: number of rows of the slice, and of those that went through the model.
        """
        passes = self.model_pass.passes - self._passes
        positions = self.model_pass.layouts.positions - self._positions
        self._passes, self._positions = self.model_pass.passes, self.model_pass.layouts.positions
        add = self.metrics.add
        add("skipped_sequences", 1 - kept_rows / max(rows, 1), weight=rows)
        add("forwards_per_micro_batch", float(passes - self._reference_passes))
        if self.reference is not None:
            add("reference_forwards_per_micro_batch", float(self._reference_passes))
        self._reference_passes = 0
        add("tokens/computed", float(positions), reduce="sum")
        add("tokens/padded", float(rollout.padded_tokens(rows)), reduce="sum")
