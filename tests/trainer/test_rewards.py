"""Several reward functions, sync and async, None and NaN, and errors that name the function."""

from __future__ import annotations

import asyncio
import copy
import functools
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch

from grpo_ext.rollouts.rewards import RewardError, RewardFunctions, reward_metrics


def call(functions: Any, n: int = 3, weights: list[float] | None = None, **columns: list[Any]) -> torch.Tensor:
    rewards = RewardFunctions(functions, weights)
    texts = [f"text {i}" for i in range(n)]
    return rewards([f"prompt {i}" for i in range(n)], texts, [[i, 0] for i in range(n)], columns)


def test_values_columns_and_none() -> None:
    def length(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert prompts[1] == "prompt 1"
        return [len(ids) + len(text) for ids, text in zip(completion_ids, completions, strict=True)]

    def match(answer: list[str], **_: Any) -> list[float | None]:
        return [None if a == "?" else float(a) for a in answer]

    rewards = call([length, match], answer=["1", "?", "0.5"])
    expected = torch.tensor([[8.0, 1.0], [8.0, math.nan], [8.0, 0.5]])
    torch.testing.assert_close(rewards, expected, equal_nan=True)


def test_functions_take_only_what_they_name() -> None:
    def by_answer(answer: list[str]) -> list[float]:
        return [float(a) for a in answer]

    assert call(by_answer, answer=["1", "2", "3"]).tolist() == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("convert", [np.array, torch.tensor, tuple, iter])
def test_other_containers(convert: Any) -> None:
    assert call(lambda **_: convert([1.0, 2.0, 3.0])).tolist() == [[1.0], [2.0], [3.0]]


def test_async_functions_run_together() -> None:
    """Each waits until the other has begun."""
    begun = asyncio.Event(), asyncio.Event()

    async def meet(own: int) -> None:
        begun[own].set()
        await asyncio.wait_for(begun[1 - own].wait(), 60)

    async def one(completions: list[str], **_: Any) -> list[float]:
        await meet(0)
        return [1.0] * len(completions)

    async def other(completions: list[str], **_: Any) -> list[float]:
        await meet(1)
        return [2.0] * len(completions)

    def plain(completions: list[str], **_: Any) -> list[float]:
        return [3.0] * len(completions)

    assert call([one, plain, other])[0].tolist() == [1.0, 3.0, 2.0]


def test_async_inside_a_running_loop() -> None:
    async def one(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    async def notebook() -> torch.Tensor:
        return call(one)

    assert asyncio.run(notebook()).tolist() == [[1.0]] * 3


def test_each_function_gets_copies_of_its_own() -> None:
    """Rows of a group hold one object: changing one row's changes neither the others' nor the dataset's."""
    message, extra, shared = {"role": "user", "content": "add"}, {"answer": [1]}, threading.Lock()
    seen: list[Any] = []

    def spoil(prompts: list[Any], completions: list[Any], completion_ids: list[Any], extra: list[Any], lock: list[Any]):
        seen.append(copy.deepcopy((prompts, completions, completion_ids, extra)))
        assert lock == [shared, shared]  # what cannot be copied
        prompts[0][0]["content"] = completions[0][0]["content"] = "spoilt"
        completion_ids[0].append(9)
        extra[0]["answer"].append(2)
        assert extra[1]["answer"] == [1]
        for values in (prompts, completions, completion_ids, extra):
            values.pop()
        return [0.0, 0.0]

    async def later(**arguments: Any) -> list[float]:
        return spoil(**arguments)

    prompts, ids = [[message]] * 2, [[5, 0], [6, 0]]
    completions = [[{"role": "assistant", "content": str(i)}] for i in range(2)]
    given = copy.deepcopy((prompts, completions, ids, [extra] * 2))
    RewardFunctions([spoil, later, spoil])(prompts, completions, ids, {"extra": [extra] * 2, "lock": [shared] * 2})
    assert seen == [given] * 3
    assert (prompts, completions, ids, [extra] * 2) == given


def raises(**_: Any) -> list[float]:
    raise KeyError("answer")


async def raises_later(**_: Any) -> list[float]:
    raise KeyError("answer")


def too_few(**_: Any) -> list[float]:
    return [1.0]


def one_number(**_: Any) -> float:
    return 1.0


def words(**_: Any) -> list[str]:
    return ["good", "bad", "good"]


def infinite(**_: Any) -> list[float]:
    return [1.0, math.inf, 0.0]


def too_large(**_: Any) -> list[float]:
    return [1.0, 1e39, 0.0]


def far_too_large(**_: Any) -> list[float]:
    return [1.0, 10**400, 0.0]


def digits(**_: Any) -> list[str]:
    return ["1", "2", "3"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "reward function 'raises' raised KeyError: 'answer'"),
        (raises_later, "reward function 'raises_later' raised KeyError: 'answer'"),
        (too_few, r"reward function 'too_few' returned 1 value\(s\) for 3 completions"),
        (one_number, "reward function 'one_number' returned float: return a list of 3 numbers"),
        (words, "reward function 'words' returned 'good' for completion 0"),
        (infinite, "reward function 'infinite' returned inf for completion 1"),
        (
            too_large,
            r"reward function 'too_large' returned 1e\+39 for completion 1: .* float32, at most 3.4e38; scale it",
        ),
        (
            far_too_large,
            "reward function 'far_too_large' returned a number beyond 1.7e308 for completion 1: .* scale it",
        ),
        (digits, "reward function 'digits' returned '1' for completion 0: return a number or None"),
    ],
)
def test_error_names_the_function(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        call([lambda completions, **_: [0.0] * len(completions), function])


def test_cause_is_kept() -> None:
    with pytest.raises(RewardError) as caught:
        call(raises)
    assert isinstance(caught.value.__cause__, KeyError)


def test_nan_is_no_reward() -> None:
    assert call(lambda **_: [1.0, math.nan, 0.0])[1].isnan().all()


@pytest.mark.parametrize(
    ("functions", "weights", "error", "message"),
    [
        ([], None, ValueError, "reward_funcs is empty"),
        ("a/reward-model", None, TypeError, "reward_funcs holds str"),
        (torch.nn.Linear(1, 1), None, TypeError, "reward_funcs holds Linear"),
        ([raises], [1.0, 2.0], ValueError, r"reward_weights has 2 value\(s\) for 1 reward function"),
    ],
)
def test_wrong_functions(functions: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RewardFunctions(functions, weights)


def test_names() -> None:
    class Scorer:
        def __call__(self, **_: Any) -> list[float]:
            return []

    names = RewardFunctions([raises, functools.partial(raises), Scorer(), raises]).names
    assert names == ["raises", "raises_2", "Scorer", "raises_3"]


def test_metrics() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, 0.0], [3.0, nan], [2.0, 1.0], [2.0, 1.0], [nan, nan], [nan, nan]])
    metrics = reward_metrics(rewards, 2, ["a", "b"], [1.0, 2.0])
    assert metrics["reward"] == pytest.approx((1 + 3 + 4 + 4) / 4)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(2) / 3)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert metrics["rewards/a/mean"] == 2.0
    assert metrics["rewards/b/mean"] == pytest.approx(2 / 3)
    assert metrics["rewards/a/std"] == pytest.approx(math.sqrt(2 / 3))
