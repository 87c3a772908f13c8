"""Losses and gradients that are not finite: counted, their step skipped, and in the end an error with the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grpo_ext.update.metrics import MetricWindow

FOLDER = "nonfinite"


class NonfiniteError(RuntimeError):
    """Several optimizer steps in a row had a loss or gradient that is not finite."""


class GenerationBatch(Protocol):
    """What a micro-batch was cut from, as the guard saves it; `grpo_ext.rollouts.rollout.Rollout` is one."""

    key: tuple[int, int]

    def rows_of(self, slice_index: int) -> list[int]:
        """Rows of one slice."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values for ``torch.save``."""
        ...


class NonfiniteGuard:
    """Watch the losses of an accumulation window and their gradient; skip the step if one is not finite.

    Args:
        limit: number of skipped steps in a row that is an error.
        window: collects ``nonfinite_steps``.
        gather: joins a tensor of every rank.
        folder: takes the file with the batch that the error names.
        rank: rank of this process.
    """

    def __init__(
        self, limit: int, window: MetricWindow, gather: Callable[[Tensor], Tensor], folder: Path, rank: int
    ) -> None:
        self.limit = limit
        self.window = window
        self.gather = gather
        self.folder = folder
        self.rank = rank
        self.in_a_row = 0
        self._losses: list[Tensor] = []
        self._slices: list[tuple[GenerationBatch, int]] = []

    def watch(self, loss: Tensor, rollout: GenerationBatch, slice_index: int) -> None:
        """Remember one micro-batch until its step, without a host sync."""
        self._losses.append(loss.detach().float())
        self._slices.append((rollout, slice_index))

    def poison_if_window_nonfinite(self, loss: Tensor) -> Tensor:
        """Give this loss a NaN gradient if any loss of the accumulation window is non-finite, without a host sync.

        For DeepSpeed, which steps inside backward and rejects non-finite gradients, but not non-finite losses.
        """
        losses = torch.stack([*self._losses, loss.detach().float()])
        return loss * torch.where(losses.isfinite().all(), 1.0, math.nan).to(loss.dtype)

    def before_step(self, model: nn.Module, norm: Any, step: int, scaled: bool, taken: bool | None = None) -> bool:
        """Drop the gradients of a step that must not be taken.

        Args:
            norm: of the whole gradient, the same on all ranks.
            step: its number, from 1.
            scaled: a gradient scaler is at work: it skips such steps itself, and a gradient out of range is how it
                finds its scale; only the losses are looked at.
            taken: what became of the step where it is over already (DeepSpeed); None where it is still to come.

        Returns:
            Whether the step is skipped, the same on all ranks.

        Raises:
            NonfiniteError: the limit is reached, or such a step was taken; names the file with the batch.
        """
        losses, slices, self._losses, self._slices = self._losses, self._slices, [], []
        wrong = torch.stack(losses).isfinite().logical_not() if losses else torch.zeros(1, dtype=torch.bool)
        bad_loss = bool(self.gather(wrong.any().reshape(1).float()).any())
        bad_gradient = taken is False or (norm is not None and not math.isfinite(float(norm)))
        bad = bad_loss or (not scaled and bad_gradient)
        self.window.add("nonfinite_steps", float(bad and self.rank == 0), reduce="sum")  # one step, not one per rank
        if not bad:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        what = "loss" if bad_loss else f"gradient (norm {norm})"
        if taken:
            raise NonfiniteError(
                f"step {step}: the {what} is not finite, and this version of DeepSpeed took the step all the same: go "
                f"on from the checkpoint before. The batch is in {self._save(step, slices, wrong)}"
            )
        if taken is None and (bad_loss or not scaled):  # a scaler looks at gradients, not at losses
            for parameter in model.parameters():
                parameter.grad = None  # the optimizer leaves such parameters and their state alone
        if self.in_a_row >= self.limit:
            path = self._save(step, slices, wrong)
            raise NonfiniteError(
                f"step {step}: the {what} is not finite, for {self.in_a_row} step(s) in a row, none of which was "
                f"taken; the batch is in {path} (max_nonfinite_steps={self.limit}). Look for a learning rate that is "
                "too high, fp16 out of its range, or a reward or prompt that is out of the ordinary"
            )
        return True

    def _save(self, step: int, slices: list[tuple[GenerationBatch, int]], wrong: Tensor) -> Path:
        """Prompts, completions, advantages and log probabilities of the step's micro-batches, for ``torch.load``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}-rank{self.rank}.pt"
        rollouts = {rollout.key: rollout.state_dict() for rollout, _ in slices}
        micro_batches = [
            {"generation": rollout.key, "slice": index, "rows": rollout.rows_of(index), "loss_finite": not bool(bad)}
            for (rollout, index), bad in zip(slices, wrong.tolist(), strict=False)
        ]
        torch.save({"step": step, "rollouts": rollouts, "micro_batches": micro_batches}, path)
        return path
