"""Call the reward functions, plain or async, with the dataset's columns, and check their results."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_ext.advantages import weighted_rewards
from grpo_ext.config import FLOAT32_LARGEST

RewardFunction = Callable[..., Any]


class RewardError(RuntimeError):
    """A reward function raised, or did not return one reward per completion."""


class RewardFunctions:
    """The reward functions of a run.

    Args:
        functions: one function or several, each ``f(prompts, completions, completion_ids, **columns)``
            returning one number per completion, or None if it does not apply. Unused arguments may be omitted from
            the signature. Each call receives deep copies, except of objects that cannot be copied.
        weights: one factor per function, None = 1.0 each.

    Raises:
        TypeError: an entry is not callable.
        ValueError: no function, or not one weight per function.
    """

    def __init__(
        self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None
    ) -> None:
        several = isinstance(functions, (list, tuple))
        self.functions: list[RewardFunction] = list(functions) if several else [functions]  # type: ignore[arg-type,list-item]
        if not self.functions:
            raise ValueError("reward_funcs is empty: pass at least one reward function")
        for function in self.functions:
            if not callable(function) or isinstance(function, torch.nn.Module):
                raise TypeError(
                    f"reward_funcs holds {type(function).__name__}: pass functions "
                    "f(prompts, completions, completion_ids, **columns) -> list of numbers"
                )
        if weights is not None and len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} value(s) for {len(self.functions)} reward function(s): "
                "pass one weight per function"
            )
        self.weights = list(weights) if weights is not None else [1.0] * len(self.functions)
        self.names = _unique_names(self.functions)
        self._accepts = [_accepted_arguments(function) for function in self.functions]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> Tensor:
        """Compute the rewards of n completions.

        Async functions run concurrently, after the plain functions have returned.

        Returns:
            ``(n, functions)`` fp32 on the CPU, NaN if a function does not apply.

        Raises:
            RewardError: a function raised or returned something else; the message names it.
        """
        results = self.begin(prompts, completions, completion_ids, columns)
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            done = _run_together([results[i] for i in waiting])
            for i, result in zip(waiting, done, strict=True):
                results[i] = result
        return self.check(results, len(prompts))

    def begin(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> list[Any]:
        """Call every function; an async function gives an awaitable.

        Raises:
            RewardError: a function raised; the message names it.
        """
        arguments = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(ids) for ids in completion_ids],
        }
        results: list[Any] = []
        for function, name, accepts in zip(self.functions, self.names, self._accepts, strict=True):
            chosen = {k: _copies(v) for k, v in arguments.items() if accepts is None or k in accepts}
            try:
                results.append(function(**chosen))
            except Exception as error:
                _close(results)
                raise _raised(name, error) from error
        return results

    def check(self, results: Sequence[Any], n: int) -> Tensor:
        """Convert the awaited results of `begin`, exceptions included, to ``(n, functions)`` fp32.

        Raises:
            RewardError: a function raised or did not return n numbers; the message names it.
        """
        for name, result in zip(self.names, results, strict=True):
            if isinstance(result, BaseException):
                raise _raised(name, result) from result
        return torch.stack([_check(result, name, n) for result, name in zip(results, self.names, strict=True)], dim=1)


def reward_metrics(
    rewards: Tensor, num_generations: int, names: Sequence[str], weights: Sequence[float]
) -> dict[str, float]:
    """Metrics of the rewards of whole groups.

    Args:
        rewards: ``(n, functions)``, NaN if a function does not apply; the rows of a group are adjacent.
        num_generations: rows per group.
        names, weights: one per function.

    Returns:
        ``reward`` (mean of the weighted sums), ``reward_std`` (mean over groups of the unbiased deviation),
        ``frac_reward_zero_std`` (share of groups whose rewards are all equal) and, per function,
        ``rewards/<name>/mean`` and ``/std``. Rows without any reward are ignored; NaN if no row remains.
    """
    total = weighted_rewards(rewards.double(), list(weights))
    groups = [group[~group.isnan()] for group in total.view(-1, num_generations)]
    spread = [float(group.std()) if len(group) > 1 else 0.0 for group in groups]
    equal = [len(group) == 0 or bool((group == group[0]).all()) for group in groups]
    metrics = {
        "reward": float(total.nanmean()),
        "reward_std": sum(spread) / len(spread),
        "frac_reward_zero_std": sum(equal) / len(equal),
    }
    for index, name in enumerate(names):
        column = rewards[:, index].double()
        column = column[~column.isnan()]
        metrics[f"rewards/{name}/mean"] = float(column.mean()) if len(column) else math.nan
        metrics[f"rewards/{name}/std"] = float(column.std()) if len(column) > 1 else 0.0
    return metrics


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        inner = getattr(function, "func", function)  # functools.partial
        name = getattr(inner, "__name__", type(inner).__name__)
        repeats = sum(known == name or known.startswith(f"{name}_") for known in names)
        names.append(f"{name}_{repeats + 1}" if name in names else name)
    return names


def _accepted_arguments(function: RewardFunction) -> frozenset[str] | None:
    """Names of the arguments that a function accepts; None if it accepts any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _run_together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    # A notebook already runs an event loop in this thread: use another thread.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, gather()).result()


def _copies(values: Sequence[Any]) -> list[Any]:
    """Deep-copy each value separately: the rows of a group share the dataset's objects."""
    return [_copy(value) for value in values]


def _copy(value: Any) -> Any:
    if type(value) is list and set(map(type, value)) == {int}:  # token ids: deepcopy is slow
        return value.copy()
    try:
        return copy.deepcopy(value)
    except Exception:  # share what cannot be copied, such as a lock
        return value


def _close(results: Sequence[Any]) -> None:
    for result in results:
        if inspect.iscoroutine(result):
            result.close()


def _raised(name: str, error: BaseException) -> RewardError:
    return RewardError(f"reward function {name!r} raised {type(error).__name__}: {error}")


def _check(result: Any, name: str, n: int) -> Tensor:
    """Convert the result of one function to ``(n,)`` fp32, None to NaN."""
    try:
        values = result.tolist() if hasattr(result, "tolist") else list(result)
    except TypeError:
        raise RewardError(
            f"reward function {name!r} returned {type(result).__name__}: return a list of {n} numbers"
        ) from None
    if not isinstance(values, list) or len(values) != n:
        count = len(values) if isinstance(values, list) else 1
        raise RewardError(
            f"reward function {name!r} returned {count} value(s) for {n} completions: return one for each "
            "(None if it does not apply)"
        )
    return torch.tensor([_number(value, name, index) for index, value in enumerate(values)], dtype=torch.float32)


def _number(value: Any, name: str, index: int) -> float:
    """Convert one reward, None to NaN."""
    returned = f"reward function {name!r} returned"
    remedy = f"for completion {index}: rewards must be finite in float32, at most 3.4e38; scale it (None or NaN if it "
    remedy += "does not apply)"
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise RewardError(f"{returned} {value!r} for completion {index}: return a number or None") from None
    except OverflowError:
        raise RewardError(f"{returned} a number beyond 1.7e308 {remedy}") from None
    if abs(number) > FLOAT32_LARGEST:
        raise RewardError(f"{returned} {number} {remedy}")
    return number
