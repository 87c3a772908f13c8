"""Run Unsloth's GRPO trainer with this package's kernels; patch before creating it. Needs a GPU and unsloth."""

import unsloth  # noqa: F401  (must be imported first)

import grpo_ext.integrations.unsloth as u

u.patch()
# Continue as in Unsloth's own notebooks: FastLanguageModel.from_pretrained, GRPOConfig, GRPOTrainer, train()
print(u.status())
