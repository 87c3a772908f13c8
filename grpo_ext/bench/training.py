"""Compare whole training steps of this package's trainer and TRL's.

    python -m grpo_ext.bench.training phase --device cuda --cases 0.6b:lora:8,1.7b:lora:8 --output results
    python -m grpo_ext.bench.training longest --device cuda --cases 8b:lora:8 --tokens 2048
    python -m grpo_ext.bench.training phase --device cpu --cases tiny:lora:4 --prompts 2 --group 4 --tokens 16

A case is ``model:lora|full:completions per micro-batch``, optionally with ``:spread`` or ``:equal`` for the lengths.
Models have Qwen3 shapes and random weights. `phase`, `longest` and `trace` give both trainers the same prepared
completions (`training_workload.py`) and the log probabilities that an engine would report. Both trainers correct for
those (``token_truncate`` at 2), as with vLLM. No completion can be skipped in these runs, because every advantage is
nonzero. All commands write CSVs to ``--output`` and plots to the same folder; plots of `results/` go to `plots/`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from grpo_ext.bench import (
    common,
    plot_training,
    training_case,
    training_phase,
    training_setup,
    training_trace,
    training_two,
)

RESULTS = common.RESULTS
PLOTS = common.SOURCE_TREE / "plots"


def case(text: str) -> tuple[str, str, int, str]:
    """Parse ``0.6b:lora:8`` or ``0.6b:lora:8:equal``."""
    model, trained, micro_batch, lengths = (*text.split(":"), "")[:4]
    if model not in training_case.SHAPES or trained not in ("lora", "full") or lengths not in ("", "spread", "equal"):
        raise argparse.ArgumentTypeError(f"{text}: pass one of {', '.join(training_case.SHAPES)}, then lora or full")
    return model, trained, int(micro_batch), lengths


def names(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return found

    return parse


def add_common(parser: argparse.ArgumentParser, cases: str, candidates: str) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cases", type=lambda text: [case(part) for part in text.split(",")], default=cases)
    parser.add_argument("--candidates", type=names(tuple(training_setup.CANDIDATES)), default=candidates)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--beta", type=float, default=0.0, help="of the KL term, with a reference model (lora only)")
    parser.add_argument("--layers", type=int, help="keep only this many layers of the model")
    parser.add_argument("--vocabulary", type=int, help="vocabulary size of the model, instead of its own")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")


def add_workload(parser: argparse.ArgumentParser, prompts: int) -> None:
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=1024, help="longest completion")


def add_learn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--candidates", type=names(("ours", "trl")), default="ours,trl")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trainer")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--parts", action="store_true", help="measure parts of a step, not the held-out reward")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between two measurements of the held-out reward")
    parser.add_argument("--samples", type=int, default=8, help="answers to each held-out question")
    parser.add_argument("--batch", type=int, default=32, help="completions of a step")
    parser.add_argument("--tokens", type=int, default=24, help="longest completion")
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto")
    parser.add_argument("--vllm_memory", type=float, default=0.15, help="share of GPU memory for each engine")
    parser.add_argument("--together", type=int, default=1, help="concurrent runs of one trainer")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, .gguf file or folder")
    parser.add_argument("--questions", type=Path, help="JSON of [question, answer] pairs, instead of reasoning-gym")
    parser.add_argument("--threads", type=int, default=2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    phase = parts.add_parser("phase", help="seconds, tokens per second, memory and forwards of the training phase")
    add_common(phase, "0.6b:lora:8,0.6b:full:8,1.7b:lora:8,1.7b:full:8,8b:lora:8", "ours,trl,trl_patch,trl_fused")
    phase.add_argument("--lengths", type=names(("spread", "equal")), default="spread,equal")
    add_workload(phase, prompts=8)
    phase.add_argument("--warmup", type=int, default=1)
    phase.add_argument("--steps", type=int, default=3)
    longest = parts.add_parser("longest", help="the longest completion that fits")
    add_common(longest, "8b:lora:8", "ours,trl")
    longest.add_argument("--tokens", type=int, default=2048, help="length of the first probe; the second is twice that")
    longest.add_argument("--probes", type=int, default=3, help="number of probes near the limit")
    longest.add_argument("--capacity", type=float, help="memory limit in GiB; default: memory of the GPU")
    longest.set_defaults(warmup=0, steps=1)
    trace = parts.add_parser("trace", help="seconds of a step's parts and of its kernels")
    add_common(trace, "0.6b:lora:8,8b:lora:8", "ours,trl")
    add_workload(trace, prompts=2)
    trace.set_defaults(warmup=0, steps=3)
    add_learn(parts.add_parser("learn", help="held-out reward of SmolLM2-135M against time and samples"))
    two = parts.add_parser("two", help="two GPUs against one")
    add_common(two, "1.7b:full:8", "ours")
    add_workload(two, prompts=8)
    two.add_argument("--kinds", type=names(training_two.KINDS), default="ddp,fsdp2,vocabulary")
    two.add_argument("--processes", type=int, default=2)
    two.add_argument("--warmup", type=int, default=1)
    two.add_argument("--steps", type=int, default=2)
    two.add_argument("--rows", type=int, default=8192, help="tokens of the vocabulary-parallel loss")
    two.add_argument("--hidden", type=int, default=2048)
    two.add_argument("--wide", type=int, default=262144, help="vocabulary of the vocabulary-parallel loss")
    two.add_argument("--runs", type=int, default=5)
    two.add_argument("--worker", choices=training_two.KINDS, help="internal: set for the processes of this command")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    import torch

    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {
        "phase": training_phase.phase,
        "longest": training_phase.longest,
        "trace": training_trace.trace,
        "two": training_two.two,
    }
    if args.part == "learn":  # needs packages that the other parts do not
        from grpo_ext.bench import training_learn

        parts["learn"] = training_learn.learn
    good = parts[args.part](args)
    if getattr(args, "worker", None) is None:
        plot_training.draw(args.output, PLOTS if args.output == RESULTS else args.output)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
