"""Backward pass of one micro-batch, with plain torch, FSDP or DeepSpeed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grpo_ext.modules.sharding import wait_for_all_gathers
from grpo_ext.update.guard import NonfiniteGuard


def run_backward(accelerator: Any, model: nn.Module, loss: Tensor, guard: NonfiniteGuard, *, deepspeed: bool) -> None:
    """Add the gradient of ``loss`` to the parameters.

    Args:
        accelerator: `accelerate.Accelerator`; scales the loss if it has a gradient scaler.
        model: the model as the accelerator prepared it.
        loss: 0-d loss, already divided by the accumulation steps.
        guard: with DeepSpeed, poisons the gradient if another loss of the accumulation window was non-finite.
        deepspeed: the model is a DeepSpeed engine, which takes its optimizer step inside the window's last backward.
    """
    if deepspeed:
        accelerator.backward(guard.poison_if_window_nonfinite(loss), scale_wrt_gas=False)
    else:
        accelerator.backward(loss)
        wait_for_all_gathers(model)
