"""Inspect a transformers model: adapter, dropout, context length, head; hold it in eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

#: Fields of a config whose rates may be applied without a layer.
DROPOUT_RATES = ("attention_dropout", "dropout", "hidden_dropout", "activation_dropout", "layerdrop", "resid_pdrop")


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model has a PEFT adapter that can be disabled."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def has_dropout(model: nn.Module) -> bool:
    """Whether two passes in train mode differ, through a dropout layer or a rate of the config."""
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    config: Any = getattr(model, "config", None)
    configs = (config, getattr(config, "text_config", None))
    rates = (getattr(part, name, None) for part in configs for name in DROPOUT_RATES)
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def context_length(model: nn.Module) -> int | None:
    """Return the longest sequence that the model supports, in tokens; None if its config has no such number."""
    config = getattr(model, "config", None)
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the transformers model inside the wrappers of DDP, FSDP, `torch.compile` and PEFT."""
    inner: Any = model
    if isinstance(getattr(model, "module", None), nn.Module) or "_orig_mod" in model.__dict__:
        inner = extract_model_from_parallel(model)  # scans every module, so it runs only for a wrapper
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the head that computes the logits; if PEFT trains a copy of the head, the active copy."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head: Any = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and hasattr(head, "original_module"):
        active = [name for name in head.active_adapters if name in copies]
        return copies[active[0]] if active and not head.disable_adapters else head.original_module
    return head


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode, without dropout, for the ``with`` block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
