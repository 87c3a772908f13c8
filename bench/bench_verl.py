"""Time the update step of verl's FSDP actor on one GPU: its own head and loss, and ours.

    python bench/bench_verl.py --model 0.6b --device cuda

Runs verl's `FSDPEngineWithLMHead.train_batch` with `ppo_loss` on the completions of ``grpo_ext.bench.training phase``,
in one process without Ray's cluster and without an inference engine. Needs verl 0.9 (tried: 0.9.1). Candidates:

    verl        head from logits, loss mode "vanilla"
    verl_fused  verl's fused head in torch (``use_fused_kernels``), loss mode "vanilla"
    ours        the fused head and the loss mode "grpo_ext" of `grpo_ext.integrations.verl`

All weights are trained, in fp32 under bf16 autocast on a GPU, as verl's defaults do. Each candidate must give the loss
and the gradient norm of the first.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.fsdp import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

import grpo_ext.integrations.verl as integration
from grpo_ext.bench import common
from grpo_ext.bench.training_case import SHAPES, Case
from grpo_ext.bench.training_workload import Workload, build_tokenizer

# verl patches a class of TRL that this step does not use and TRL 1.16 does not have.
monkey_patch.is_trl_available = lambda: False

#: Whether the head is fused, and the loss mode.
CANDIDATES = {"verl": (False, "vanilla"), "verl_fused": (True, "vanilla"), "ours": (True, "grpo_ext")}


def nested(rows: list[Any], device: str) -> Tensor:
    tensors = [torch.as_tensor(row, device=device) for row in rows]
    return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)


def batch_of(workload: Workload, fused: bool, micro_batch: int, device: str) -> Any:
    """The optimizer step's completions in verl's layout: jagged rows of prompt and completion."""
    assert workload.logps is not None
    prompts, responses, old, advantages = [], [], [], []
    for prompt, completions, logps in zip(workload.prompt_ids, workload.completions, workload.logps, strict=True):
        for number, (completion, values) in enumerate(zip(completions, logps, strict=True)):
            prompts.append(prompt)
            responses.append(completion)
            old.append(values)
            advantages.append([1.0 if number % 2 else -1.0] * len(completion))
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    masks = [[0] * len(prompt) + [1] * len(response) for prompt, response in zip(prompts, responses, strict=True)]
    tensors = {
        "prompts": nested(prompts, device),
        "responses": nested(responses, device),
        "input_ids": nested(rows, device),
        "position_ids": nested([list(range(len(row))) for row in rows], device),
        "loss_mask": nested(masks, device),
        "response_mask": nested([[1] * len(response) for response in responses], device),
        "old_log_probs": nested(old, device),
        "advantages": nested(advantages, device),
    }
    settings = {
        "use_remove_padding": False, "pad_mode": DatasetPadMode.NO_PADDING, "use_fused_kernels": fused,
        "calculate_entropy": False, "temperature": 1.0, "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": micro_batch, "global_batch_size": len(rows), "pad_token_id": 0,
    }  # fmt: skip
    return tensordict_utils.get_tensordict(tensors, settings)


def build_engine(folder: str, fused: bool, device: str) -> Any:
    on_gpu = device == "cuda"
    model = HFModelConfig(
        path=folder, use_remove_padding=False, use_fused_kernels=fused, fused_kernel_options={"impl_backend": "torch"},
        override_config={"attn_implementation": "sdpa"},
    )  # fmt: skip
    engine = FSDPEngineWithLMHead(
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, dtype="bfloat16" if on_gpu else "float32",
            mixed_precision=None if on_gpu else {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, clip_grad=1.0, total_training_steps=100),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    return engine


def measure(name: str, folder: str, workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Train; return seconds of the steps after the first, loss and gradient norm of the first, and peak memory."""
    fused, mode = CANDIDATES[name]
    if name == "ours":
        integration.patch()
    try:
        engine = build_engine(folder, fused, args.device)
        actor = FSDPActorConfig(
            strategy="fsdp2", rollout_n=workload.group, ppo_mini_batch_size=workload.rows,
            ppo_micro_batch_size_per_gpu=args.micro_batch, policy_loss={"loss_mode": mode}, use_kl_loss=False,
        )  # fmt: skip
        loss = functools.partial(ppo_loss, actor)
        seconds, first = [], {}
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with engine.train_mode():
            for step in range(args.steps + 1):
                batch = batch_of(workload, fused, args.micro_batch, args.device)
                common.synchronize(torch.device(args.device))
                started = time.perf_counter()
                output = engine.train_batch(batch, loss_function=loss)
                common.synchronize(torch.device(args.device))
                seconds.append(time.perf_counter() - started)
                if step == 0:
                    first = {"loss": sum(output["loss"]), "grad_norm": float(output["metrics"]["grad_norm"])}
    finally:
        integration.unpatch()
    median = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else float("nan")
    return {
        "candidate": name,
        "seconds": median,
        "tokens_per_s": workload.all_tokens / median,
        "peak_gib": peak,
    } | first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--candidates", default=",".join(CANDIDATES))
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one more")
    args = parser.parse_args()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29571",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    case = Case(model=args.model, device=args.device, dtype="bf16" if args.device == "cuda" else "fp32")
    workload = Workload(case.shape.vocabulary, args.prompts, args.group, args.tokens, spread=True)
    with tempfile.TemporaryDirectory() as folder:
        model = case.build()
        workload.attach_logps(model, torch.device(args.device))
        model.save_pretrained(folder)
        build_tokenizer(case.shape.vocabulary).save_pretrained(folder)
        del model
        results = [measure(name, folder, workload, args) for name in args.candidates.split(",")]
    common.print_table(results, list(results[0]))
    print(json.dumps({"results": results, **common.machine(torch.device(args.device))}))
    for row in results[1:]:
        for key, bound in (("loss", 0.01), ("grad_norm", 0.05)):
            if abs(row[key] - results[0][key]) > bound * max(1.0 if key == "loss" else 0.0, abs(results[0][key])):
                raise SystemExit(f"{row['candidate']}: {key} {row[key]} instead of {results[0][key]}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
