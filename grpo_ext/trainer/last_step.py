"""The state after the last whole optimizer step, and the moments at which a signal may stop a run."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState

from grpo_ext.rollouts.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Boundary:
    """What a checkpoint of a step needs beside weights and optimizer, which stay as they are until the next update.

    Attributes:
        step, epoch, tokens_seen: of transformers' state.
        kernel_calls: of the trainer.
        rollout: the generation batch in use, with the log probabilities that were known at the time.
        randomness: the states of Python's, numpy's and torch's generators, in this order, then the GPU's.
    """

    step: int
    epoch: float | None
    tokens_seen: int
    kernel_calls: int
    rollout: Rollout | None
    randomness: tuple[Any, ...]

    @classmethod
    def now(cls, state: TrainerState, kernel_calls: int, rollout: Rollout | None) -> Boundary:
        """The present state; takes no time on the device."""
        if rollout is not None:  # the next step may fill in log probabilities
            rollout = dataclasses.replace(rollout, old_logps=list(rollout.old_logps), ref_logps=list(rollout.ref_logps))
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        randomness = (random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)
        seen = int(state.num_input_tokens_seen)
        return cls(state.global_step, state.epoch, seen, kernel_calls, rollout, randomness)

    def restore(self, state: TrainerState) -> None:
        """Put back the step's counts and random states."""
        state.global_step, state.epoch, state.num_input_tokens_seen = self.step, self.epoch, self.tokens_seen
        python, numpy, cpu, gpu = self.randomness
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


class LastStep(TrainerCallback):
    """Remembers the last whole step, and keeps signals out of the update in between.

    Ctrl-C (KeyboardInterrupt) and SIGTERM (SystemExit) raise at once, except between the start of an optimizer step and
    its last callback: there the first one waits for the step's end, and a second one raises. Signals for which the
    program has handlers of its own, and those of other threads than the main one, are left alone.

    Args:
        boundary: returns the present state.

    Attributes:
        boundary: after the last whole step of this call of ``train``; None before the first.
        torn: the optimizer has begun to move the weights and has not ended: they belong to no step.
    """

    def __init__(self, boundary: Callable[[], Boundary]) -> None:
        self._now = boundary
        self.boundary: Boundary | None = None
        self.torn = False
        self._waits = False
        self._hook: Any = None
        self._pending: tuple[int, FrameType | None] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Begin anew, with handlers for both signals until the end of the ``with`` block."""
        self.boundary, self.torn, self._waits, self._pending = None, False, False, None
        before: dict[signal.Signals, Any] = {}
        handlers = ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
        if threading.current_thread() is threading.main_thread():
            for number, default in handlers:
                if signal.getsignal(number) == default:
                    before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def watch(self, optimizer: Any) -> None:
        """Learn when an optimizer, or accelerate's wrapper of one, begins to move weights."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._begins)

    def _begins(self, *_: Any) -> None:
        self.torn = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let signals wait."""
        self._waits = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is whole: comes before the callbacks that may raise."""
        self.torn = False
        self.boundary = self._now()

    def callbacks_are_done(self) -> None:
        """Signals raise at once again."""
        self._waits = False

    def step_is_recorded(self) -> None:
        """Remember the state with which the next step begins, and raise for a signal that waited."""
        if self.boundary is not None:
            self.boundary = self._now()
        if self._pending is not None:
            _raise_for(*self._pending)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._waits or self._pending is not None:
            _raise_for(number, frame)
        self._pending = number, frame


def _raise_for(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    raise SystemExit(128 + number)


def end_with(error: BaseException, line: str) -> None:
    """Put a line under an exception's message; on standard error at once where Python would not show it."""
    notes: list[str] = [*getattr(error, "__notes__", []), line]
    error.__notes__ = notes
    if isinstance(error, SystemExit) or sys.version_info < (3, 11):
        print(line, file=sys.stderr, flush=True)
