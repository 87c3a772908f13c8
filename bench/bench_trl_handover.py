"""Time the hand-over of weights from TRL's trainers to a colocated vLLM, unpatched and patched; drift of the weights.

    python bench/bench_trl_handover.py --shapes 0.6b --cycles 3              # on a CPU
    python bench/bench_trl_handover.py --device cuda --shapes 0.6b,1.7b,8b   # with --engine vllm if vLLM is installed

Models have the shapes of Qwen3 and random weights in bf16; ``--full`` leaves out the LoRA adapter of rank 16 on every
linear layer. The engine ``copy`` has preallocated parameters into which its loader copies: the least that an engine can
do. The engine ``vllm`` is the one of TRL, with random weights. ``seconds`` is the median of calls in turn. ``drift`` is
the mean change of the weights under adapters after ``--cycles`` hand-overs with new adapters each, relative to their
mean magnitude; ``bits_equal`` says whether all base weights kept their bits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import grpo_ext.integrations.trl as ours
from grpo_ext.bench.common import RESULTS, machine, print_table, synchronize, write_csv
from grpo_ext.bench.training_case import SHAPES, build_model
from grpo_ext.bench.training_workload import build_tokenizer
from grpo_ext.generation.vllm.weights import base_of, write_config

METHODS = {"trl": False, "patch": True}


class CopyEngine(nn.Module):
    """A model on the device whose loader copies into its parameters."""

    def __init__(self, base: Any, device: torch.device) -> None:
        super().__init__()
        with torch.device("meta"):
            empty = type(base)._from_config(base.config, dtype=base.dtype)
        for name, module in empty.to_empty(device=device).named_children():
            self.add_module(name, module)
        if base.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.places = dict(self.named_parameters())

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.places[name].copy_(tensor)


def copying(model: nn.Module, device: torch.device) -> Any:
    """TRL's ``VLLMGeneration`` around a `CopyEngine`."""
    from trl.generation.vllm_generation import VLLMGeneration

    engine = CopyEngine(base_of(model), device)
    generation = object.__new__(VLLMGeneration)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=engine)))
    generation.model, generation.mode, generation.enable_sleep_mode = model, "colocate", False
    generation.accelerator = Accelerator(cpu=device.type == "cpu")
    generation._dist = type_of_backend()(generation.accelerator)
    generation.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: None
    )
    return generation


def type_of_backend() -> Any:
    from trl.distributed import DistributedBackend

    return DistributedBackend


def colocated(model: Any, device: torch.device, utilization: float) -> Any:
    """TRL's ``VLLMGeneration`` around vLLM with random weights."""
    from trl.generation import vllm_generation

    folder = Path(tempfile.mkdtemp())
    base = base_of(model)
    tokenizer = build_tokenizer(base.config.vocab_size)
    write_config(model, folder, tokenizer)
    base.name_or_path = base.config._name_or_path = str(folder)
    vllm_generation.LLM = partial(
        vllm_generation.LLM, load_format="dummy", enforce_eager=True, skip_tokenizer_init=True
    )
    return vllm_generation.VLLMGeneration(
        model, Accelerator(cpu=device.type == "cpu"), tokenizer, gpu_memory_utilization=utilization,
        max_model_length=512, max_num_seqs=8,
    )  # fmt: skip


@torch.no_grad()
def new_adapters(model: nn.Module, seed: int) -> None:
    """Adapters whose product is about as large as in training, a tenth of the weights (std 0.02)."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            std = 1e-2 if "lora_A" in name else 2e-2
            parameter.normal_(0, std, generator=generator)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            yield name, parameter.detach()


def drift_of(model: nn.Module, before: dict[str, Tensor]) -> tuple[float, bool]:
    """The mean relative change of the weights under adapters, and whether every base weight kept its bits."""
    changed, size = 0.0, 0.0
    for name, tensor in base_parameters(model):
        if ".base_layer." in name:
            old = before[name].to(tensor.device)
            changed += float((tensor - old).abs().sum(dtype=torch.float64))
            size += float(old.abs().sum(dtype=torch.float64))
    same = all(torch.equal(tensor, before[name].to(tensor.device)) for name, tensor in base_parameters(model))
    return changed / size if size else 0.0, same


@torch.no_grad()
def measure(options: argparse.Namespace, shape: str, device: torch.device) -> list[dict[str, Any]]:
    model = build_model(SHAPES[shape], device, torch.bfloat16)
    if not options.full:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    before = {name: tensor.to("cpu", copy=True) for name, tensor in base_parameters(model)}
    generation = (
        copying(model, device) if options.engine == "copy" else colocated(model, device, options.gpu_memory_utilization)
    )

    def hand_over(weights: bool, cycle: int) -> float:
        new_adapters(model, cycle)
        ours.patch(weights=weights)
        return seconds_of(generation.sync_weights, device)

    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for run in range(options.warmup + options.runs):
        for name, weights in METHODS.items():
            seconds[name].append(hand_over(weights, run))
    rows = []
    for name, weights in METHODS.items():
        for key, tensor in base_parameters(model):
            tensor.copy_(before[key])
        for cycle in range(options.cycles):
            hand_over(weights, cycle)
        drift, same = drift_of(model, before)
        rows.append(
            {
                "shape": shape,
                "trained": "full" if options.full else "lora",
                "engine": options.engine,
                "method": name,
                "seconds": statistics.median(seconds[name][options.warmup :]),
                "of_trl": statistics.median(seconds[name][options.warmup :])
                / statistics.median(seconds["trl"][options.warmup :]),
                "cycles": options.cycles,
                "drift": drift,
                "bits_equal": same,
                **machine(device),
            }
        )
    status = ours.status()
    ours.unpatch()
    part = status.parts["weights"]
    if part.handed_back or not part.served:
        raise RuntimeError(f"TRL's own method ran in place of ours: {status}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", default="0.6b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--engine", choices=("copy", "vllm"), default="copy")
    parser.add_argument("--full", action="store_true", help="no adapter")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--cycles", type=int, default=100, help="hand-overs before the drift is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.4)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    output = options.output or RESULTS / f"trl_handover_{options.device}.csv"
    shown = ("shape", "trained", "engine", "method", "seconds", "of_trl", "cycles", "drift", "bits_equal")
    print(",".join(shown), flush=True)
    every: list[dict[str, Any]] = []
    for shape in options.shapes.split(","):
        rows = measure(options, shape, device)
        for row in rows:
            print(",".join(str(row[name]) for name in shown), flush=True)
        every += rows
        write_csv(output, rows, append=True)
    print_table(every, shown)


if __name__ == "__main__":
    main()
