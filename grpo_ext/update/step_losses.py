"""The `loss` and `train_loss` of a run: means over the optimizer steps that were taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepLosses(TrainerCallback):
    """Keeps the losses of skipped steps out of the sum that `transformers.Trainer` logs.

    transformers adds every micro-batch's loss to one tensor, and divides by all steps. One NaN would stay in it for the
    rest of the run.

    Args:
        total: that tensor, 0-d.
    """

    def __init__(self, total: Callable[[], Tensor]) -> None:
        self.total = total
        self._before: Tensor | None = None
        self._run = [0, 0]  # steps, and those of them that were skipped
        self._log = [0, 0]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        self._run, self._log = [0, 0], [0, 0]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the sum on its device, before the step's first micro-batch."""
        self._before = self.total().clone()

    def end_step(self, skipped: bool) -> None:
        """Count a step, and take its losses back if it was skipped."""
        for counts in (self._run, self._log):
            counts[0] += 1
            counts[1] += skipped
        if skipped and self._before is not None:
            self.total().copy_(self._before)

    def logged(self, mean: float) -> float:
        """The mean over the steps taken since the last log, from transformers' over all of them; NaN without any."""
        (steps, skipped), self._log = self._log, [0, 0]
        return _over_taken(mean, steps, skipped)

    def of_run(self, mean: float) -> float:
        """As `logged`, for the whole run."""
        return _over_taken(mean, *self._run)


def _over_taken(mean: float, steps: int, skipped: int) -> float:
    if not skipped:
        return mean
    return mean * steps / (steps - skipped) if skipped < steps else math.nan
