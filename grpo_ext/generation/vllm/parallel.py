"""Coordinate several trainer processes that use vLLM: shared errors, and groups of ranks that share one engine."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from grpo_ext.generation.errors import EngineError, PromptLengthError, WeightMismatchError

T = TypeVar("T")

#: Errors that keep their type when the other ranks raise them; the rest become `EngineError`.
KINDS: dict[str, type[EngineError]] = {kind.__name__: kind for kind in (WeightMismatchError, PromptLengthError)}


class Ranks:
    """The trainer's processes, in groups that share one engine.

    Args:
        accelerator: the trainer's; None for one process.
        tensor_parallel_size: number of consecutive ranks that share one engine.
        seed: base seed of the groups' random numbers.
    """

    def __init__(self, accelerator: Any = None, tensor_parallel_size: int = 1, seed: int = 0) -> None:
        self.count = 1 if accelerator is None else int(accelerator.num_processes)
        self.rank = 0 if accelerator is None else int(accelerator.process_index)
        self.tensor_parallel_size = tensor_parallel_size
        self.seed = seed
        self._drawn: Counter[tuple[int, int]] = Counter()
        self._group: Any = None
        if tensor_parallel_size > 1:
            ranks = list(range(self.count))
            groups = [ranks[i : i + tensor_parallel_size] for i in range(0, self.count, tensor_parallel_size)]
            self._group, _ = torch.distributed.new_subgroups_by_enumeration(groups)

    def jointly(self, work: Callable[[], T]) -> T:
        """Run ``work()`` on all ranks. If one rank fails, all raise: no rank may hang in a later collective."""
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as raised:  # after the collective below
            error = raised
        if self.count > 1:
            mine = None if error is None else (self.rank, type(error).__name__, str(error))
            seen: list[Any] = [None] * self.count
            torch.distributed.all_gather_object(seen, mine)
            first = next((s for s in seen if s is not None), None)
            if error is None and first is not None:
                raise KINDS.get(first[1], EngineError)(f"rank {first[0]}: {first[2]}")
        if error is not None:
            raise error
        return result

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            torch.distributed.barrier()

    def shared(self, value: T) -> T:
        """Broadcast rank 0's value to all ranks."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], slice]:
        """All prompts of this rank's group, which must be equal on its ranks, and the slice of this rank's own."""
        own = [list(prompt) for prompt in prompts]
        if self._group is None:
            return own, slice(0, len(own))
        parts: list[Any] = [None] * self.tensor_parallel_size
        torch.distributed.all_gather_object(parts, own, group=self._group)
        place = self.rank % self.tensor_parallel_size
        start = sum(len(part) for part in parts[:place])
        return [prompt for part in parts for prompt in part], slice(start, start + len(own))

    @contextlib.contextmanager
    def same_draws(self, step: int, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Give all ranks of a group the same random numbers, because each rank samples separately.

        The seed depends on the base seed, the group, the step, the prompts, and the number of earlier calls for the
        same step and prompts. An evaluation on other prompts, or a resume, does not change the samples of training.
        """
        if self._group is None:
            yield
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            group = self.rank // self.tensor_parallel_size
            drawn = step, hash(tuple(map(tuple, prompts)))
            if any(of_step != step for of_step, _ in self._drawn):
                self._drawn.clear()
            torch.manual_seed(hash((self.seed, group, *drawn, self._drawn[drawn])) & 0x7FFFFFFF)
            self._drawn[drawn] += 1
            yield
