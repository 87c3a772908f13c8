"""Rewards computed while other completions are still being generated: really beside, and the same to the bit."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import EOS, FixedEngine, build_model, reward_number

from grpo_ext.generation.engine import Completions, SamplingParams, TransformersEngine
from grpo_ext.generation.vllm import EngineError
from grpo_ext.rollouts.rewards import RewardFunctions
from grpo_ext.rollouts.scoring import Scoring
from grpo_ext.trainer import GRPOTrainer, RewardError

Make = Callable[..., GRPOTrainer]


class OneByOne(FixedEngine):
    """Hands over the completions of `FixedEngine` one after the other, with a pause (or anything else) before each."""

    def __init__(self, before: Callable[[int], Any], **fields: Any) -> None:
        super().__init__(**fields)
        self.before = before

    def generate(
        self, model: Any, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams, done: Any = None
    ) -> Completions:
        completions = super().generate(model, prompt_ids, sampling)
        for index, ids in enumerate(completions.ids):
            self.before(index)
            if done is not None:
                done(index, ids)
        return completions


def slow(completions: list[str], **_: Any) -> list[float]:
    """A judge that takes its time with each completion."""
    time.sleep(0.05 * len(completions))
    return reward_number(completions)


def test_scoring_takes_no_time_of_its_own(make_trainer: Make) -> None:
    """Six completions of 50 ms each, and 50 ms to score each: all but the last group's scoring is hidden."""
    logs = {}
    for beside in (False, True):
        engine = OneByOne(lambda _: time.sleep(0.05))
        trainer = make_trainer(reward_funcs=slow, engine=engine, max_steps=1, score_while_generating=beside)
        trainer.train()
        logs[beside] = trainer.state.log_history[0]
    assert "time/rewards_hidden" not in logs[False]
    spent = {beside: log["time/generation"] + log["time/rewards"] for beside, log in logs.items()}
    assert spent[False] >= 0.6
    assert spent[True] < 0.8 * spent[False]
    assert logs[False]["time/rewards"] >= 0.3
    assert 0.15 <= logs[True]["time/rewards_hidden"] <= logs[True]["time/generation"]
    assert logs[True]["reward"] == logs[False]["reward"]


def test_a_group_is_scored_before_the_next_is_there(make_trainer: Make) -> None:
    """No clock: the last group is generated only after the first has been scored."""
    scored = threading.Event()

    def reward(completions: list[str], **_: Any) -> list[float]:
        scored.set()
        return reward_number(completions)

    def before(index: int) -> None:
        assert index < 4 or scored.wait(20), "nothing was scored while the engine was at work"

    make_trainer(reward_funcs=reward, engine=OneByOne(before), max_steps=1, score_while_generating=True).train()


async def by_answer(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    await asyncio.sleep(0.001 * (int(answer[0]) % 3))
    return [None if int(a) % 4 == 0 else len(c) / 50 for a, c in zip(answer, completions, strict=True)]


@pytest.mark.parametrize("changes", [{}, {"shuffle_completions": True, "share_prompts": False, "num_generations": 3}])
def test_the_same_run_to_the_bit(make_trainer: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = {}
    for beside in (False, True):
        trainer = make_trainer(
            reward_funcs=[reward_number, by_answer],
            reward_weights=[1.0, 0.5],
            max_steps=3,
            output_dir=str(tmp_path / str(beside)),
            score_while_generating=beside,
            **changes,
        )
        trainer.train()
        files = sorted((tmp_path / str(beside) / "completions").iterdir())
        records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        runs[beside] = records, weights, [log.get("reward") for log in trainer.state.log_history]
    assert len(runs[True][0]) == 18
    assert len({record["rewards"]["reward_number"] for record in runs[True][0]}) > 5
    assert any(record["rewards"]["by_answer"] is None for record in runs[True][0])
    assert runs[True][0] == runs[False][0]
    assert torch.equal(runs[True][1], runs[False][1])
    assert runs[True][2] == runs[False][2]


def test_an_engine_tells_of_each_row_once_and_early() -> None:
    model, prompts = build_model(), [[5, 8, 6], [5, 8, 6], [7], [5, 9, 9, 6]] * 4
    steps: list[int] = []
    told: list[tuple[int, int, list[int]]] = []
    model.model.register_forward_hook(lambda *_: steps.append(1))
    engine = TransformersEngine([EOS, 9], 1)
    torch.manual_seed(3)
    got = engine.generate(model, prompts, SamplingParams(12), lambda row, ids: told.append((len(steps), row, ids)))
    torch.manual_seed(3)
    alone = engine.generate(model, prompts, SamplingParams(12))
    assert got == alone
    assert sorted((row, ids) for _, row, ids in told) == list(enumerate(got.ids))
    assert {True, False} == set(got.finished)
    assert min(at for at, _, _ in told) < max(at for at, _, _ in told)


def scoring(functions: Any, parts: int, each: int = 2) -> Scoring:
    result = Scoring(RewardFunctions(functions), parts * each)
    for part in range(parts):
        positions = [part, part + parts]
        result.add(positions, ["p"] * each, [str(p) for p in positions], [[p] for p in positions], {"n": positions})
    return result


def test_async_functions_of_all_parts_run_together_and_plain_ones_never() -> None:
    begun = [0]

    async def judge(completions: list[str], **_: Any) -> list[float]:
        begun[0] += 1
        await asyncio.wait_for(all_begun(), 60)  # ends only if the four parts are judged together
        return [float(c) for c in completions]

    async def all_begun() -> None:
        while begun[0] < 4:
            await asyncio.sleep(0.01)

    busy = threading.Lock()

    def plain(n: list[int], **_: Any) -> list[float]:
        assert busy.acquire(blocking=False), "two calls at a time"
        asyncio.run(asyncio.sleep(0.01))  # some reward functions run a loop of their own
        busy.release()
        return [2.0 * i for i in n]

    with scoring([judge, plain], 4) as parts:
        rewards, _ = parts.finish()
    assert rewards.tolist() == [[float(i), 2.0 * i] for i in range(8)]


def test_errors_name_the_function_and_no_thread_stays() -> None:
    async def later(**_: Any) -> list[float]:
        raise KeyError("answer")

    waited: list[bool] = []

    async def never(**_: Any) -> list[float]:
        await asyncio.sleep(60)
        waited.append(True)
        return []

    with pytest.raises(RewardError, match="reward function 'later' raised KeyError"), scoring([later], 2) as parts:
        parts.finish()
    with pytest.raises(RewardError, match=r"returned 1 value\(s\) for 2"), scoring(lambda **_: [1.0], 2) as parts:
        parts.finish()
    with pytest.raises(EngineError, match="died"), scoring([never], 2):
        raise EngineError("died")
    assert not waited
    parts = scoring(slow, 1)
    parts.rows = 3
    with pytest.raises(ValueError, match="1 of 3 completions were never added for scoring"), parts:
        parts.finish()
    assert not [t.name for t in threading.enumerate() if "rewards" in t.name]


def test_a_reward_error_ends_the_run(make_trainer: Make) -> None:
    def broken(**_: Any) -> list[float]:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(RewardError, match="reward function 'broken' raised ZeroDivisionError"):
        make_trainer(reward_funcs=broken, score_while_generating=True).train()
