"""The model, its adapter, its tokenizer and its reference, from what the user handed in."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from peft import PeftConfig

    from grpo_ext.trainer.config import GRPOConfig


def load_model(model: str | nn.Module, args: GRPOConfig) -> nn.Module:
    """A causal language model from a hub name, a folder or a module, in ``args.dtype`` when that is set.

    Raises:
        TypeError: for anything else.
        ValueError: for ``model_init_kwargs`` beside a module.
    """
    dtype = getattr(torch, args.dtype) if args.dtype is not None else None
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if isinstance(model, str):
        if dtype is not None:
            kwargs["dtype"] = dtype
        return AutoModelForCausalLM.from_pretrained(model, **kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: pass a hub name, a folder or a torch module")
    if kwargs:
        raise ValueError("model_init_kwargs is for a model given by name or folder; this one is already a module")
    return model if dtype is None else model.to(dtype)


def add_adapter(model: nn.Module, peft_config: PeftConfig | None, gradient_checkpointing: bool = False) -> nn.Module:
    """``model`` with a PEFT adapter around it where a config is given.

    Raises:
        ImportError: when peft is missing.
        ValueError: when the model already carries an adapter.
    """
    if peft_config is None:
        return model
    try:
        from peft import PeftModel, get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs the package peft: pip install peft") from error
    if isinstance(model, PeftModel):
        raise ValueError("the model already has an adapter: pass either a PEFT model or peft_config")
    if gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        # Else no gradient passes the first checkpoint: its inputs come from frozen embeddings.
        model.enable_input_require_grads()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"peft_config needs a transformers model, got {type(model).__name__}")
    return get_peft_model(model, peft_config)


def load_tokenizer(processing_class: PreTrainedTokenizerBase | None, model: nn.Module) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one saved beside the model; without a pad token it pads with its end token.

    Raises:
        ValueError: when none is given and the model names no place to load one from.
    """
    tokenizer = processing_class
    if tokenizer is None:
        place = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not place:
            raise ValueError(
                "processing_class is None and the model names no folder to load a tokenizer from: pass one"
            )
        tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a pad token nor an end token: set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(model: nn.Module) -> int | None:
    """Longest sequence the model takes, None where its config does not say."""
    config = getattr(model, "config", None)
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model carries a PEFT adapter that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


class Reference:
    """The reference policy of the KL term: the model with its adapter switched off, or a frozen copy of it.

    Args:
        model: the model before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen: nn.Module | None = None
        if not is_peft_model(model):
            self._frozen = copy.deepcopy(model).eval().requires_grad_(False)

    @contextlib.contextmanager
    def using(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference in eval mode, given the model in training (unwrapped)."""
        if self._frozen is not None:
            self._frozen.to(next(model.parameters()).device)
            yield self._frozen
            return
        was_training = model.training
        model.eval()
        try:
            with model.disable_adapter():  # type: ignore[operator]
                yield model
        finally:
            model.train(was_training)


def keep_logits_dtype(model: nn.Module, autocast: Any) -> None:
    """Undo accelerate's conversion of a mixed-precision model's outputs to fp32, autocast itself stays.

    The loss reads bf16 and fp16 logits directly; a ``(B, T, V)`` copy in fp32 would double or triple their
    memory.

    Args:
        model: the unwrapped model after ``accelerator.prepare``.
        autocast: ``accelerator.autocast``.
    """
    import functools

    original = model.__dict__.get("_original_forward")
    if original is None:
        return

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return original(*args, **kwargs)

    model.forward = forward
