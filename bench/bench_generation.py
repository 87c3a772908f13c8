"""Measure completions per second of the generation of `make train`, with transformers and vLLM in one process.

    python bench/bench_generation.py --blocks 5        # writes bench/results/generation_cpu.csv

A block is one generation batch (32 completions of up to 24 tokens) by each engine in turn, so that background load
affects both. vLLM's time includes the cost of an update: weight transfer, cache reset and weight check.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig

from grpo_ext.bench import common
from grpo_ext.generation.engine import TransformersEngine, end_token_ids
from grpo_ext.tasks import arithmetic_datasets, fast_dtype, load_model
from grpo_ext.tasks.arithmetic import number_reward
from grpo_ext.trainer import GRPOConfig, GRPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of the weights")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "generation_cpu.csv")
    options = parser.parse_args()
    dtype = fast_dtype("cpu")[0] if options.dtype == "auto" else options.dtype
    model, tokenizer = load_model("smollm2-135m-instruct", dtype)
    dataset, _ = arithmetic_datasets("products")
    args = GRPOConfig(
        "runs/bench_generation",
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=24,
        use_vllm=True,
        report_to="none",
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(model, number_reward, args, dataset, processing_class=tokenizer, peft_config=lora)
    rows, sampling = trainer.schedule.rows(0, 0), trainer.rollouts.sampling
    prompts = trainer.rollouts.encoder.encode([dataset[row]["prompt"] for row in rows])
    plain = TransformersEngine(end_token_ids(model, tokenizer), trainer.pad_id)
    engine = trainer.rollouts.engine
    results = []
    turns = [
        (block, *turn) for block in range(-1, options.blocks) for turn in (("vllm", engine), ("transformers", plain))
    ]
    with trainer.faster_layers.attached():  # as in training
        for block, name, chosen in turns:
            with torch.no_grad():  # an update, after which the engine must load the weights
                next(p for p in trainer.model.parameters() if p.requires_grad).add_(1e-4)
            start = time.perf_counter()
            done = chosen.generate(trainer.model, prompts, sampling)
            seconds = time.perf_counter() - start
            tokens = sum(map(len, done.ids))
            pop = getattr(chosen, "pop_metrics", dict)()
            if block >= 0:
                results.append(
                    {
                        **common.machine(torch.device("cpu")),
                        "engine": name,
                        "dtype": dtype,
                        "block": block,
                        "seconds": round(seconds, 3),
                        "samples_per_second": round(len(prompts) / seconds, 2),
                        "tokens_per_second": round(tokens / seconds, 1),
                        "weights_seconds": round(pop.get("time/vllm_weights", 0.0), 3),
                        "check_seconds": round(pop.get("time/vllm_check", 0.0), 3),
                        "load": round(os.getloadavg()[0], 2),
                    }
                )
                print(results[-1], flush=True)
    for name in ("vllm", "transformers"):
        rates = [row["samples_per_second"] for row in results if row["engine"] == name]
        print(f"{name}: median {statistics.median(rates):.2f} samples per second")
    common.write_csv(options.output, results)


if __name__ == "__main__":
    main()
