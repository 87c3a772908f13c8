"""Run every CUDA kernel once on small, irregular shapes under compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/cuda/small_grid.py

Covers odd vocabularies (rows start between 16-byte blocks, one vocabulary needs several CTAs per row), masked rows, in
place and allocated gradients, all dtypes and all routes. Exits with an error if a gradient is not finite.
"""

from __future__ import annotations

import itertools

import torch

import grpo_ext
from grpo_ext import _C
from grpo_ext.config import LossConfig

CONFIGS = (
    LossConfig(),
    LossConfig(entropy_coef=0.1, logit_softcap=8.0, beta=0.1, temperature=0.7),
    LossConfig(loss_type="vespo", importance_sampling_level="sequence"),
)


def main() -> None:
    torch.manual_seed(0)
    shapes = ((7, torch.float32), (1001, torch.bfloat16), (50_261, torch.bfloat16), (25_601, torch.float32))
    for route, (vocab, dtype), config in itertools.product(("auto", "constants_kernel", "streaming"), shapes, CONFIGS):
        assert _C.select_cuda_route(route)
        for inplace in (False, True):
            leaf = torch.randn(2, 5, vocab, device="cuda").to(dtype).requires_grad_()
            ids = torch.randint(0, vocab, (2, 4), device="cuda")
            mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]], device="cuda")
            some = -torch.rand(2, 4, device="cuda") * 8
            out = grpo_ext.grpo_loss(
                (leaf * 1.0)[:, :-1], ids, some[:, 0], mask, config, old_logps=some, ref_logps=some, inplace=inplace
            )
            (out.loss * 2).backward()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
        logp, entropy = grpo_ext.selective_log_softmax(leaf[:, :-1], ids, return_entropy=True)
        (logp.sum() + entropy.sum()).backward()
    torch.cuda.synchronize()
    _C.select_cuda_route("auto")


if __name__ == "__main__":
    main()
