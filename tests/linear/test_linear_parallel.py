"""Vocabulary-parallel: two ranks with half the head each give what one rank gives."""

from __future__ import annotations

from pathlib import Path

import parallel_worker
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import grpo_ext
from grpo_ext.vocabulary.sharded_logits import _ShardedLogSoftmax
from grpo_ext.vocabulary.shards import VocabularyShard


@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_ranks(kind: str, tmp_path: Path) -> None:
    """gloo on the CPU, NCCL on two GPUs; values and gradients, frozen and trained head, every route; and a DTensor."""
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    mp.spawn(parallel_worker.main, args=(2, str(tmp_path / "rendezvous"), kind), nprocs=2)


def test_a_group_of_one_is_no_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'one'}", rank=0, world_size=1)
    try:
        hidden, weight, ids = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 8, 3])
        alone = grpo_ext.linear_selective_log_softmax(hidden, weight, ids)
        grouped = grpo_ext.linear_selective_log_softmax(hidden, weight, ids, process_group=dist.group.WORLD)
        assert torch.equal(alone, grouped)
        logits = hidden @ weight.t()
        assert torch.equal(
            grpo_ext.selective_log_softmax(logits, ids, process_group=dist.group.WORLD),
            grpo_ext.selective_log_softmax(logits, ids),
        )
        # The exchange itself, of a rank with itself.
        shard = VocabularyShard([1.0, 0.0, 1.0], 9, dist.group.WORLD)
        stats = shard.statistics(hidden @ weight.t(), ids, None, True)
        torch.testing.assert_close(stats.logps, alone)
        # The operators for logits in shards.
        logits, ids = logits.double().view(1, 3, 9).requires_grad_(), ids.view(1, 3)
        name = dist.group.WORLD.group_name
        logps, entropy, lse = torch.ops.grpo_ext.sharded_logps(logits.detach(), ids, [1.0, 0.0, 1.0], name)
        torch.library.opcheck(torch.ops.grpo_ext.sharded_logps, (logits.detach(), ids, [1.0, 0.0, 1.0], name))
        gradient = (logits.detach(), ids, logps, entropy, lse, torch.ones_like(lse), None, [1.0, 0.0, 1.0], name)
        torch.library.opcheck(torch.ops.grpo_ext.sharded_gradient, gradient)
        torch.testing.assert_close(logps, alone.double().view(1, 3))
        logps, _ = _ShardedLogSoftmax.apply(logits, ids, [1.0, 0.0, 1.0], name, False)
        (gradient_of_logits,) = torch.autograd.grad(logps.sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^selective_log_softmax\(process_group=...\) has no second derivative"):
            gradient_of_logits.square().sum().backward()
    finally:
        dist.destroy_process_group()
