"""Short completions share micro-batches: fewer of them, none larger, the same step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toys import FixedEngine, GradientCatcher

from grpo_ext.config import LOSS_TYPES
from grpo_ext.rollouts.batching import BatchPlan
from grpo_ext.trainer import GRPOTrainer
from grpo_ext.update.filling import filled_slices

Make = Callable[..., GRPOTrainer]


def filled(lengths: list[int], trained: list[bool], plan: BatchPlan, agree: Any = None) -> Any:
    return filled_slices(lengths, trained, plan.per_device_batch_size, plan.slices_per_step, agree)


def parts_of(order: list[int], sizes: list[int]) -> list[list[int]]:
    return [order[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def test_example() -> None:
    plan = BatchPlan(2, 1, 3, 3, 2)
    # 2 x 8 tokens at most: rows of 8 and 4; then four of 3, 2, 2 and 1.
    order, sizes = filled([3, 8, 2, 4, 2, 1], [True] * 6, plan)
    assert parts_of(order, sizes) == [[], [1, 3], [0, 2, 4, 5]]
    order, sizes = filled_slices(
        [3, 8, 2, 4, 2, 1], [True, False, True, True, True, False], plan.per_device_batch_size, plan.slices_per_step
    )
    assert parts_of(order, sizes) == [[], [3, 0], [2, 4, 1, 5]]
    assert filled_slices([3, 8], [False, False], 2, 1) == ([0, 1], [2])


def test_several_processes_fill_as_many() -> None:
    plan = BatchPlan(2, 2, 3, 3, 2)
    lengths, all_of_them = [3, 8, 2, 4, 2, 1], [True] * 6
    asked: list[list[int]] = []

    def agree(counts: list[int]) -> list[int]:
        asked.append(counts)
        return [3]

    order, sizes = filled(lengths, all_of_them, plan, agree)
    assert asked == [[2]]
    assert parts_of(order, sizes) == [[1], [3], [0, 2, 4, 5]]  # of 16 and 12 padded tokens the first is halved
    # Rows that nobody computes serve where there are not enough others, the shortest first.
    order, sizes = filled_slices(
        lengths, [False, True, False, False, False, False], plan.per_device_batch_size, plan.slices_per_step, agree
    )
    assert parts_of(order, sizes) == [[1], [5], [2, 0, 3, 4]]
    order, sizes = filled_slices(
        lengths, [False] * 6, plan.per_device_batch_size, plan.slices_per_step, lambda counts: [1]
    )
    assert parts_of(order, sizes) == [[], [], [5, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("seed", range(20))
def test_never_more_and_never_larger(seed: int) -> None:
    draw = random.Random(seed)
    accumulated = draw.randint(1, 4)
    world_size = draw.randint(1, 2)
    plan = BatchPlan(draw.randint(1, 5), world_size, accumulated, accumulated * draw.randint(1, 3), 2)
    lengths = [draw.randint(1, 40) for _ in range(plan.generation_batch_size // world_size)]
    trained = [draw.random() < 0.8 for _ in lengths]
    others = [draw.randint(1, accumulated) for _ in range(plan.steps_per_generation // accumulated)]

    needed: list[int] = []

    def agree(counts: list[int]) -> list[int]:
        needed.extend(counts)
        return [max(pair) for pair in zip(counts, others, strict=True)]

    order, sizes = filled_slices(
        lengths, trained, plan.per_device_batch_size, plan.slices_per_step, agree if world_size > 1 else None
    )
    assert sorted(order) == list(range(len(lengths)))
    assert len(sizes) == plan.steps_per_generation
    window = min(plan.gradient_accumulation_steps, plan.steps_per_generation)
    for first in range(0, len(sizes), window):
        parts = parts_of(order, sizes)[first : first + window]
        rows = range(first * plan.per_device_batch_size, (first + window) * plan.per_device_batch_size)
        assert sorted(row for part in parts for row in part) == list(rows)
        longest = max((lengths[row] for row in rows if trained[row]), default=0)
        if world_size > 1:
            full = sum(size > 0 for size in sizes[first : first + window])
            assert full == max(others[first // window], needed[first // window])
            assert all(size > 0 for size in sizes[first + window - full : first + window])
        for part in parts:
            through = [lengths[row] for row in part if trained[row]]
            assert len(through) * max(through, default=0) <= plan.per_device_batch_size * longest


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_same_gradient_from_fewer_micro_batches(make_trainer: Make, loss_type: str, skip: bool) -> None:
    """bnpo divides by the tokens of a micro-batch, which makes it another objective with every other cut."""
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "loss_type": loss_type,
        "skip_zero_gradient_sequences": skip,
        "mask_truncated_completions": True,
        "engine": FixedEngine(longest=24),
        "max_completion_length": 24,
        "reward_funcs": lambda completions, **_: [float(i % 8 < 5) for i in range(len(completions))],
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    if loss_type == "cispo":
        fields["epsilon_high"] = 5.0
    steps, logs = [], []
    for fill in (False, True):
        catcher = GradientCatcher()
        trainer = make_trainer(callbacks=[catcher], fill_micro_batches=fill, **copy.deepcopy(fields))
        trainer.train()
        steps.append(torch.cat([g.flatten() for g in catcher.steps[0].values()]))
        logs.append(trainer.state.log_history[0])
    assert logs[1]["forwards_per_micro_batch"] < logs[0]["forwards_per_micro_batch"]
    assert logs[1]["skipped_sequences"] == pytest.approx(logs[0]["skipped_sequences"])
    assert logs[1]["tokens/padded"] == logs[0]["tokens/padded"]
    if loss_type != "bnpo":
        assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-4, abs=1e-6)
        assert float((steps[1] - steps[0]).norm()) <= 5e-6 * float(steps[0].norm())


def test_bnpo_divides_by_all_tokens(make_trainer: Make) -> None:
    """With filled micro-batches it is the mean over the tokens of the whole step, which dapo's divisor is, too."""
    steps = []
    for loss_type in ("bnpo", "dapo"):
        catcher = GradientCatcher()
        make_trainer(
            callbacks=[catcher], fill_micro_batches=True, loss_type=loss_type, per_device_train_batch_size=4,
            gradient_accumulation_steps=4, engine=FixedEngine(), max_steps=1, max_grad_norm=0.0, optim="sgd",
        ).train()  # fmt: skip
        steps.append(torch.cat([g.flatten() for g in catcher.steps[0].values()]))
    assert float((steps[1] - steps[0]).norm()) <= 5e-6 * float(steps[0].norm())
