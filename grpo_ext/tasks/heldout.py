"""Held-out measurement: mean reward of sampled answers, and of the best constant answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from grpo_ext.advantages import weighted_rewards
from grpo_ext.generation.engine import PromptEncoder, SamplingParams, TransformersEngine, end_token_ids
from grpo_ext.modules.inspection import context_length
from grpo_ext.rollouts.data import columns_of, read_row
from grpo_ext.rollouts.rewards import RewardFunction, RewardFunctions


@dataclasses.dataclass(frozen=True)
class HeldoutResult:
    """One measurement.

    Attributes:
        reward: mean over questions of the mean weighted reward of the samples.
        stderr: standard error of ``reward`` over the questions.
        samples: one dict per sampled answer: prompt, completion, reward (None if no reward applies).
    """

    reward: float
    stderr: float
    samples: list[dict[str, Any]]


def heldout_reward(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    sampling: SamplingParams,
    *,
    reward_weights: Sequence[float] | None = None,
    samples: int = 8,
    batch_size: int = 96,
    seed: int = 0,
    max_prompt_length: int | None = None,
    progress: bool = False,
) -> HeldoutResult:
    """Sample `samples` answers to every question and average their rewards.

    Preserves the caller's random state and the training mode of the model.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        dataset: rows with ``prompt`` (text or chat messages); the reward functions receive the other columns.
        reward_funcs: called as in training.
        sampling: as in training, so that the result is comparable with the training reward.
        reward_weights: one per function; None = 1.0 each.
        samples: answers per question.
        batch_size: sequences generated concurrently.
        seed: seed of the sampling.
        max_prompt_length: longer prompts keep only this many last tokens, as in training; None = no limit.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: the dataset is empty, ``samples`` is below 1, or a prompt does not fit the model's context.
        RewardError: a reward function raises, or does not return one reward per completion.
    """
    if len(dataset) == 0:
        raise ValueError("the held-out dataset is empty")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    rewards = RewardFunctions(reward_funcs, reward_weights)
    questions = [read_row(dataset, number, "dataset") for number in range(len(dataset))]
    rows = [dict(row) for row in questions for _ in range(samples)]
    encoder = PromptEncoder(tokenizer, max_prompt_length, context_length(model), sampling.max_new_tokens)
    prompt_ids = encoder.encode([row["prompt"] for row in rows])
    engine = TransformersEngine(end_token_ids(model, tokenizer), tokenizer.pad_token_id)
    device = next(model.parameters()).device
    ids: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with tqdm(total=len(rows), desc="held-out answers", unit="answer", disable=not progress) as bar:
            for start in range(0, len(rows), batch_size):
                ids += engine.generate(model, prompt_ids[start : start + batch_size], sampling).ids
                bar.update(len(ids) - start)
    texts = encoder.decode(ids)
    totals = _score(rows, texts, ids, rewards)
    means = totals.view(-1, samples).nanmean(dim=1)
    means = means[~means.isnan()]
    return HeldoutResult(
        reward=float(means.mean()),
        stderr=float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else 0.0,
        samples=[
            {"prompt": row["prompt"], "completion": text, "reward": None if math.isnan(total) else total}
            for row, text, total in zip(rows, texts, totals.tolist(), strict=True)
        ],
    )


def best_constant_reward(
    dataset: Dataset,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    *,
    reward_weights: Sequence[float] | None = None,
    column: str = "answer",
) -> float | None:
    """The mean reward of the best constant answer, used for every question.

    A model that always gives the same answer reaches this reward, so only a higher reward proves learning. The
    candidates are the distinct values of `column`. Returns None if the dataset has no such column.
    """
    if column not in dataset.column_names or len(dataset) == 0:
        return None
    rewards = RewardFunctions(reward_funcs, reward_weights)
    rows = [dict(row) for row in dataset]
    means = [
        float(_score(rows, [constant] * len(rows), [[]] * len(rows), rewards).nanmean())
        for constant in sorted({str(row[column]) for row in rows})
    ]
    return max((mean for mean in means if not math.isnan(mean)), default=None)


def _score(rows: list[dict[str, Any]], texts: list[str], ids: list[list[int]], rewards: RewardFunctions) -> Tensor:
    """The weighted reward of each row, ``(n,)`` fp64, NaN if no function applies."""
    completions = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    table = rewards([row["prompt"] for row in rows], completions, ids, columns_of(rows))
    return weighted_rewards(table.double(), rewards.weights)
