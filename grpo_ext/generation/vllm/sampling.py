"""Translate `SamplingParams` to vLLM: the same distribution as `TransformersEngine` samples from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from grpo_ext.generation.engine import SamplingParams

#: Supported fields of ``generation_kwargs``, and vLLM's names for them.
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
    """Fields of vLLM's SamplingParams, for the engine in this process and for the server.

    A completion ends at ``end_ids`` only: ``ignore_eos`` disables vLLM's own end token.

    Raises:
        ValueError: ``generation_kwargs`` has a field that vLLM does not have.
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
                f"generation_kwargs has {name!r}, which vLLM does not know: remove it or set use_vllm=False "
                f"(known: do_sample, {', '.join(EXTRA_FIELDS)})"
            )
        elif value is not None:
            ids = isinstance(value, int) and EXTRA_FIELDS[name] == "stop_token_ids"
            fields[EXTRA_FIELDS[name]] = [value] if ids else value
    return fields


def warn_of_bias(sampling: SamplingParams) -> None:
    """Warn if the engine samples from another distribution than the one that the loss differentiates."""
    cuts = []
    if sampling.top_p < 1:
        cuts.append(f"top_p={sampling.top_p}")
    if sampling.top_k:
        cuts.append(f"top_k={sampling.top_k}")
    if sampling.min_p:
        cuts.append(f"min_p={sampling.min_p}")
    if cuts:
        warnings.warn(
            f"{', '.join(cuts)} cuts off the tail of the distribution: vLLM renormalizes the log probabilities over "
            "the remaining tokens, the trainer over the whole vocabulary. The ratio of the two probabilities is then "
            "below 1 for every token, and the importance weights shrink the update: disable the cuts "
            "(top_p=1, top_k=0, min_p=None) or set vllm_importance_sampling_correction=False",
            stacklevel=3,
        )
    if sampling.repetition_penalty != 1:
        warnings.warn(
            f"repetition_penalty={sampling.repetition_penalty} changes vLLM's distribution and log probabilities, "
            "and not the trainer's: the importance weights then correct for the penalty too. Set it to 1, or set "
            "vllm_importance_sampling_correction=False",
            stacklevel=3,
        )
