"""Evaluate: generate completions for a dataset and score them with the training rewards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import speed_metrics

from grpo_ext.advantages import weighted_rewards
from grpo_ext.generation.engine import Completions
from grpo_ext.rollouts.maker import RolloutMaker


def measure(rollouts: RolloutMaker, model: nn.Module, dataset: Any, prefix: str) -> dict[str, float]:
    """Metrics of `evaluation_metrics` over a dataset and all ranks. The random state of training is preserved."""
    args, accelerator = rollouts.args, rollouts.accelerator
    start = time.time()
    sampling = args.sampling(args.eval_temperature)
    world = accelerator.num_processes
    rows = evaluation_rows(len(dataset), args.num_generations_eval, world, accelerator.process_index)
    longest = -(-len(dataset) * args.num_generations_eval // world)
    name = "eval_dataset" if prefix == "eval" else f"eval_dataset ({prefix})"

    def generate(batch: list[int]) -> tuple[Completions, Tensor]:
        sample = rollouts.generate(model, dataset, batch, sampling, name=name)
        return sample.completions, rollouts.score(sample)

    devices = [args.device] if args.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(args.seed + accelerator.process_index)
        local = evaluate_rows(rows, args.per_device_eval_batch_size, generate, longest)
    result = {name: gather_object(values) for name, values in local.items()}
    metrics = evaluation_metrics(result, rollouts.rewards.names, rollouts.rewards.weights, prefix)
    return metrics | speed_metrics(prefix, start, num_samples=len(result["lengths"]))


def evaluation_rows(num_prompts: int, num_generations: int, world_size: int, rank: int) -> list[int]:
    """Dataset indices of one rank's completions; the ranks together cover every completion once."""
    return [i // num_generations for i in range(rank, num_prompts * num_generations, world_size)]


def evaluate_rows(
    rows: Sequence[int],
    batch_size: int,
    generate: Callable[[list[int]], tuple[Completions, Tensor]],
    longest: int = 0,
) -> dict[str, list[Any]]:
    """Generate and score all rows in batches.

    Args:
        rows: dataset indices, one per completion.
        batch_size: rows per call of ``generate``.
        generate: maps dataset indices to completions and ``(n, functions)`` rewards.
        longest: the largest number of rows on any rank. ``generate`` may contain collectives, so a rank with fewer
            rows generates for row 0 and drops the results.

    Returns:
        ``rewards`` (lists of floats), ``lengths`` and ``finished``, one entry per row.
    """
    result: dict[str, list[Any]] = {"rewards": [], "lengths": [], "finished": []}
    for start in range(0, max(len(rows), longest), batch_size):
        own = list(rows[start : start + batch_size])
        completions, rewards = generate(own or [0])
        result["rewards"] += rewards.tolist()[: len(own)]
        result["lengths"] += [len(ids) for ids in completions.ids][: len(own)]
        result["finished"] += completions.finished[: len(own)]
    return result


def evaluation_metrics(
    result: dict[str, list[Any]], names: Sequence[str], weights: Sequence[float], prefix: str
) -> dict[str, float]:
    """Mean and deviation of the rewards, and statistics of the lengths, from the rows of all ranks."""
    rewards = torch.tensor(result["rewards"], dtype=torch.float64).view(-1, len(names))
    total = weighted_rewards(rewards, list(weights))
    total = total[~total.isnan()]
    lengths = torch.tensor(result["lengths"], dtype=torch.float64)
    metrics = {
        f"{prefix}_reward": float(total.mean()),
        f"{prefix}_reward_std": float(total.std()) if len(total) > 1 else 0.0,
        f"{prefix}_completions/mean_length": float(lengths.mean()),
        f"{prefix}_completions/min_length": float(lengths.min()),
        f"{prefix}_completions/max_length": float(lengths.max()),
        f"{prefix}_completions/clipped_ratio": 1 - sum(result["finished"]) / len(result["finished"]),
    }
    for index, name in enumerate(names):
        column = rewards[:, index]
        metrics[f"{prefix}_rewards/{name}/mean"] = float(column.nanmean())
    return metrics
