"""Do modules under FSDP2 read their own weights? Weights that never change, read again and again.

    torchrun --nproc_per_node 2 fsdp_prefetch_worker.py

A round is three passes without gradient and two micro-batches, sharded as accelerate does it. Prints a line of JSON for
each case: ``wrong`` counts, on this rank, reads of weights other than those that were there first, ``dropped`` the
all-gathers that a backward has begun for nobody, ``ahead`` those that were begun before they were needed. Nothing of it
is the trainer's but `set_backward_prefetch` and `wait_for_all_gathers`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from toys import build_model
from two_process_worker import counted_drops

from grpo_ext.modules.sharding import set_backward_prefetch, wait_for_all_gathers

ROUNDS = 30


def shard(model: Any, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.model.embed_tokens, *model.model.layers):
        fully_shard(part, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def watch(model: nn.Module) -> Tensor:
    """Counts the reads of weights other than these; nothing waits for the device."""
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrong = torch.zeros((), device=next(model.parameters()).device)

    def compare(prefix: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for name, parameter in module.named_parameters():
                wrong.add_((parameter.detach() != first[prefix + name]).any())

        return hook

    for name, module in model.named_modules():
        if name in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"):
            module.register_forward_hook(compare(name + "."), prepend=True)
    return wrong


@contextlib.contextmanager
def counted_prefetches() -> Iterator[list[int]]:
    """How many all-gathers are begun ahead."""
    prefetch, begun = FSDPParamGroup._prefetch_unshard, [0]

    def counting(group: FSDPParamGroup, *arguments: Any) -> None:
        before = group._all_gather_result
        prefetch(group, *arguments)
        begun[0] += group._all_gather_result is not before

    FSDPParamGroup._prefetch_unshard = staticmethod(counting)  # type: ignore[assignment]
    try:
        yield begun
    finally:
        FSDPParamGroup._prefetch_unshard = staticmethod(prefetch)  # type: ignore[assignment]


def run(device: torch.device, in_order: bool, frozen: bool) -> dict[str, Any]:
    model: Any = build_model().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "layers.1.self_attn.q_proj" in name)
    wrong = watch(model)
    shard(model, device)
    if in_order:
        set_backward_prefetch(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = [torch.randint(2, 32, (4, 8), generator=generator).to(device) for _ in range(5)]
    with counted_drops() as dropped, counted_prefetches() as ahead:
        for _ in range(ROUNDS):
            for batch in ids[:3]:
                with torch.no_grad():
                    model(input_ids=batch, use_cache=False)
            for number, batch in enumerate(ids[3:]):
                model.set_requires_gradient_sync(number == 1)
                logits = model(input_ids=batch, use_cache=False).logits
                logits.log_softmax(-1).gather(-1, batch.unsqueeze(-1)).mean().backward()
                if in_order:
                    assert wait_for_all_gathers(model)
            model.zero_grad()
    found = {"wrong": int(wrong), "dropped": dropped[0], "ahead": ahead[0]}
    return {"in_order": in_order, "frozen": frozen, **found}


def main() -> None:
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    for in_order in (False, True):
        for frozen in (False, True):
            for _ in range(3 if on_gpus else 1):
                print(json.dumps(run(device, in_order, frozen)) + "\n", end="", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
