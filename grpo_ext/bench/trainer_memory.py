"""Measure the peak memory of a `GRPOTrainer` step with the fused head and with the logits path.

    python -m grpo_ext.bench.trainer_memory --layers 4                          # CPU, first 4 layers of SmolLM2-135M
    python -m grpo_ext.bench.trainer_memory --device cuda --model qwen3-0.6b --rows 32 --tokens 1024

Each path trains in a separate process: LoRA (or --full), gradient checkpointing, random completions of equal length
instead of generated ones, one warm-up step and --steps measured steps. Memory is the process's peak above its memory
before the first step: on the CPU the resident set (VmHWM), on a GPU ``torch.cuda.max_memory_allocated``. The dtype of
the weights is the choice of `dtype: auto` for the device, or --dtype. ``qwen3-0.6b`` and ``qwen3-1.7b`` have these
models' shapes and random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from grpo_ext.bench import common
from grpo_ext.bench.training_workload import build_tokenizer
from grpo_ext.generation.engine import Completions, SamplingParams
from grpo_ext.tasks.dtype import fast_dtype
from grpo_ext.tasks.models import load_model
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

#: Hidden size, layers and inner size of the random models.
SHAPES = {"qwen3-0.6b": (1024, 28, 3072), "qwen3-1.7b": (2048, 28, 6144)}
PATHS = {"fused head": True, "logits": False}


class RandomCompletions:
    """Generation engine that returns random completions of a fixed length, from a seeded generator."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.tokens, self.vocabulary = tokens, vocabulary
        self.generator = torch.Generator().manual_seed(0)

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> Completions:
        shape = (len(prompt_ids), self.tokens)
        ids = torch.randint(self.vocabulary, shape, generator=self.generator).tolist()
        return Completions(ids, [True] * len(ids))


class Clock(TrainerCallback):
    """Record the seconds of every optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        common.synchronize(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        common.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._start)


def build(name: str, layers: int | None, dtype: str, device: torch.device) -> tuple[Any, Any]:
    if name in SHAPES:
        tokenizer: Any = build_tokenizer(151936)
        hidden, depth, inner = SHAPES[name]
        config = Qwen3Config(
            vocab_size=151936, hidden_size=hidden, num_hidden_layers=depth, intermediate_size=inner,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        with torch.device(device):
            model: Any = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    else:
        model, tokenizer = load_model("smollm2-135m-instruct", dtype)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model, tokenizer


def resident(field: str) -> int:
    """Read VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with one path in this process and return its row of the CSV."""
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    dtype = fast_dtype(device.type)[0] if arguments.dtype == "auto" else arguments.dtype
    model, tokenizer = build(arguments.model, arguments.layers, dtype, device)
    vocabulary = model.config.vocab_size
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock(device)
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=arguments.rows,
            num_generations=2,
            max_completion_length=arguments.tokens,
            use_fused_head=PATHS[arguments.path],
            gradient_checkpointing=True,
            max_steps=arguments.steps + 1,
            learning_rate=1e-5,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            save_completions=False,
            report_to="none",
            disable_tqdm=True,
        ),
        [{"prompt": f"t{i}"} for i in range(2, 66)],
        processing_class=tokenizer,
        peft_config=None if arguments.full else lora,
        callbacks=[clock],
    )
    engine: Any = RandomCompletions(arguments.tokens, vocabulary)
    trainer.rollouts.engine = engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    assert trainer.loss_path.split(":")[0] == arguments.path, trainer.loss_path
    return {
        **common.machine(device),
        "path": arguments.path,
        "model": arguments.model,
        "dtype": dtype,
        "layers": model.config.num_hidden_layers,
        "trained": "full" if arguments.full else "lora",
        "rows": arguments.rows,
        "tokens": arguments.tokens,
        "vocabulary": vocabulary,
        "peak_mib": round((peak - before) / 2**20),
        "seconds_per_step": round(statistics.median(clock.seconds[1:]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2-135m", choices=("smollm2-135m", *SHAPES))
    parser.add_argument("--rows", type=int, default=32, help="completions of the micro-batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each completion")
    parser.add_argument("--layers", type=int, help="keep only the first layers of the model, and the whole head")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of the weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="train all weights, including the head")
    parser.add_argument("--path", choices=tuple(PATHS), help="run one path in this process and print it")
    parser.add_argument("--csv", type=Path, help="default: results/trainer_memory_<device>.csv")
    arguments = parser.parse_args()
    if arguments.path is not None:
        print(json.dumps(train(arguments)))
        return
    rows = []
    for path in PATHS:
        command = [sys.executable, "-m", "grpo_ext.bench.trainer_memory", *sys.argv[1:], "--path", path]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(f"{path}: {rows[-1]['peak_mib']} MiB, {rows[-1]['seconds_per_step']} s per step", flush=True)
    kind = torch.device(arguments.device).type
    common.write_csv(arguments.csv or common.RESULTS / f"trainer_memory_{kind}.csv", rows)


if __name__ == "__main__":
    main()
