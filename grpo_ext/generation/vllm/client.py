"""What `VllmEngine` needs of a vLLM, wherever it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

#: Names of checkpoint files and their tensors, in any order.
Weights = Iterable[tuple[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completion.

    Attributes:
        ids: its token ids, the end token included.
        logps: the log probability of each, of the distribution it was drawn from.
        first: log probabilities of the most probable first tokens, by id; empty unless they were asked for.
    """

    ids: list[int]
    logps: list[float]
    first: dict[int, float]


#: Called with the index of a prompt and its answer as soon as that is complete.
Answered = Callable[[int, Answer], None]


class Client(Protocol):
    """One vLLM: in this process (`ColocatedClient`) or behind HTTP (`ServerClient`)."""

    max_model_len: int

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        fields: dict[str, Any],
        top: int = 0,
        answered: Answered | None = None,
    ) -> list[Answer]:
        """One completion per prompt, in order.

        Args:
            prompt_ids: token ids of each prompt.
            fields: of vLLM's SamplingParams, see `sampling_fields`.
            top: how many of the first token's log probabilities to report.
            answered: hears of each answer once, in any order, from this thread, while others are still on their way.
        """
        ...

    def load_weights(self, weights: Weights) -> None:
        """Replace all weights; every pair is read, whether this process has a use for it or not."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Generate with the adapter saved in ``folder`` from now on, under an id that was never used before."""
        ...

    def reset_cache(self) -> None:
        """Forget the keys and values of earlier prompts."""
        ...

    def sleep(self, level: int) -> None:
        """Give up the engine's memory: level 1 keeps the weights in host memory, 2 drops them."""
        ...

    def wake(self, tags: list[str]) -> None:
        """Take back the memory of ``weights`` or ``kv_cache``."""
        ...

    def close(self) -> None:
        """Stop the engine, if it is this process's, and remove what was written for it."""
        ...


@runtime_checkable
class Restartable(Protocol):
    """A `Client` whose vLLM someone else may start anew between two calls: it then holds other weights."""

    def started(self) -> str | None:
        """Another value after each start, and on rank 0 at least; None when the vLLM does not say."""
        ...
