"""Keys and values of prompts, computed once per distinct prompt and shared by all its completions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def position_ids(mask: Tensor) -> Tensor:
    """Count the unmasked tokens of each row from 0: ``(n, T)`` int64 for an attention mask ``(n, T)``."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def shared_prompt_cache(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, which: Tensor) -> Any | None:
    """Compute the keys and values of all but the last prompt token, one cache row per completion.

    Args:
        model: causal language model of transformers, or its PEFT or DDP wrapper.
        prompt_ids, prompt_mask: ``(u, P)`` int64, the left-padded distinct prompts; P is at least 2.
        which: ``(n,)`` int64, the distinct prompt of each completion.

    Returns:
        A cache of n rows and P - 1 positions, differentiable if gradients are enabled. None if the model's cache holds
        other state than keys and values of all positions (sliding windows, recurrent layers).
    """
    mask = prompt_mask[:, :-1]
    outputs = model(
        input_ids=prompt_ids[:, :-1],
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache: Any = getattr(outputs, "past_key_values", None)
    if not is_plain_cache(cache):
        return None
    cache.reorder_cache(which)
    return cache


def is_plain_cache(cache: object) -> bool:
    """Whether every layer of a cache holds the keys and values of all positions and no other state."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
