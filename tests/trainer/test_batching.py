"""SPEC section 7: the four tables, the rules of the batch numbers with their messages, and the order of prompts."""

from __future__ import annotations

import warnings

import pytest

from grpo_ext.rollouts.batching import BatchPlan, MicroStep, PromptSchedule, plan_batches


def quiet_plan(*args: int, **kwargs: int) -> BatchPlan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan_batches(*args, **kwargs)


def run_micro_batches(schedule: PromptSchedule, count: int) -> list[str]:
    """Prompt index per row of the first micro-batches of a one-GPU run, and ``|`` after each optimizer step."""
    plan = schedule.plan
    shown = []
    for step in range(count):
        place = schedule.locate(step)
        rows = schedule.rows(*place.epoch_and_generation)
        shown.append("".join(f"{rows[r]:x}" for r in plan.rank_rows(0, place.slice_index)))
        if (step + 1) % plan.gradient_accumulation_steps == 0:
            shown[-1] += "|"
    return shown


# P, GA, spg, G, micro-batches of cycles A and B; "|" marks an optimizer step
TABLES = [
    (3, 2, 4, 3, ["000", "111|", "222", "333|", "444", "555|", "666", "777|"]),
    (3, 4, 4, 3, ["000", "111", "222", "333|", "444", "555", "666", "777|"]),
    (3, 4, 4, 4, ["000", "011", "112", "222|", "333", "344", "445", "555|"]),
    (6, 2, 2, 3, ["000111", "222333|", "444555", "666777|"]),
]


@pytest.mark.parametrize(("p", "ga", "spg", "g", "expected"), TABLES)
def test_worked_examples(p: int, ga: int, spg: int, g: int, expected: list[str]) -> None:
    plan = plan_batches(p, 1, ga, g, steps_per_generation=spg)
    schedule = PromptSchedule(plan.unique_prompts * 2, plan, shuffle=False)
    assert run_micro_batches(schedule, len(expected)) == expected


@pytest.mark.parametrize(("p", "ga", "spg", "g", "expected"), TABLES)
def test_replays_use_the_same_slices(p: int, ga: int, spg: int, g: int, expected: list[str]) -> None:
    plan = plan_batches(p, 1, ga, g, num_iterations=2, steps_per_generation=spg)
    schedule = PromptSchedule(plan.unique_prompts * 2, plan, shuffle=False)
    cycle_a, cycle_b = expected[:spg], expected[spg:]
    assert run_micro_batches(schedule, 4 * spg) == cycle_a * 2 + cycle_b * 2


def test_derived_numbers() -> None:
    plan = plan_batches(3, 2, 2, 3, steps_per_generation=4)
    assert plan.generation_batch_size == 24
    assert plan.optimizer_steps_per_generation == 2
    assert plan.unique_prompts == 8
    assert plan_batches(8, 1, 4, 8).steps_per_generation == 4
    assert plan_batches(8, 1, 4, 8, generation_batch_size=64).steps_per_generation == 8


def test_ranks_share_each_slice_as_one_process_would() -> None:
    two, one = plan_batches(4, 2, 2, 4, steps_per_generation=4), plan_batches(8, 1, 2, 4, steps_per_generation=4)
    for index in range(4):
        assert [*two.rank_rows(0, index), *two.rank_rows(1, index)] == list(one.rank_rows(0, index))
    assert sorted(two.gathered_rows()) == list(range(two.generation_batch_size))
    assert two.gathered_rows()[: len(two.local_rows(0))] == two.local_rows(0)


def test_on_policy_until_the_first_optimizer_step() -> None:
    plan = quiet_plan(4, 1, 2, 2, steps_per_generation=4)
    assert [plan.is_on_policy(8, step) for step in range(4)] == [True, True, False, False]
    # one optimizer step spans two generations: the second starts in the middle of a window
    plan = quiet_plan(4, 1, 4, 2, steps_per_generation=2, num_iterations=2)
    assert [plan.is_on_policy(4, step) for step in range(4)] == [True] * 4
    assert [plan.is_on_policy(6, step) for step in range(4)] == [True, True, False, False]


def test_group_of_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_generations must be at least 2, got 1"):
        plan_batches(8, 1, 1, 1)


def test_batch_is_raised_to_the_group() -> None:
    with pytest.warns(UserWarning, match="per_device_train_batch_size is raised from 2 to 8"):
        plan = plan_batches(2, 1, 3, 8)
    assert plan.per_device_batch_size == 8
    assert plan.generation_batch_size == 24
    with pytest.warns(UserWarning, match="raised from 12 to 16"):
        assert plan_batches(12, 1, 1, 8).unique_prompts == 2


def test_batch_that_holds_whole_groups_together_stays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_batches(3, 1, 4, 4).per_device_batch_size == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps_per_generation": 2, "generation_batch_size": 16}, r"steps_per_generation \(2\) and generation_"),
        ({"generation_batch_size": 20}, r"generation_batch_size \(20\) must be divisible by num_generations \(8\)"),
        ({"generation_batch_size": 24}, r"\(24\) must be divisible by .*\(8 \* 2 = 16\)"),
        ({"steps_per_generation": 3}, r"steps_per_generation \(3\) and gradient_accumulation_steps \(2\)"),
        ({"steps_per_generation": 0}, "steps_per_generation must be at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ],
)
def test_numbers_that_do_not_fit(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_batches(8, 2, 2, 8, **kwargs)


def test_accumulation_over_several_generations_is_allowed() -> None:
    plan = plan_batches(8, 1, 4, 2, steps_per_generation=2)
    assert plan.optimizer_steps_per_generation == 0.5
    # 5 generation batches fit, but an optimizer step needs 2: the epoch holds 4
    assert PromptSchedule(20, plan).generations_per_epoch == 2
    assert len(PromptSchedule(40, plan)) % 4 == 0


@pytest.mark.parametrize("unique", [1, 2])
def test_few_prompts_warn(unique: int) -> None:
    with pytest.warns(UserWarning, match=f"only {unique} different prompt"):
        plan_batches(8 * unique, 1, 1, 8)


def test_order_is_fixed_by_the_seed_and_differs_by_epoch() -> None:
    plan = plan_batches(8, 1, 1, 2)
    schedules = [PromptSchedule(20, plan, seed) for seed in (3, 3, 4)]
    first, again, other = ([s.prompts(0, g) for g in range(5)] for s in schedules)
    assert first == again != other
    assert schedules[0].prompts(1, 0) != first[0]
    assert sorted(p for batch in first for p in batch) == list(range(20))


def test_shuffled_completions_are_the_same_rows_mixed() -> None:
    plan = plan_batches(8, 1, 2, 4, steps_per_generation=2)
    plain, mixed = (PromptSchedule(8, plan, 1, shuffle_completions=on) for on in (False, True))
    assert mixed.rows(0, 0) != plain.rows(0, 0)
    assert sorted(mixed.rows(0, 0)) == sorted(plain.rows(0, 0))
    assert sorted(mixed.group_order(0, 1)) == list(range(16))


def test_locate() -> None:
    plan = quiet_plan(4, 1, 2, 2, num_iterations=2)
    schedule = PromptSchedule(4, plan)
    assert len(schedule) == 4
    assert schedule.locate(3) == MicroStep(epoch=0, generation=0, slice_index=1, iteration=1)
    assert schedule.locate(4) == MicroStep(epoch=1, generation=0, slice_index=0, iteration=0)


def test_small_dataset_is_repeated_with_a_warning() -> None:
    plan = plan_batches(12, 1, 1, 2)
    with pytest.warns(UserWarning, match=r"has 4 prompt\(s\), an optimizer step needs 6"):
        schedule = PromptSchedule(4, plan, shuffle=False)
    assert schedule.prompts(0, 0) == [0, 1, 2, 3, 0, 1]


def test_empty_dataset() -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        PromptSchedule(0, plan_batches(12, 1, 1, 2))
