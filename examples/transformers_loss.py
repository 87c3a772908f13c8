"""Fine-tune a transformers model with this package's cross entropy: one line after creating the model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_ext.integrations.transformers import causal_lm_loss

model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
model.loss_function = causal_lm_loss
ids = torch.randint(0, 1000, (2, 12))
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
print(f"loss {loss.item():.4f}")
