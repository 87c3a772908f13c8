"""Gradient checkpointing with less host work.

transformers' default handles every tensor that autograd saves in hooks written in Python. In a small model with an
adapter the hooks take 40 % of the host's time for forward and backward, and so of the step if it is host-bound. Torch's
reentrant checkpointing (``use_reentrant=True``) runs a layer without a graph and builds the graph in backward. It needs
no hooks and does equal arithmetic.

Reentrant checkpointing requires that only a layer's first argument has a gradient. transformers' code for the
architectures below meets this condition. Other models keep transformers' default.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_ext.modules.inspection import has_dropout, is_peft_model

#: ``config.model_type`` of models whose layers pass on hidden states and share no other tensor with a gradient.
LAYER_BY_LAYER = frozenset(
    {"gemma", "gemma2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)  # fmt: skip


def checkpointing_arguments(model: nn.Module) -> dict[str, Any] | None:
    """Return ``gradient_checkpointing_kwargs`` for a model; None keeps transformers' default.

    If kwargs are returned, the outputs of the model's embeddings require a gradient from then on: a reentrant layer
    computes no gradient for its weights if none of its inputs requires one.

    Args:
        model: unwrapped; a PEFT model or not. Must not be sharded by FSDP or DeepSpeed, which gather weights in hooks
            around the layers.
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
    # The config's name does not prove it: the code may come with the checkpoint, and layers may have been replaced.
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    return all(type(module).__module__.startswith("transformers.models.") for module in (base, *layers))


def _has_routed_adapter(model: Any) -> bool:
    """Whether the adapter is X-LoRA, which scales layers by results of another pass that have a gradient."""
    return is_peft_model(model) and any(config.peft_type == "XLORA" for config in model.peft_config.values())
