"""Make a plain training loop faster: GRPO updates of any transformers model, with and without `modules.attach`.

    python examples/plain_loop.py                                         # a tiny model on the CPU
    python examples/plain_loop.py --size 0.6b --device cuda               # Qwen3-0.6B's shape, LoRA, bf16
    python examples/plain_loop.py --size 0.6b --device cuda --trained full

Weights and completions are random: replace `build_model` and `random_batches` by yours.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen3Config

import grpo_ext
from grpo_ext import modules

#: vocabulary, hidden, layers, inner, heads, kv_heads, head_dim, prompt tokens, longest completion
SIZES = {
    "tiny": (512, 32, 2, 64, 4, 2, 8, 8, 16),
    "0.6b": (151936, 1024, 28, 3072, 16, 8, 128, 128, 1024),
    "1.7b": (151936, 2048, 28, 6144, 16, 8, 128, 128, 1024),
}
Batch = dict[str, Tensor]


def build_model(size: str, trained: str, device: str, dtype: torch.dtype) -> Any:
    vocabulary, hidden, layers, inner, heads, kv_heads, head_dim, *_ = SIZES[size]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if trained == "lora":
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def random_batches(size: str, count: int, rows: int, device: str) -> list[Batch]:
    vocabulary, *_, prompt, longest = SIZES[size]
    g = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        lengths = torch.randint(longest // 4, longest + 1, (rows, 1), generator=g)
        width = int(lengths.max())
        mask = torch.arange(width) < lengths
        ids = torch.randint(vocabulary, (rows, prompt + width), generator=g)
        ids[:, prompt:].masked_fill_(~mask, 0)
        batch = {
            "ids": ids,
            "mask": torch.cat([torch.ones(rows, prompt, dtype=torch.bool), mask], dim=1),
            "completion_mask": mask,
            "advantages": torch.randn(rows, generator=g),
        }
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def inputs_of(batch: Batch) -> dict[str, Any]:
    """The head sees the completion's rows and the row before them, which predicts its first token."""
    keep = batch["completion_mask"].shape[1] + 1
    return {"input_ids": batch["ids"], "attention_mask": batch["mask"], "logits_to_keep": keep, "use_cache": False}


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """GRPO with one update for each batch, from logits."""
    ids, mask = batch["ids"][:, -batch["completion_mask"].shape[1] :], batch["completion_mask"]
    logits = model(**inputs_of(batch)).logits[:, :-1]
    logps = -cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none").view(ids.shape)
    ratio = torch.exp(logps - logps.detach())
    loss = -torch.min(ratio, ratio.clamp(0.8, 1.2)) * batch["advantages"].unsqueeze(1)
    return (loss * mask).sum() / mask.sum()


def faster_loss(faster: modules.FasterLayers, batch: Batch) -> Tensor:
    """Compute the loss from hidden states instead of logits."""
    ids, mask = batch["ids"][:, -batch["completion_mask"].shape[1] :], batch["completion_mask"]
    config = grpo_ext.LossConfig(logit_scale=faster.head.logit_scale, logit_softcap=faster.head.logit_softcap)
    output = faster.run(
        inputs_of(batch),
        lambda hidden, weight, bias: grpo_ext.linear_grpo_loss(
            hidden[:, :-1], weight, ids, batch["advantages"], mask, config, bias=bias
        ),
    )
    return output.loss


def train(model: Any, batches: list[Batch], loss_of: Callable[[Batch], Tensor], steps: int) -> dict[str, float]:
    """The loop: ``steps`` optimizer steps, each over all batches; one step before them is not timed."""
    cuda = batches[0]["ids"].is_cuda
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=cuda)
    first: dict[str, float] = {}
    started = 0.0
    for step in range(steps + 1):
        loss = torch.zeros((), device=batches[0]["ids"].device)
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                part = loss_of(batch) / len(batches)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            first = {"loss": loss.item(), "grad_norm": norm.item()}  # waits for the device
            started = time.perf_counter()
    if cuda:
        torch.cuda.synchronize()
    tokens = steps * sum(int(batch["mask"].sum()) for batch in batches)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return first | {"tokens_per_s": tokens / (time.perf_counter() - started), "peak_gib": peak}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--trained", choices=("lora", "full"), default="lora")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", type=int, default=8, help="micro-batches of an optimizer step")
    parser.add_argument("--rows", type=int, default=8, help="completions of a micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps")
    args = parser.parse_args(arguments)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    batches = random_batches(args.size, args.batches, args.rows, args.device)
    results = {}
    for name in ("plain", "modules.attach"):
        model = build_model(args.size, args.trained, args.device, dtype)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if name == "plain":
            model.gradient_checkpointing_enable()
            results[name] = train(model, batches, functools.partial(plain_loss, model), args.steps)
        else:
            faster = modules.attach(model, checkpointing=True)  # the one call
            results[name] = train(model, batches, functools.partial(faster_loss, faster), args.steps)
            print(*faster.report(), sep="\n")
        del model
    for name, values in results.items():
        print(f"{name:15}", ", ".join(f"{key} {value:.5g}" for key, value in values.items()))
    print(f"{results['modules.attach']['tokens_per_s'] / results['plain']['tokens_per_s']:.2f} times as fast")
    return results


if __name__ == "__main__":
    main()
