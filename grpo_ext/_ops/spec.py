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
    values: dict[str, float | None] = {
        "loss_type": LOSS_TYPES.index(config.loss_type),
        "importance_sampling_level": LEVELS.index(config.importance_sampling_level),
        "importance_mode": mode if config.vllm_importance_sampling_correction else 0,
        "clip_high": config.clip_high,
        "importance_min": config.importance_min,
        "importance_cap": config.importance_cap,
        "grad_scale": grad_scale,
    }
    fields = [values.get(name, getattr(config, name, None)) for name in _C.LOSS_SPEC_FIELDS]
    return [math.nan if value is None else float(value) for value in fields]


_cached_loss_spec = functools.lru_cache(maxsize=256)(_loss_spec)


def logit_transform(temperature: float, logit_softcap: float | None, logit_scale: float) -> list[float]:
    """The C++ ``LogitTransform``; a softcap of None or 0 is none. ValueError for numbers that float32 does not hold."""
    check_logit_transform(temperature, logit_softcap or None, logit_scale)
    return [float(logit_scale), float(logit_softcap or 0.0), float(temperature)]
