"""What goes wrong with generation. The trainer saves a checkpoint before it passes one of these on."""

from __future__ import annotations


class EngineError(RuntimeError):
    """A generation engine that could not start, died or did not answer; the message says what to do."""


class WeightMismatchError(EngineError):
    """The engine's probabilities are not those of the trainer's weights."""


class PromptError(EngineError, ValueError):
    """A dataset's row without a prompt, or a prompt that cannot be encoded; names the row, and the remedy."""


class PromptLengthError(PromptError):
    """A prompt that leaves no room for a completion; the message says what to change."""
