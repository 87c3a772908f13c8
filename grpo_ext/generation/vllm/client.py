"""The interface of `VllmEngine` to vLLM, in this process or on a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

#: Pairs of checkpoint name and tensor, in any order.
Weights = Iterable[tuple[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completion.

    Attributes:
        ids: its token ids, the end token included.
        logps: the log probability of each token under the distribution it was sampled from.
        first: token id → log probability of the most probable first tokens; empty unless requested.
    """

    ids: list[int]
    logps: list[float]
    first: dict[int, float]


#: Callback for a finished answer: index of the prompt, and the answer.
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
        """Generate one completion per prompt, in order.

        Args:
            prompt_ids: token ids of each prompt.
            fields: fields of vLLM's SamplingParams, see `sampling_fields`.
            top: number of log probabilities to report for the first token.
            answered: called once per answer, in any order, in this thread, as soon as the answer is complete.
        """
        ...

    def load_weights(self, weights: Weights) -> None:
        """Replace all weights. Every process reads all pairs, because reading may be a collective."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Load the adapter in ``folder`` under a new id, and generate with it from now on."""
        ...

    def reset_cache(self) -> None:
        """Empty the prefix cache."""
        ...

    def sleep(self, level: int) -> None:
        """Release the engine's memory: level 1 keeps the weights in host memory, level 2 discards them."""
        ...

    def wake(self, tags: list[str]) -> None:
        """Allocate the memory of ``weights`` or ``kv_cache`` again."""
        ...

    def close(self) -> None:
        """Stop the engine if it runs in this process, and remove the files written for it."""
        ...


@runtime_checkable
class Restartable(Protocol):
    """A `Client` whose vLLM may restart between two calls, which resets its weights."""

    def started(self) -> str | None:
        """A value that changes with each start of vLLM; None if unknown. Only rank 0 needs a value."""
        ...
