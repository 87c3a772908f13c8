"""Coordinate the processes of a run: broadcast values, measure on sharded models, and exit together."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback


def broadcast(value: Any) -> Any:
    """Return the main process's value on every process; a collective."""
    return gather_object([value])[0]


def measures_after_sharding(args: Any) -> bool:
    """Whether the first measurement must follow the trainer's sharding of the model.

    A model loaded by DeepSpeed ZeRO-3 cannot generate earlier. A model for FSDP2 need not fit on one device earlier.

    Args:
        args: the `GRPOConfig` of the run.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    return args.world_size > 1 or is_deepspeed_zero3_enabled()


class OnTrainBegin(TrainerCallback):
    """Call a function after the model is prepared and before the first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the function."""
        self.function()


def exit_barrier() -> None:
    """Synchronize all processes at the end, since a launcher may stop all of them when one fails during exit.

    gloo's threads release a collective's tensors some time after its result arrives, and need the interpreter for
    that. A thread still waiting when the interpreter ends aborts the process. A barrier has no tensors, and waiting in
    it gives those threads the interpreter.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def destroy_process_group_at_exit() -> None:
    """Destroy the process group at exit, as torch requires. Call this only after a successful run."""
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def unscored(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Placeholder rewards for processes other than the main one, which alone scores the answers."""
    return [0.0] * len(completions)
