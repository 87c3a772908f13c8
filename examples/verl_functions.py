"""Call the functions that verl uses with ``model.external_lib=grpo_ext.integrations.verl``, without a cluster."""

from types import SimpleNamespace

import torch

from grpo_ext.integrations.verl_functions import grpo_ext_policy_loss, linear_cross_entropy

hidden, head, labels = torch.randn(2, 6, 16), torch.randn(1000, 16, requires_grad=True), torch.randint(0, 1000, (2, 6))
log_prob, entropy = linear_cross_entropy(hidden, head, labels)
config = SimpleNamespace(
    clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={}
)
old, advantages = log_prob.detach().view(2, 6), torch.randn(2, 6)
loss, metrics = grpo_ext_policy_loss(old, log_prob.view(2, 6), advantages, torch.ones(2, 6), config=config)
loss.backward()
print(f"loss {loss.item():.4f}", metrics)
