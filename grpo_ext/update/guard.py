"""Skip and count optimizer steps with a non-finite loss or gradient; after too many, save the batch and raise."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grpo_ext.update.metrics import MetricBuffer

FOLDER = "nonfinite"


class NonfiniteError(RuntimeError):
    """Raised if several optimizer steps in a row had a non-finite loss or gradient."""


class GenerationBatch(Protocol):
    """A generation batch that the guard can save, such as `grpo_ext.rollouts.rollout.Rollout`."""

    key: tuple[int, int]

    def rows_of(self, slice_index: int) -> list[int]:
        """Rows of one slice."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values for ``torch.save``."""
        ...


class NonfiniteGuard:
    """Collect the losses of an accumulation window, and skip the step if a loss or the gradient is not finite.

    Args:
        limit: number of skipped steps in a row that raises an error.
        metrics: collects ``nonfinite_steps``.
        gather: concatenates a tensor over all ranks.
        folder: folder of the saved batch that the error names.
        rank: rank of this process.
    """

    def __init__(
        self, limit: int, metrics: MetricBuffer, gather: Callable[[Tensor], Tensor], folder: Path, rank: int
    ) -> None:
        self.limit = limit
        self.metrics = metrics
        self.gather = gather
        self.folder = folder
        self.rank = rank
        self.in_a_row = 0
        self._losses: list[Tensor] = []
        self._slices: list[tuple[GenerationBatch, int]] = []

    def watch(self, loss: Tensor, rollout: GenerationBatch, slice_index: int) -> None:
        """Record one micro-batch until its optimizer step, without a host sync."""
        self._losses.append(loss.detach().float())
        self._slices.append((rollout, slice_index))

    def poison_if_window_nonfinite(self, loss: Tensor) -> Tensor:
        """Give this loss a NaN gradient if any loss of the accumulation window is non-finite, without a host sync.

        For DeepSpeed, which takes its step inside backward and checks the gradients, but not the losses.
        """
        losses = torch.stack([*self._losses, loss.detach().float()])
        return loss * torch.where(losses.isfinite().all(), 1.0, math.nan).to(loss.dtype)

    def before_step(self, model: nn.Module, norm: Any, step: int, scaled: bool, taken: bool | None = None) -> bool:
        """Check the losses and the gradient of a step; drop the gradients if the step must be skipped.

        Args:
            norm: norm of the whole gradient, equal on all ranks.
            step: number of the step, from 1.
            scaled: a gradient scaler is in use. It skips steps with overflowing gradients itself and adapts its scale
                to them, so only the losses are checked.
            taken: whether DeepSpeed took the step; None if the step is still to come.

        Returns:
            Whether the step is skipped, equal on all ranks.

        Raises:
            NonfiniteError: the limit is reached, or DeepSpeed took such a step; the message names the saved batch.
        """
        losses, slices, self._losses, self._slices = self._losses, self._slices, [], []
        wrong = torch.stack(losses).isfinite().logical_not() if losses else torch.zeros(1, dtype=torch.bool)
        bad_loss = bool(self.gather(wrong.any().reshape(1).float()).any())
        bad_gradient = taken is False or (norm is not None and not math.isfinite(float(norm)))
        bad = bad_loss or (not scaled and bad_gradient)
        self.metrics.add("nonfinite_steps", float(bad and self.rank == 0), reduce="sum")  # one step, not one per rank
        if not bad:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        what = "loss" if bad_loss else f"gradient (norm {norm})"
        if taken:
            raise NonfiniteError(
                f"step {step}: the {what} is not finite, but this version of DeepSpeed took the step: resume from the "
                f"checkpoint before it. The batch is saved in {self._save(step, slices, wrong)}"
            )
        if taken is None:
            for parameter in model.parameters():
                parameter.grad = None  # the optimizer skips parameters without a gradient, and their state
        if self.in_a_row >= self.limit:
            path = self._save(step, slices, wrong)
            raise NonfiniteError(
                f"step {step}: the {what} is not finite, for {self.in_a_row} step(s) in a row, all of them skipped "
                f"(max_nonfinite_steps={self.limit}). The batch is saved in {path}. Check for a learning rate that is "
                "too high, fp16 overflow, or an unusual reward or prompt"
            )
        return True

    def _save(self, step: int, slices: list[tuple[GenerationBatch, int]], wrong: Tensor) -> Path:
        """Save prompts, completions, advantages and log probabilities of the step for ``torch.load``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}-rank{self.rank}.pt"
        rollouts = {rollout.key: rollout.state_dict() for rollout, _ in slices}
        micro_batches = [
            {"generation": rollout.key, "slice": index, "rows": rollout.rows_of(index), "loss_finite": not bool(bad)}
            for (rollout, index), bad in zip(slices, wrong.tolist(), strict=False)
        ]
        torch.save({"step": step, "rollouts": rollouts, "micro_batches": micro_batches}, path)
        return path
