"""Faster layers for any transformers model: fused head, LoRA, RMSNorm, gradient checkpointing.

    from grpo_ext import modules

    faster = modules.attach(model, checkpointing=True)
    ...  # train; faster.run(inputs, loss) computes a loss in place of the model's logits
    faster.detach()

`attach` and `attached` replace the forward of LoRA and RMSNorm layers and, on request, enable gradient checkpointing
that costs the host less. `FasterLayers.run` computes a loss from the hidden states. `FusedHead` and
`checkpointing_arguments` are its parts, for loops that need them apart.
"""

from __future__ import annotations

from grpo_ext.modules.attach import FasterLayers, attach, attached
from grpo_ext.modules.checkpointing import checkpointing_arguments
from grpo_ext.modules.fused_head import FusedHead

__all__ = ["FasterLayers", "FusedHead", "attach", "attached", "checkpointing_arguments"]
