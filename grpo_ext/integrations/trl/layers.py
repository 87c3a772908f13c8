"""Run TRL's trainers with the faster layers and the cheaper checkpointing of `grpo_ext.modules`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from grpo_ext.integrations.trl.batches import Options
from grpo_ext.integrations.trl.counting import counts
from grpo_ext.integrations.trl.passes import is_sharded
from grpo_ext.modules import FasterLayers, checkpointing_arguments

#: Attribute of a trainer while it trains: its `FasterLayers`.
LAYERS = "_grpo_ext_layers"

#: Autocast dtype by the accelerator's ``mixed_precision``.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(trainer: Any, original: Callable[..., Any], options: Options, *args: Any, **kwargs: Any) -> Any:
    """Replace ``train``: attach the layers for its duration."""
    with contextlib.ExitStack() as stack:
        if options.layers:
            stack.enter_context(_faster_layers(trainer))
        if options.checkpointing and trainer.args.gradient_checkpointing:
            stack.enter_context(_cheaper_checkpointing(trainer))
        return original(trainer, *args, **kwargs)


def training_step(trainer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replace ``training_step``: cast the adapters once for all passes of a micro-batch."""
    layers: FasterLayers | None = getattr(trainer, LAYERS, None)
    if layers is None:
        return original(trainer, *args, **kwargs)
    with layers.lora.precast_weights(AUTOCAST.get(trainer.accelerator.mixed_precision)):
        return original(trainer, *args, **kwargs)


@contextlib.contextmanager
def _faster_layers(trainer: Any) -> Iterator[None]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    layers = FasterLayers(model, compiled=bool(getattr(trainer.args, "torch_compile", False)))
    reasons = [kind.reason for kind in (layers.lora, layers.norms) if kind.reason is not None]
    counts.part("layers", "; ".join(reasons) if len(reasons) == 2 else None)
    setattr(trainer, LAYERS, layers)
    try:
        with layers.attached():
            try:
                yield
            finally:
                counts.notes["layers"] = "; ".join(layers.report())
    finally:
        delattr(trainer, LAYERS)


@contextlib.contextmanager
def _cheaper_checkpointing(trainer: Any) -> Iterator[None]:
    """Put the arguments into the trainer's args for one run; another trainer may use the same args later."""
    args, given = trainer.args, trainer.args.gradient_checkpointing_kwargs
    chosen = None
    reason = _reason_for_own_checkpointing(trainer)
    if reason is None:
        chosen = checkpointing_arguments(trainer.accelerator.unwrap_model(trainer.model))
        reason = None if chosen is not None else "the architecture's layers may share tensors with a gradient"
    if not counts.part("checkpointing", reason):
        yield
        return
    args.gradient_checkpointing_kwargs = chosen
    try:
        yield
    finally:
        args.gradient_checkpointing_kwargs = given


def _reason_for_own_checkpointing(trainer: Any) -> str | None:
    args = trainer.args
    if args.gradient_checkpointing_kwargs:
        return "gradient_checkpointing_kwargs is set"
    if is_sharded(trainer):
        return "sharded model"
    if getattr(args, "torch_compile", False):
        return "torch_compile"
    if getattr(args, "activation_offloading", False):
        return "activation_offloading"
    if trainer.accelerator.num_processes > 1 and _finds_unused_parameters(trainer):
        return "DDP looks for unused parameters"
    return None


def _finds_unused_parameters(trainer: Any) -> bool:
    """Whether DDP's search needs a graph in the forward, which reentrant checkpointing does not build.

    transformers' default is to search if the model is no `PreTrainedModel`, so also with an adapter of PEFT.
    """
    handler, wanted = trainer.accelerator.ddp_handler, trainer.args.ddp_find_unused_parameters
    if handler is not None:
        return bool(handler.find_unused_parameters)
    return bool(wanted) if wanted is not None else not isinstance(trainer.model, PreTrainedModel)
