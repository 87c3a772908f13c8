"""Compute Liger's GRPO loss with this package's kernels: change one import."""

import torch

from grpo_ext.integrations.liger import LigerFusedLinearGRPOLoss

hidden = torch.randn(2, 6, 16, requires_grad=True)
head = torch.randn(1000, 16, requires_grad=True)
ids, mask, advantages = torch.randint(0, 1000, (2, 6)), torch.ones(2, 6), torch.tensor([1.0, -1.0])
loss, (clip_ratio,) = LigerFusedLinearGRPOLoss(beta=0.0)(hidden, head, ids, mask, advantages)
loss.backward()
print(f"loss {loss.item():.4f}, clipped {clip_ratio.item():.2f}, gradient {head.grad.norm().item():.4f}")
