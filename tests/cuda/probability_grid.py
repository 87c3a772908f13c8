"""Run the probability route on small, irregular shapes under compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/cuda/probability_grid.py

Covers odd vocabularies and row counts, with and without bias, masked rows dropped or kept, frozen and trained heads,
the logits route (an entropy bonus), and tokens so improbable that their tiles are recentred. Exits with an error if a
gradient is not finite, or if no log probability is below -100.
"""

from __future__ import annotations

import itertools

import torch

import grpo_ext
from grpo_ext.config import LossConfig


def main() -> None:
    torch.manual_seed(0)
    lowest = 0.0
    shapes = ((1, 3, 8), (2, 70, 72), (3, 129, 136))
    for (B, T, H), vocab, with_bias in itertools.product(shapes, (7, 257, 1001), (0, 1)):
        hidden = torch.randn(B, T, H, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn(vocab, H, device="cuda").bfloat16().requires_grad_()
        bias = torch.randn(vocab, device="cuda").bfloat16() if with_bias else None
        ids = torch.randint(0, vocab, (B, T), device="cuda")
        mask = torch.rand(B, T, device="cuda") > 0.3
        mask[:, 0] = True
        some = -torch.rand(B, T, device="cuda") * 8
        per_sequence = {"importance_sampling_level": "sequence"}
        cases = [
            (LossConfig(), {"old_logps": some}),
            # More valid rows than there are: masked ones are among the selected.
            (LossConfig(beta=0.1), {"old_logps": some, "ref_logps": some, "valid_rows": B * T}),
            (LossConfig(loss_type="grpo", **per_sequence), {}),
            (LossConfig(loss_type="vespo"), {"old_logps": some}),
            (LossConfig(entropy_coef=0.01), {"old_logps": some}),
        ]
        for (config, given), head in itertools.product(cases, (weight, weight.detach())):
            out = grpo_ext.linear_grpo_loss(
                hidden, head, ids, some[:, 0], mask, config, bias=bias, memory_budget=1 << 16, **given
            )
            out.loss.backward()
        for tensor in (hidden, weight):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
        with torch.no_grad():
            grpo_ext.linear_selective_log_softmax(hidden, weight, ids, mask=mask)
        far = (hidden.detach() * 100).requires_grad_()
        for head in (weight, weight.detach()):
            logps = grpo_ext.linear_selective_log_softmax(far, head, ids, bias=bias, mask=mask, memory_budget=1 << 16)
            assert isinstance(logps, torch.Tensor)
            logps.sum().backward()
            lowest = min(lowest, float(logps.min()))
        assert far.grad is not None
        assert far.grad.isfinite().all()
    assert lowest < -100
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
