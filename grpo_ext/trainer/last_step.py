"""The state after the last complete optimizer step, and signals that arrive during an update."""

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
    """The state that a checkpoint of a step needs, except weights and optimizer, which only the next update changes.

    Attributes:
        step, epoch, tokens_seen: fields of `transformers.TrainerState`.
        kernel_calls: kernel calls of the run so far.
        rollout: the generation batch in use, with the log probabilities that were known after the step.
        randomness: random states of Python, numpy, torch and the GPU, in this order.
    """

    step: int
    epoch: float | None
    tokens_seen: int
    kernel_calls: int
    rollout: Rollout | None
    randomness: tuple[Any, ...]

    @classmethod
    def now(cls, state: TrainerState, kernel_calls: int, rollout: Rollout | None) -> Boundary:
        """Capture the current state without device work."""
        if rollout is not None:  # the next step may fill in log probabilities
            rollout = dataclasses.replace(rollout, old_logps=list(rollout.old_logps), ref_logps=list(rollout.ref_logps))
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        randomness = (random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)
        seen = int(state.num_input_tokens_seen)
        return cls(state.global_step, state.epoch, seen, kernel_calls, rollout, randomness)

    def restore(self, state: TrainerState) -> None:
        """Restore the step's counts and random states."""
        state.global_step, state.epoch, state.num_input_tokens_seen = self.step, self.epoch, self.tokens_seen
        python, numpy, cpu, gpu = self.randomness
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


class LastStep(TrainerCallback):
    """Record the state after the last complete step, and defer signals during an update.

    Ctrl-C (KeyboardInterrupt) and SIGTERM (SystemExit) raise at once, except between the start of an optimizer step and
    its last callback: there the first signal is deferred to the step's end, and a second one raises. The program's own
    signal handlers stay. Outside of the main thread no handler is installed.

    Args:
        boundary: returns the current state.

    Attributes:
        boundary: state after the last complete step of this call of ``train``; None before the first.
        update_interrupted: the optimizer has begun its step and has not finished: the weights belong to no step.
    """

    def __init__(self, boundary: Callable[[], Boundary]) -> None:
        self._now = boundary
        self.boundary: Boundary | None = None
        self.update_interrupted = False
        self._defers_signals = False
        self._hook: Any = None
        self._pending: tuple[int, FrameType | None] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Reset the state, and handle both signals until the end of the ``with`` block."""
        self.boundary, self.update_interrupted, self._defers_signals, self._pending = None, False, False, None
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
                if signal.getsignal(number) == self._on_signal:  # else the program has installed its own meanwhile
                    signal.signal(number, handler)

    def watch(self, optimizer: Any) -> None:
        """Register a hook that runs before each step of the optimizer, or of the one in accelerate's wrapper."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._on_optimizer_step)

    def _on_optimizer_step(self, *_: Any) -> None:
        self.update_interrupted = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Defer signals from here on."""
        self._defers_signals = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step as complete; runs before the callbacks that may raise."""
        self.update_interrupted = False
        self.boundary = self._now()

    def release_signals(self) -> None:
        """Let signals raise at once again."""
        self._defers_signals = False

    def finish_step(self) -> None:
        """Record the state in which the next step begins, and raise for a deferred signal."""
        if self.boundary is not None:
            self.boundary = self._now()
        if self._pending is not None:
            _raise_for(*self._pending)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._defers_signals or self._pending is not None:
            _raise_for(number, frame)
        self._pending = number, frame


def _raise_for(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    raise SystemExit(128 + number)


def append_line(error: BaseException, line: str) -> None:
    """Append a line to an exception's message; print it to standard error if Python would not show it."""
    notes: list[str] = [*getattr(error, "__notes__", []), line]
    error.__notes__ = notes
    if isinstance(error, SystemExit) or sys.version_info < (3, 11):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def first_sigterm_ignored() -> Iterator[None]:
    """Ignore the first SIGTERM within the block, unless the program has a handler of its own."""
    own = (
        threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    )
    if own:
        yield
        return

    def ignore_once(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ignore_once)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) == ignore_once:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
