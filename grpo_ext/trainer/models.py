"""Load and prepare the model, its adapter and its tokenizer; sync the reference model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from grpo_ext.update.reference_model import ReferenceModel

if TYPE_CHECKING:
    from peft import PeftConfig

    from grpo_ext.trainer.config import GRPOConfig


def load_model(model: str | nn.Module, args: GRPOConfig) -> nn.Module:
    """Return a causal language model from a hub name, a folder or a module, in ``args.dtype`` if that is set.

    Raises:
        TypeError: ``model`` is none of these.
        ValueError: ``model`` is a module and ``model_init_kwargs`` is set.
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
        raise ValueError("model_init_kwargs needs a model given by name or folder, and model is a module: remove it")
    return model if dtype is None else cast_weights(model, dtype)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert parameters and persistent buffers to ``dtype``; buffers that checkpoints do not hold keep their dtype.

    Such buffers are the frequencies of rotary embeddings. transformers keeps them in fp32 for weights of any dtype; in
    bf16, positions beyond a hundred are off by whole radians.
    """
    computed = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in computed:
        module._buffers[name] = buffer
    return model


def add_adapter(model: nn.Module, peft_config: PeftConfig | None, gradient_checkpointing: bool = False) -> nn.Module:
    """Wrap the model in a PEFT adapter; return it unchanged if ``peft_config`` is None.

    Raises:
        ImportError: peft is missing.
        TypeError: the model is no transformers model.
        ValueError: the model already has an adapter.
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
        # Checkpointed layers get no gradient if their input, here from frozen embeddings, does not require one.
        model.enable_input_require_grads()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"peft_config needs a transformers model, got {type(model).__name__}")
    return get_peft_model(model, peft_config)


def load_tokenizer(processing_class: PreTrainedTokenizerBase | None, model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the given tokenizer, or load the model's. A missing pad token is replaced by the end token.

    Raises:
        ValueError: no tokenizer is given and the model has no folder or name to load one from; or the tokenizer has
            neither a pad token nor an end token.
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


class ReferenceSync(TrainerCallback):
    """Move a reference model towards the policy every ``ref_model_sync_steps`` optimizer steps.

    Args:
        reference: a frozen copy of the policy.
        policy: returns the policy, unwrapped.
    """

    def __init__(self, reference: ReferenceModel, policy: Callable[[], nn.Module]) -> None:
        self.reference = reference
        self.policy = policy

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sync if the step is a multiple of ``ref_model_sync_steps``."""
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.move_towards(self.policy(), args.ref_model_mixup_alpha)


def keep_half_precision_logits(model: nn.Module, autocast: Any) -> None:
    """Remove accelerate's conversion of a mixed-precision model's outputs to fp32; autocast stays on.

    The loss reads bf16 and fp16 logits directly. A ``(B, T, V)`` copy in fp32 would double or triple their
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
