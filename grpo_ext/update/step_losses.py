"""Correct the logged ``loss`` and ``train_loss`` to means over the optimizer steps that were taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepLosses(TrainerCallback):
    """Remove the losses of skipped steps from the sum that `transformers.Trainer` logs.

    transformers adds every micro-batch's loss to one 0-d tensor and divides it by the number of all steps. One NaN
    would stay in the tensor until the run ends.

    Args:
        total: returns that tensor.
    """

    def __init__(self, total: Callable[[], Tensor]) -> None:
        self.total = total
        self._before: Tensor | None = None
        self._run = [0, 0]  # all steps, skipped steps
        self._log = [0, 0]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reset the counts of an earlier run."""
        self._run, self._log = [0, 0], [0, 0]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the sum before the step's first micro-batch, without a host sync."""
        self._before = self.total().clone()

    def end_step(self, skipped: bool) -> None:
        """Count a step, and remove its losses from the sum if it was skipped."""
        for counts in (self._run, self._log):
            counts[0] += 1
            counts[1] += skipped
        if skipped and self._before is not None:
            self.total().copy_(self._before)

    def logged(self, mean: float) -> float:
        """Convert transformers' mean since the last log to a mean over the steps taken; NaN if none was taken."""
        (steps, skipped), self._log = self._log, [0, 0]
        return _over_taken(mean, steps, skipped)

    def corrected_total(self, total: float) -> float:
        """Scale the run's total loss so that transformers' division by all steps gives a mean over the steps taken."""
        return _over_taken(total, *self._run)


def _over_taken(value: float, steps: int, skipped: int) -> float:
    if not skipped:
        return value
    return value * steps / (steps - skipped) if skipped < steps else math.nan
