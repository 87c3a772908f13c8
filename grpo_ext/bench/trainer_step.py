"""Time a CPU training step of `make train`: this package's trainer or TRL's, with the same settings.

    python -m grpo_ext.bench.trainer_step --trainer ours --steps 10
    python -m grpo_ext.bench.trainer_step --trainer trl --steps 10      # needs trl==1.16.0

SmolLM2-135M, LoRA r=16 on all linear layers, learning rate 2e-4 constant, 32 completions a step in groups of 8, 24 new
tokens, one-digit products. The dtype of the weights is the choice of `dtype: auto` for this processor, or --dtype. Run
the two trainers in separate processes, one after the other, so that neither warms up or slows down the other. The first
step is not counted: it includes lazy initialization. Longer completions take more time, so the CSV also has the mean
completion length of the measured steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from grpo_ext.bench import common
from grpo_ext.tasks.arithmetic import arithmetic_datasets, number_reward
from grpo_ext.tasks.dtype import fast_dtype
from grpo_ext.tasks.models import load_model

RESULTS = common.RESULTS / "trainer_step_cpu.csv"


class StepClock(TrainerCallback):
    """Record wall-clock seconds, logged completion length and reward of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.lengths: list[float] = []
        self.rewards: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "completions/mean_length" in logs:
            self.lengths.append(float(logs["completions/mean_length"]))
            self.rewards.append(float(logs["reward"]))


def run(which: str, steps: int, seed: int, dtype: str) -> StepClock:
    model, tokenizer = load_model("smollm2-135m-instruct", dtype)
    train, _ = arithmetic_datasets("products", seed=seed)
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "num_generations": 8,
        "max_completion_length": 24,
        "temperature": 1.0,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = StepClock()
    if which == "trl":
        from trl import GRPOConfig, GRPOTrainer
    else:
        from grpo_ext.trainer import GRPOConfig, GRPOTrainer
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=number_reward,
        args=GRPOConfig(**shared),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.train()
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("ours", "trl"), required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of the weights")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="file to which a line is appended")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = fast_dtype("cpu")[0] if arguments.dtype == "auto" else arguments.dtype
    clock = run(arguments.trainer, arguments.steps, arguments.seed, dtype)
    measured = clock.seconds[1:]
    row = {
        **common.machine(torch.device("cpu")),
        "trainer": arguments.trainer,
        "dtype": dtype,
        "steps": len(measured),
        "seconds_median": round(statistics.median(measured), 2),
        "seconds_mean": round(statistics.fmean(measured), 2),
        "mean_completion_length": round(statistics.fmean(clock.lengths[1:]), 1),
        "reward_first": clock.rewards[0],
        "reward_last": clock.rewards[-1],
    }
    common.write_csv(arguments.csv, [row], append=True)
    print(row)


if __name__ == "__main__":
    main()
