"""Draws of processes that hold one engine together; needs neither vLLM nor processes."""

from __future__ import annotations

import torch

from grpo_ext.generation.vllm.parallel import Ranks

PROMPTS = [[5, 6, 7], [8, 9]]
OTHERS = [[4], [3, 3]]


def group(rank: int, seed: int = 0) -> Ranks:
    """One of four processes, of which two and two hold an engine."""
    ranks = Ranks(seed=seed)
    ranks.count, ranks.rank, ranks.tensor_parallel_size = 4, rank, 2
    ranks._group = object()
    return ranks


def draw(ranks: Ranks, step: int, prompts: list[list[int]] = PROMPTS) -> float:
    with ranks.same_draws(step, prompts):
        return float(torch.rand(()))


def test_a_group_draws_alike_and_groups_do_not() -> None:
    draws = [draw(group(rank), 3) for rank in range(4)]
    assert draws[0] == draws[1] != draws[2] == draws[3]
    assert draw(group(0, seed=1), 3) != draws[0]


def test_draws_differ_from_call_to_call() -> None:
    ranks = group(0)
    draws = [draw(ranks, step) for step in (0, 0, 1, 1)] + [draw(ranks, 1, OTHERS)]
    assert len(set(draws)) == 5


def test_an_evaluation_and_a_resume_leave_the_draws_of_training() -> None:
    through = group(0)
    draws = [draw(through, step) for step in range(4)]
    evaluated = group(0)
    found = []
    for step in range(4):
        found.append(draw(evaluated, step))
        draw(evaluated, step + 1, OTHERS)  # behind the step, before the next one generates
    assert found == draws
    assert [draw(group(0), 2)] == draws[2:3]


def test_the_callers_random_numbers_stay() -> None:
    before = torch.get_rng_state()
    draw(group(0), 0)
    assert torch.equal(before, torch.get_rng_state())
