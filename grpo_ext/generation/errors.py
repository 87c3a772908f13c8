"""Errors of generation. The trainer saves a checkpoint before it raises one of them."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine did not start, died or did not answer. The message contains the remedy."""


class WeightMismatchError(EngineError):
    """The engine's log probabilities do not match the trainer's weights."""


class PromptError(EngineError, ValueError):
    """A prompt is missing or cannot be encoded. The message contains the row and the remedy."""


class PromptLengthError(PromptError):
    """A prompt and its completion do not fit the context. The message contains the remedy."""
