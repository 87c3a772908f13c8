"""Sampling parameters in vLLM's words: the same draws as `TransformersEngine` for the same `SamplingParams`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from grpo_ext.generation.engine import SamplingParams

#: Fields of ``generation_kwargs`` that vLLM has under its own name or ours.
EXTRA_FIELDS = {
    "min_new_tokens": "min_tokens",
    "min_tokens": "min_tokens",
    "max_new_tokens": "max_tokens",
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop_token_ids": "stop_token_ids",
    "eos_token_id": "stop_token_ids",
}


def sampling_fields(sampling: SamplingParams, end_ids: Sequence[int]) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams, the same for the engine in this process and the server.

    A completion ends at ``end_ids`` and nothing else: vLLM's own idea of the end token is switched off, so both
    engines end where the trainer says.

    Raises:
        ValueError: for a field of ``generation_kwargs`` that vLLM does not have.
    """
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
        "top_k": (sampling.top_k or 0) if sampling.temperature > 0 else 0,
        "min_p": (sampling.min_p or 0.0) if sampling.temperature > 0 else 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(end_ids),
        "ignore_eos": True,
    }
    for name, value in sampling.extra.items():
        if name == "do_sample":
            fields |= {} if value else {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        elif name not in EXTRA_FIELDS:
            raise ValueError(
                f"generation_kwargs has {name!r}, which vLLM does not know: take it out or set use_vllm=False "
                f"(known: do_sample, {', '.join(EXTRA_FIELDS)})"
            )
        elif value is not None:
            ids = isinstance(value, int) and EXTRA_FIELDS[name] == "stop_token_ids"
            fields[EXTRA_FIELDS[name]] = [value] if ids else value
    return fields


def warn_of_bias(sampling: SamplingParams) -> None:
    """Warn where the engine draws from another distribution than the one that the loss differentiates."""
    cuts = []
    if sampling.top_p < 1:
        cuts.append(f"top_p={sampling.top_p}")
    if sampling.top_k:
        cuts.append(f"top_k={sampling.top_k}")
    if sampling.min_p:
        cuts.append(f"min_p={sampling.min_p}")
    if cuts:
        warnings.warn(
            f"{', '.join(cuts)} cuts off the tail of the distribution: vLLM reports log probabilities of what is "
            "left, scaled up to sum to 1, while the trainer's are of the whole vocabulary. The ratio between the "
            "two is then below 1 for every token, and the importance weights shrink the update: leave the cuts off "
            "(top_p=1, top_k=0, min_p=None) or set vllm_importance_sampling_correction=False",
            stacklevel=3,
        )
    if sampling.repetition_penalty != 1:
        warnings.warn(
            f"repetition_penalty={sampling.repetition_penalty} changes what vLLM draws from and reports, and the "
            "trainer's log probabilities know nothing of it: the importance weights then correct for the penalty "
            "too. Leave it at 1, or set vllm_importance_sampling_correction=False",
            stacklevel=3,
        )
