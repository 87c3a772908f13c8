"""Gradient checkpointing that costs the host less.

transformers' default records every tensor that autograd saves through hooks written in Python. In a small model with an
adapter that is 40 % of the host's work of a forward and backward, and where the host is slower than the device, of the
step. The older way of torch (``use_reentrant=True``) runs a layer without a graph and builds it in the backward: no
hooks, the same arithmetic. It has one condition, that nothing with a gradient enters a layer except its first argument,
which is known of the architectures below in transformers' own code; other models keep transformers' default.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_ext.modules.inspection import has_dropout, is_peft_model

#: ``config.model_type`` of models whose layers hand on hidden states and share nothing else that has a gradient.
LAYER_BY_LAYER = frozenset(
    {"gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)  # fmt: skip


def checkpointing_arguments(model: nn.Module) -> dict[str, Any] | None:
    """``gradient_checkpointing_kwargs`` for a model; None leaves transformers' own.

    Where it returns some, the model's embeddings are made to require a gradient: a layer none of whose inputs does gets
    none for its weights this way.

    Args:
        model: unwrapped; a PEFT model or not. Not one that FSDP or DeepSpeed shard: they gather weights in hooks around
            the layers.
    """
    base: Any = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    if not _layer_by_layer(base) or _has_routed_adapter(model):
        return None
    embeddings = base.get_input_embeddings()
    if not all(p.requires_grad for p in embeddings.parameters()) and not getattr(base, "_require_grads_hooks", None):
        base.enable_input_require_grads()
    return {"use_reentrant": True, "preserve_rng_state": has_dropout(model)}


def _layer_by_layer(base: Any) -> bool:
    if getattr(getattr(base, "config", None), "model_type", None) not in LAYER_BY_LAYER:
        return False
    # A name in a config says nothing of code that came with a checkpoint, or of layers that somebody exchanged.
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    return all(type(module).__module__.startswith("transformers.models.") for module in (base, *layers))


def _has_routed_adapter(model: Any) -> bool:
    """X-LoRA's layers are scaled by numbers that another pass computed, with a gradient."""
    return is_peft_model(model) and any(config.peft_type == "XLORA" for config in model.peft_config.values())
