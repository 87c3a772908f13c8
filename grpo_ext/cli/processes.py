"""A run of several processes: what they agree on, and what all of them do for one of them."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback


def agreed(value: Any) -> Any:
    """The main process's value, on every process; each waits here for all the others."""
    return gather_object([value])[0]


def measured_when_training_starts(args: Any) -> bool:
    """Whether the first measurement waits until the trainer has laid the model out over the processes.

    Only then can a model generate that DeepSpeed ZeRO-3 has loaded in pieces, and one that FSDP2 is to divide need not
    have room on one device before.

    Args:
        args: the `GRPOConfig` of the run.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    return args.world_size > 1 or is_deepspeed_zero3_enabled()


class WhenTrainingStarts(TrainerCallback):
    """Calls a function once, with the model prepared and before the first step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it."""
        self.act()


def leave_together() -> None:
    """The last thing that processes do: each waits here for all the others, since a launcher may end all of them when
    one has gone wrong on its way out.

    A barrier, which has no tensors. gloo's threads let go of a collective's tensors some time after its result is
    there, and need the interpreter for it; one that still waits for it when the interpreter ends aborts the process.
    Here they get it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def disband_at_exit() -> None:
    """Ends the process group with this process, as torch asks for; called only once a run has ended well."""
    atexit.register(_disband)


def _disband() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def unscored(completions: Sequence[Any], **columns: Any) -> list[float]:
    """The reward of a process that only helps to generate: the main process scores the answers, once."""
    return [0.0] * len(completions)
