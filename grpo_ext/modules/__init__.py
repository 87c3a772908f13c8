"""Faster layers for any transformers model: fused head, LoRA, RMSNorm, gradient checkpointing.

    from grpo_ext import modules

    with modules.attached(model):
        ...  # train

`attach` and `attached` replace the forward of LoRA and RMSNorm layers. `FusedHead` computes a loss in place of the
model's logits. `checkpointing_arguments` returns ``gradient_checkpointing_kwargs`` that cost the host less.
"""

from __future__ import annotations

from grpo_ext.modules.attach import FasterLayers, attach, attached
from grpo_ext.modules.checkpointing import checkpointing_arguments
from grpo_ext.modules.fused_head import FusedHead

__all__ = ["FasterLayers", "FusedHead", "attach", "attached", "checkpointing_arguments"]
