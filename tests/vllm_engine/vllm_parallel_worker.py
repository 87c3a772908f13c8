"""Training on two processes with vLLM in them; see test_vllm_two_processes.py.

    torchrun --nproc_per_node 2 vllm_parallel_worker.py FOLDER TENSOR_PARALLEL_SIZE

With two GPUs visible it runs on them in bf16, else on the CPU in fp32. TENSOR_PARALLEL_SIZE 1 gives each process an
engine of its own, 2 gives them one that holds its weights in halves.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from vllm_toys import VOCABULARY, build_model, build_tokenizer

from grpo_ext.generation.engine import SamplingParams, TransformersEngine
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

ROWS = [{"prompt": " ".join(f"w{3 + (i * 7 + j) % (VOCABULARY - 3)}" for j in range(4 + i))} for i in range(6)]
LONG = [[5, 6, 7], [9, 10], list(range(3, 40)) * 4]


def even_share(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def main(folder: Path, size: int) -> None:
    rank, on_gpus = int(os.environ["RANK"]), torch.cuda.device_count() >= 2
    args = GRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        learning_rate=3e-3,
        use_cpu=not on_gpus,
        bf16=on_gpus,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_vllm=True,
        vllm_tensor_parallel_size=size,
        vllm_gpu_memory_utilization=0.05,
        vllm_enforce_eager=True,
        score_while_generating=True,
    )
    # Heads that two processes can share: 32 wide, which vLLM's CPU kernels want, or 64 wide. In bf16 sharp logits of
    # two programs differ by 0.1 nats; duller ones leave the check something to see.
    changes = {"hidden_size": 256, "initializer_range": 0.05} if on_gpus else {"hidden_size": 128}
    model = build_model(num_attention_heads=4, num_key_value_heads=2, **changes)
    model = model.to(torch.bfloat16) if on_gpus else model
    trainer = GRPOTrainer(model, even_share, args, ROWS, ROWS[:3], processing_class=build_tokenizer())
    trainer.train()
    engine: Any = trainer.rollouts.engine
    # Ranks ask for different numbers of completions, and each gets its own.
    prompts = LONG[: 2 + rank]
    greedy = SamplingParams(6, temperature=0.0)
    vllm = engine.generate(trainer.model, prompts, greedy).ids
    own = TransformersEngine(engine.end_ids, trainer.pad_id).generate(trainer.model, prompts, greedy).ids
    logs = [line for line in trainer.state.log_history if "loss" in line]
    result = {
        "checks": [line["vllm/weight_check"] for line in logs],
        "rewards": [line["reward"] for line in logs],
        "same": vllm == own,
        "eval_reward": trainer.evaluate()["eval_reward"],
        "own_completions": trainer._rollout.completion_ids if trainer._rollout is not None else [],
    }
    engine.close()
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]))
