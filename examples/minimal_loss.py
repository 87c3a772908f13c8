"""Compute a GRPO-family loss and its gradient from the logits of a model, without a trainer."""

import torch

import grpo_ext

torch.manual_seed(0)
logits = torch.randn(2, 5, 1000, requires_grad=True)  # 2 completions of 5 tokens, a vocabulary of 1000
completion_ids = torch.randint(0, 1000, (2, 5))
completion_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
advantages = torch.tensor([1.0, -1.0])

config = grpo_ext.LossConfig(loss_type="dapo", epsilon_high=0.28)
output = grpo_ext.grpo_loss(logits, completion_ids, advantages, completion_mask, config)
output.loss.backward()
print(f"loss {output.loss.item():.4f}, gradient norm {logits.grad.norm().item():.4f}")
