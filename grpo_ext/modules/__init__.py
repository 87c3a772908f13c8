"""Faster layers for any transformers model: fused head, LoRA, RMSNorm, gradient checkpointing, sharded weights."""
