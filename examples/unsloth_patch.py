"""Unsloth's GRPO trainer on these kernels: patch before the trainer is made. Needs a GPU and unsloth."""

import unsloth  # noqa: F401  (it wants to come first)

import grpo_ext.integrations.unsloth as u

u.patch()
# from here on as in Unsloth's own notebooks: FastLanguageModel.from_pretrained, GRPOConfig, GRPOTrainer, train()
print(u.status())
