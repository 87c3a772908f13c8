"""Time a training step of TRL's GRPO trainer unpatched, patched, and patched with the whole loss; peak memory.

    python bench/bench_trl.py
    python bench/bench_trl.py --device cuda --vocab 151936 --hidden 2048 --layers 16 --batch 16 --prompt 256 \
        --completion 1024

A step is TRL's loss and its backward on a fixed batch of random completions. Generation, rewards and the optimizer are
not measured: they are the same code in all three cases. Without ``--vocab`` the model is SmolLM2-135M, else a random
Llama of the given sizes. ``--full`` trains all weights; the default is LoRA on every linear layer but the head. Memory
is the peak during one step above the memory before it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import grpo_ext.integrations.trl as ours
from grpo_ext.bench.common import DTYPES, RESULTS, interleaved, machine, peak_extra_bytes, print_table, write_csv
from grpo_ext.bench.training_workload import build_tokenizer
from grpo_ext.tasks.models import load_model

CANDIDATES: dict[str, bool | None] = {"trl": None, "patch": False, "patch, fuse_loss": True}


def build_model(options: argparse.Namespace) -> tuple[Any, Any]:
    if not options.vocab:
        return load_model("smollm2-135m-instruct", dtype=DTYPES[options.dtype])
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        tie_word_embeddings=False,
    )
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(config, dtype=DTYPES[options.dtype])
    return model, build_tokenizer(options.vocab)


def build_trainer(options: argparse.Namespace) -> Any:
    import trl

    model, tokenizer = build_model(options)
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.batch,
        num_generations=options.batch,
        max_completion_length=options.completion,
        loss_type=options.loss_type,
        gradient_checkpointing=options.checkpointing,
        report_to="none",
        save_strategy="no",
        use_cpu=options.device == "cpu",
        bf16=False,
    )
    lora = None if options.full else LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list([{"prompt": "t7"}] * options.batch)
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), config, data, processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def batch(options: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """Random completions: lengths from a quarter of the longest upwards, advantages not 0."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(options.completion // 4, options.completion + 1, (options.batch,), generator=generator)
    lengths[0] = options.completion
    mask = (torch.arange(options.completion) < lengths[:, None]).long()
    advantages = torch.randn(options.batch, generator=generator)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(0, vocab, (options.batch, length), generator=generator)

    tensors = {
        "prompt_ids": ids(options.prompt),
        "prompt_mask": torch.ones(options.batch, options.prompt, dtype=torch.long),
        "completion_ids": ids(options.completion),
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    return {name: tensor.to(options.device) for name, tensor in tensors.items()}


@contextlib.contextmanager
def as_candidate(fuse: bool | None) -> Iterator[None]:
    if fuse is not None:
        ours.patch(fuse_loss=fuse)
    try:
        yield
    finally:
        status = ours.status()
        ours.unpatch()
        if fuse is not None and (status.handed_back or status.losses_handed_back or not str(status).count("served")):
            raise RuntimeError(f"TRL's own code ran a part of the patched step: {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--vocab", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=96)
    parser.add_argument("--loss_type", default="dapo")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    trainer = build_trainer(options)
    vocab = trainer.model.get_output_embeddings().weight.shape[0]
    inputs = batch(options, vocab)

    def prepared(fuse: bool | None) -> Callable[[], Callable[[], Any]]:
        def step() -> None:
            with as_candidate(fuse):
                trainer.compute_loss(trainer.model_wrapped, inputs).backward()

        def prepare() -> Callable[[], Any]:
            trainer.model.zero_grad(set_to_none=True)
            trainer._metrics["train"].clear()
            return step

        return prepare

    candidates = {name: prepared(fuse) for name, fuse in CANDIDATES.items()}
    busy: dict[str, list[float]] = {name: [] for name in candidates}

    def with_cpu_time(name: str) -> Callable[[], Callable[[], Any]]:
        """Record the processor time of all threads of the step too; it excludes other load on the machine."""

        def step() -> None:
            begin = time.process_time()
            measured()
            busy[name].append((time.process_time() - begin) * 1e3)

        def prepare() -> Callable[[], Any]:
            nonlocal measured
            measured = candidates[name]()
            return step

        measured: Callable[[], Any] = candidates[name]()
        return prepare

    timings = interleaved(
        {name: with_cpu_time(name) for name in candidates}, device, warmup=options.warmup, runs=options.runs
    )
    peaks = {}
    for name, candidate in candidates.items():
        gc.collect()
        if device.type == "cpu":  # freed memory kept by malloc would hide allocations of the next step
            ctypes.CDLL(None).malloc_trim(0)
        peaks[name] = peak_extra_bytes(candidate, device)
    rows = []
    for name in candidates:
        rows.append(
            {
                "candidate": name,
                "trained": "full" if options.full else "lora",
                "dtype": options.dtype,
                "loss_type": options.loss_type,
                "vocab": vocab,
                "hidden": trainer.model.config.hidden_size,
                "layers": trainer.model.config.num_hidden_layers,
                "batch": options.batch,
                "prompt": options.prompt,
                "completion": options.completion,
                "valid_tokens": int(inputs["completion_mask"].sum()),
                "ms_median": timings[name].median,
                "ms_min": timings[name].minimum,
                "of_trl": timings[name].median / timings["trl"].median,
                "cpu_ms_median": statistics.median(busy[name][options.warmup :]),
                "peak_mb": peaks[name] / 1e6,
                **machine(device),
            }
        )
    write_csv(RESULTS / f"trl_step_{options.device}.csv", rows, append=True)
    print_table(
        rows,
        ("candidate", "trained", "dtype", "valid_tokens", "ms_median", "ms_min", "of_trl", "cpu_ms_median", "peak_mb"),
    )


if __name__ == "__main__":
    main()
