"""Score completions in background threads while generation continues."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from grpo_ext.rollouts.rewards import RewardFunctions


class Scoring:
    """Score a batch in parts: every added part is one call of each reward function.

    Plain functions run in one thread, one call at a time, so they need not be thread-safe. Async functions run
    concurrently in an event loop, also those of different parts. Exiting the context cancels calls that have not
    started, cancels async calls, and waits for the running plain call.

    Args:
        rewards: the functions.
        rows: completions of the whole batch.
        device: set as the current device of the functions' thread if it is a GPU.
    """

    def __init__(self, rewards: RewardFunctions, rows: int, device: torch.device | None = None) -> None:
        self.rewards = rewards
        self.rows = rows
        self._device = device if device is not None and device.type == "cuda" else None
        self._plain = concurrent.futures.ThreadPoolExecutor(1, "rewards", self._use_device)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None
        self._parts: list[tuple[list[int], concurrent.futures.Future[list[Any]]]] = []
        self._lock = threading.Lock()
        self._running = 0
        self._busy = self._since = 0.0

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plain.shutdown(wait=True, cancel_futures=True)
        if self._loop is None or self._loop_thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join()
        self._loop.close()

    def add(
        self,
        positions: Sequence[int],
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> None:
        """Submit completions for scoring, without waiting for the result.

        Args:
            positions: rows of the completions in the batch.
            prompts, completions, completion_ids, columns: arguments of the reward functions.
        """
        self._count(1)
        part = self._plain.submit(self._begin, prompts, completions, completion_ids, columns)
        part.add_done_callback(lambda _: self._count(-1))
        self._parts.append((list(positions), part))

    def finish(self) -> tuple[Tensor, float]:
        """Wait for the pending calls, after generation has ended.

        Returns:
            ``(rows, functions)`` rewards as `RewardFunctions` returns them, and the seconds of scoring that overlapped
            with generation.

        Raises:
            RewardError: a function raised or returned something else; the message names it.
            ValueError: some rows were never added.
        """
        with self._lock:
            hidden = self._busy + (time.perf_counter() - self._since if self._running else 0.0)
        missing = self.rows - sum(len(positions) for positions, _ in self._parts)
        if missing:
            raise ValueError(f"{missing} of {self.rows} completions were never added for scoring")
        result = torch.empty((self.rows, len(self.rewards.functions)))
        for positions, part in self._parts:
            results = [_result(value) for value in part.result()]
            result[positions] = self.rewards.check(results, len(positions))
        return result, hidden

    def _begin(self, *arguments: Any) -> list[Any]:
        """Call the functions, and start the awaitables of async functions."""
        results = self.rewards.begin(*arguments)
        return [self._start(result) if inspect.isawaitable(result) else result for result in results]

    def _start(self, awaitable: Any) -> concurrent.futures.Future[Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True)
            self._loop_thread.start()
        self._count(1)
        future = asyncio.run_coroutine_threadsafe(_await(awaitable), self._loop)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def _count(self, change: int) -> None:
        """Update the number of running calls, and the time during which at least one runs."""
        with self._lock:
            now = time.perf_counter()
            if self._running == 0:
                self._since = now
            self._running += change
            if self._running == 0:
                self._busy += now - self._since

    def _use_device(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _cancel_tasks() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _result(value: Any) -> Any:
    """The result of a function, or the exception of an async function."""
    if not isinstance(value, concurrent.futures.Future):
        return value
    try:
        return value.result()
    except Exception as error:
        return error
