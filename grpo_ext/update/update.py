"""What the update of a slice needs before the model runs: which rows, which log probabilities, what has been done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.output import METRIC_NAMES
from grpo_ext.rollouts.batching import BatchPlan
from grpo_ext.rollouts.rollout import MicroBatch, Rollout
from grpo_ext.trainer.config import GRPOConfig
from grpo_ext.trainer.models import Reference, evaluating
from grpo_ext.update.metrics import MetricWindow
from grpo_ext.update.policy import Policy
from grpo_ext.update.skipping import remaining_weight, rows_with_gradient


class Updates:
    """Micro-batches of the rows that have a gradient, with everything the loss needs.

    Args:
        args: the run's parameters.
        plan: its batch numbers.
        policy: runs the model.
        reference: the model of the KL term, None without one.
        window: where metrics go.
        pad_id: id of padding.
        autocast: context in which the reference runs as the policy does.
        may_skip_all: whether a micro-batch without any gradient may pass without a backward. Other processes and a
            gradient scaler count on one; then its shortest row is kept. One without rows, which is so on all
            processes, passes in any case.
        noisy: whether two passes in train mode differ (dropout): what a replay compares with is then computed without.
    """

    def __init__(
        self,
        args: GRPOConfig,
        plan: BatchPlan,
        policy: Policy,
        reference: Reference | None,
        window: MetricWindow,
        pad_id: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        may_skip_all: bool,
        noisy: bool,
    ) -> None:
        self.args = args
        self.plan = plan
        self.policy = policy
        self.reference = reference
        self.window = window
        self.pad_id = pad_id
        self.autocast = autocast
        self.may_skip_all = may_skip_all
        self.noisy_replays = noisy and plan.num_iterations > 1
        # Of the model, since the last micro-batch was counted; passes of the reference are not the policy's.
        self._tokens = self._passes = self._reference_passes = 0

    def rows(self, rollout: Rollout, index: int) -> list[int]:
        """Positions in a slice of the rows that go through the model."""
        rows = rollout.rows_of(index)
        if not self.args.skip_zero_gradient_sequences:
            return list(range(len(rows)))
        advantages = [float(rollout.advantages[row]) for row in rows]
        keep = rows_with_gradient(self.policy.config, advantages, [rollout.trained[row] for row in rows])
        if keep or not rows or self.may_skip_all:
            return keep
        lengths = [len(rollout.prompt_ids[row]) + len(rollout.completion_ids[row]) for row in rows]
        return [lengths.index(min(lengths))]

    def micro_batch(self, rollout: Rollout, index: int, keep: list[int]) -> MicroBatch:
        """The rows ``keep`` of a slice, whose weighted loss has the gradient of the whole slice."""
        batch = rollout.micro_batch(index, self.pad_id, self.args.device, keep)
        rows = rollout.rows_of(index)
        tokens = [len(rollout.completion_ids[row]) * rollout.trained[row] for row in rows]
        kept = sum(tokens[position] for position in keep)
        count: float = len(rows)
        total: float = sum(tokens)
        if rollout.sizes is not None:  # micro-batches of any size stand for as many of the usual one
            lengths = zip(rollout.completion_ids, rollout.trained, strict=True)
            total = sum(len(ids) for ids, use in lengths if use) / len(rollout.sizes)
            count = rollout.rows_per_slice
        batch.weight = remaining_weight(self.args.loss_type, count, len(keep), total, kept)
        return batch

    def add_logps(self, model: nn.Module, unwrapped: nn.Module, rollout: Rollout, at_start: bool = True) -> None:
        """Log probabilities that must be fixed before the first update of a generation batch.

        Old ones only for slices first used after an optimizer step: for the others the update's own forward
        is the sampling policy, and replays reuse what that forward computed (where dropout would be in it, they are
        computed here, too). Reference ones only when beta is not 0.

        Args:
            at_start: the slices are used from the first one on; else in an order not known here, and all get old ones.
        """
        for index in range(self.plan.steps_per_generation):
            late = self.noisy_replays or not at_start or not self.plan.is_on_policy(rollout.start, index)
            keep = self.rows(rollout, index)
            if not keep or (not late and self.reference is None):
                continue
            batch = rollout.micro_batch(index, self.pad_id, self.args.device, keep)
            if late:
                with evaluating(model):
                    rollout.old_logps[index] = rollout.whole_slice(index, keep, self.policy.logps(model, batch))
            if self.reference is not None:
                passes = self.policy.passes
                with self.reference.using(unwrapped) as reference, self.autocast():
                    rollout.ref_logps[index] = rollout.whole_slice(index, keep, self.policy.logps(reference, batch))
                self._reference_passes += self.policy.passes - passes

    def without_gradient(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """A loss of 0 without the model; the gradient stays what it is, 0 where there is none."""
        if self.may_skip_all:  # else another micro-batch of the step has a backward
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # the optimizer would pass over it
        sampled = rollout.sampling_logps is not None
        self.window.add_loss(dict.fromkeys(METRIC_NAMES, 0.0), self.args.beta != 0, sampled)
        for name in ("time/forward", "time/backward"):
            self.window.add(name, 0.0, reduce="sum")
        return torch.zeros((), device=self.args.device)

    def count(self, rollout: Rollout, rows: int, kept: int) -> None:
        """Metrics of what the model did for one micro-batch, its log probabilities made earlier included.

        ``tokens/padded`` is what one pass takes where every row is padded to the whole generation batch and none is
        skipped.
        """
        passes = self.policy.passes - self._passes
        tokens = self.policy.forward.tokens - self._tokens
        self._passes, self._tokens = self.policy.passes, self.policy.forward.tokens
        add = self.window.add
        add("skipped_sequences", 1 - kept / max(rows, 1), weight=rows)
        add("forwards_per_micro_batch", float(passes - self._reference_passes))
        if self.reference is not None:
            add("reference_forwards_per_micro_batch", float(self._reference_passes))
        self._reference_passes = 0
        add("tokens/computed", float(tokens), reduce="sum")
        add("tokens/padded", float(rollout.padded_tokens(rows)), reduce="sum")
