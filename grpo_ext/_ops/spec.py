"""LossConfig as the numbers that the C++ side reads."""

from __future__ import annotations

import functools
import math

import torch

from grpo_ext import _C
from grpo_ext.config import IMPORTANCE_MODES, LEVELS, LOSS_TYPES, LossConfig, check_logit_transform


def loss_spec(config: LossConfig, grad_scale: float) -> list[float]:
    """``config`` as the numbers of the C++ ``LossSpec``. Shared between calls: do not change it."""
    if torch.compiler.is_compiling():
        return _loss_spec(config, grad_scale)
    return _cached_loss_spec(config, grad_scale)


def _loss_spec(config: LossConfig, grad_scale: float) -> list[float]:
    mode = 1 + IMPORTANCE_MODES.index(config.vllm_importance_sampling_mode)
    threshold, high = config.off_policy_mask_threshold, config.clip_high
    values: dict[str, float] = {
        "loss_type": LOSS_TYPES.index(config.loss_type),
        "level": LEVELS.index(config.importance_sampling_level),
        "importance_mode": mode if config.vllm_importance_sampling_correction else 0,
        "has_off_policy_threshold": threshold is not None,
        "clip_low": 1 - config.epsilon,
        "clip_high": high if config.loss_type == "cispo" else 1 + high,
        "delta": math.inf if config.delta is None else config.delta,
        "off_policy_threshold": threshold or 0.0,
        "max_completion_length": config.max_completion_length or 1,
        "grad_scale": grad_scale,
    }
    return [float(values[name] if name in values else getattr(config, name)) for name in _C.LOSS_SPEC_FIELDS]


_cached_loss_spec = functools.lru_cache(maxsize=256)(_loss_spec)


def logit_transform(temperature: float, logit_softcap: float | None, logit_scale: float) -> list[float]:
    """Scale, softcap (0: none) and temperature of raw logits, as operators take them.

    Raises:
        ValueError: float32 does not hold one of them.
    """
    check_logit_transform(temperature, logit_softcap or None, logit_scale)
    return [float(logit_scale), float(logit_softcap or 0.0), float(temperature)]


IDENTITY = logit_transform(1.0, None, 1.0)
