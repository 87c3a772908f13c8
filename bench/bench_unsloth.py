"""Time the training phase of Unsloth's GRPO trainer on the completions of ``grpo_ext.bench.training phase``.

    python bench/bench_unsloth.py --model 0.6b --lengths spread

Needs a GPU and unsloth (measured: 2026.10.9 with TRL 1.15). LoRA r=16, bf16, Unsloth's gradient checkpointing; 64
completions, 8 per micro-batch; median of the steps after the first. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
import unsloth  # isort: skip  # must precede the packages that it patches
import torch
import trl
from datasets import Dataset

from grpo_ext.bench import training_setup
from grpo_ext.bench.training_case import SHAPES, Case
from grpo_ext.bench.training_workload import Workload, build_tokenizer

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_model(case: Case, workload: Workload, folder: Path) -> Any:
    """Save model and tokenizer to ``folder``, attach log probabilities to the workload; return the tokenizer."""
    model = case.build()
    workload.attach_logps(model, torch.device("cuda"))
    model.save_pretrained(folder)
    tokenizer = build_tokenizer(case.shape.vocabulary)
    tokenizer.save_pretrained(folder)
    return tokenizer


def measure(size: str, lengths: str, steps: int) -> dict[str, Any]:
    """Run Unsloth's trainer once; return tokens per second, seconds, peak memory, losses and gradient norms."""
    device = torch.device("cuda")
    case = Case(model=size, trained="lora", micro_batch=8, steps=steps + 1, dtype="bf16", device="cuda")
    workload = Workload(case.shape.vocabulary, 8, 8, 1024, lengths == "spread")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_model(case, workload, Path(folder))
        training_setup.release_memory(device)
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=False, fast_inference=False
        )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, target_modules=LAYERS, use_gradient_checkpointing="unsloth"
    )

    class Served(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
        """Returns the prepared completions instead of generating."""

        def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **options: Any) -> Any:
            return workload.serve(prompt_ids)

    known = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    config = trl.GRPOConfig(**{name: value for name, value in case.arguments(workload).items() if name in known})
    config.mask_truncated_completions = False  # Unsloth sets True for dapo, which would mask all completions
    watch = training_setup.StepWatch(device)
    dataset = Dataset.from_list(workload.dataset())
    trainer = Served(model, workload.reward, config, dataset, None, tokenizer, callbacks=[watch])
    trainer.use_vllm = True  # so that the trainer corrects for the prepared log probabilities
    trainer._generate = watch.as_rollout(trainer._generate)
    training_setup.start_adapter(trainer.model)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = [step - rollout for step, rollout in zip(watch.seconds, watch.rollout, strict=True)]
    median = statistics.median(seconds[1:])
    return {
        "model": size,
        "lengths": lengths,
        "training_s": median,
        "training_s_all": [round(value, 3) for value in seconds],
        "tokens_per_s": workload.all_tokens / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": watch.losses,
        "grad_norms": watch.grad_norms,
        "device": torch.cuda.get_device_name(),
        "unsloth": unsloth.__version__,
        "trl": trl.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--lengths", choices=("spread", "equal"), default="spread")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up step")
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.lengths, given.steps)))
