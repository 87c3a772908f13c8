"""The fused head on a model that is split over two ranks; see test_sharded_head.py."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toys import EOS, PAD, build_model

from grpo_ext import LossConfig
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.modules.inspection import causal_lm
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.loss import ModelPass
from grpo_ext.update.micro_batch import MicroBatch

#: Whether there are old log probabilities. Off-policy at sequence level the head is needed in backward once more: a
#: sharded weight must be whole there, too.
CONFIGS = {
    "formed in forward": (LossConfig(), False),
    "formed in backward": (LossConfig(loss_type="grpo", importance_sampling_level="sequence"), True),
}


def micro_batch(rank: int, off_policy: bool) -> MicroBatch:
    rows = [[9, 8, EOS], [9], [10, 11], [3, EOS]]
    rollout = Rollout(
        key=(0, 0), start=0, rows_per_slice=2, prompt_ids=[[5, 8, 6], [5, 8, 6], [5, 9, 9, 6], [5, 9, 9, 6]],
        completion_ids=rows, in_loss=[True] * 4, advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), normaliser=4.0,
        tokens_seen=0, old_logps=[None, None], ref_logps=[None, None],
    )  # fmt: skip
    batch = rollout.micro_batch(rank, PAD, "cpu")
    if off_policy:
        batch.old_logps = torch.full(batch.completion_ids.shape, -3.0)
    return batch


def wrapped(kind: str) -> nn.Module:
    model = build_model()
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # As accelerate does under mixed precision, whose outputs are narrower than a loss may be.
    outputs = MixedPrecisionPolicy(output_dtype=torch.bfloat16 if kind == "fsdp2, narrow outputs" else None)
    if kind != "fsdp2":
        fully_shard(model.lm_head, mesh=mesh, mp_policy=outputs)
    return fully_shard(model, mesh=mesh, mp_policy=outputs)


def step(model: nn.Module, inner: nn.Module, batch: MicroBatch, config: LossConfig) -> dict[str, torch.Tensor]:
    """Log probabilities and gradients of one micro-batch."""
    head = FusedHead(inner)
    policy = ModelPass(LayoutChooser(inner, False), head, config)
    values = {"logps": policy.logps(model, batch)}
    output = policy.loss(model, batch)
    output.loss.backward()
    assert head.describe() == "fused head", head.describe()
    values["loss"] = output.loss.detach()
    for name, parameter in inner.named_parameters():
        grad: Any = parameter.grad
        values[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return values


def main(rank: int, world: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    try:
        for config_name, (config, off_policy) in CONFIGS.items():
            alone = []
            for r in range(world):
                model = build_model()
                alone.append(step(model, model, micro_batch(r, off_policy), config))
            for kind in ("ddp", "fsdp2", "fsdp2, head apart", "fsdp2, narrow outputs"):
                model = wrapped(kind)
                got = step(model, causal_lm(model), micro_batch(rank, off_policy), config)
                assert got.keys() == alone[rank].keys()
                for name, value in got.items():
                    own = name in ("logps", "loss")
                    want = alone[rank][name] if own else sum(other[name] for other in alone) / world
                    torch.testing.assert_close(
                        value, want, rtol=1e-5, atol=1e-6, msg=lambda m, w=(config_name, kind, name): f"{w}: {m}"
                    )
    finally:
        dist.destroy_process_group()
