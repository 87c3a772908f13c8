"""Three optimizer steps of a tiny model on however many processes it is started on; see test_two_processes.py."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from toys import EOS, WORDS, GradientCatcher, build_model, build_tokenizer, reward_number

from grpo_ext.trainer import GRPOConfig, GRPOTrainer
from grpo_ext.trainer.generation import Completions, SamplingParams

CASES = ("dapo", "grpo", "dr_grpo", "bnpo", "skipped")


class HashEngine:
    """Completions that depend on the prompt and on how often a call has seen it, not on rank or order of calls."""

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> Completions:
        seen: dict[tuple[int, ...], int] = {}
        ids, finished = [], []
        for prompt in prompt_ids:
            key = tuple(prompt)
            seen[key] = seen.get(key, 0) + 1
            generator = torch.Generator().manual_seed(sum(key) * 100 + seen[key])
            n = int(torch.randint(1, 6, (), generator=generator))
            row = torch.randint(2, len(WORDS), (n,), generator=generator).tolist()
            ids.append([*row[:-1], EOS] if n < 5 else row)
            finished.append(n < 5)
        return Completions(ids, finished)


def second_half(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Advantage 0 for the prompts below 10: of some micro-batches nothing is left."""
    numbers = reward_number(completions)
    return [n if int(p.split()[1]) >= 10 else 0.5 for p, n in zip(prompts, numbers, strict=True)]


def run(folder: Path, case: str, world_size: int) -> dict[str, Any]:
    """Gradients of each step (flat) and the logs; two steps per generation, with a KL term (not for ``skipped``)."""
    skipped = case == "skipped"
    loss_type = "dapo" if skipped else case
    rows = [{"prompt": f"add {i} " + "= " * (i % 3 + 1)} for i in range(20)]
    catcher = GradientCatcher()
    # bnpo averages over a rank's own micro-batch: one process equals two where it takes theirs one after the other.
    in_turn = 2 if case == "bnpo" and world_size == 1 else 1
    args = GRPOConfig(
        output_dir=str(folder / f"run-{case}-{world_size}"),
        per_device_train_batch_size=8 // world_size // in_turn,
        gradient_accumulation_steps=2 * in_turn,
        steps_per_generation=4 * in_turn,
        num_generations=2,
        max_completion_length=5,
        max_steps=3,
        loss_type=loss_type,
        beta=0.0 if skipped else 0.05,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model, tokenizer = build_model(), build_tokenizer()
    trainer = GRPOTrainer(
        model,
        second_half if skipped else reward_number,
        args,
        rows,
        eval_dataset=rows[:5],
        processing_class=tokenizer,
        callbacks=[catcher],
    )
    trainer.rollouts.engine = HashEngine()
    trainer.train()
    return {
        "gradients": [torch.cat([g.flatten() for g in step.values()]) for step in catcher.steps],
        "logs": trainer.state.log_history[:3],
        "eval_reward": trainer.evaluate()["eval_reward"],
    }


def sampled(folder: Path) -> list[list[int]]:
    """Completions of one prompt whose group lies on both ranks, from the model itself, rank after rank."""
    args = GRPOConfig(
        output_dir=str(folder / "sampled"),
        per_device_train_batch_size=4,
        num_generations=8,
        max_completion_length=5,
        use_cpu=True,
        report_to="none",
    )
    trainer = GRPOTrainer(build_model(), reward_number, args, [{"prompt": "add 1"}], processing_class=build_tokenizer())
    rollout, _, _ = trainer.rollouts.make(trainer.model, (0, 0), 0)
    return gather_object(rollout.completion_ids)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {case: run(Path(sys.argv[1]), case, 2) for case in CASES}
    results["sampled"] = sampled(Path(sys.argv[1]))
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "two.pt")
