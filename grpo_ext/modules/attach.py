"""Make a transformers model faster in one call: LoRA and RMSNorm layers, gradient checkpointing, head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.modules.checkpointing import checkpointing_arguments
from grpo_ext.modules.fused_head import FusedHead, HeadFunction, Result
from grpo_ext.modules.inspection import causal_lm
from grpo_ext.modules.lora import FusedLora
from grpo_ext.modules.norms import FusedNorms


class FasterLayers:
    """Replace the forward of a model's LoRA and RMSNorm layers; classes, parameters and hooks stay.

    Args:
        model: any transformers model, with or without LoRA layers of PEFT.
        lora, norm: None uses the faster forward if a layer allows it, False never, True always.
        compiled: whether ``torch.compile`` will wrap the model; it fuses such layers itself.
        checkpointing: True enables gradient checkpointing with `checkpointing_arguments` while attached; the model must
            not be sharded. False leaves the model's setting.

    Raises:
        ValueError: an argument is True, and the model has no such layers, is compiled or supports no checkpointing.

    Attributes:
        lora, norms: handles of the two kinds of layers, `FusedLora` and `FusedNorms`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lora: bool | None = None,
        norm: bool | None = None,
        compiled: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.lora = FusedLora(model, lora, compiled=compiled)
        self.norms = FusedNorms(model, norm, compiled=compiled)
        self._model, self._compiled, self._checkpointing = model, compiled, checkpointing
        self._undo = contextlib.ExitStack()

    @functools.cached_property
    def head(self) -> FusedHead:
        """The model's head, for `run`; states the scale and the softcap of its logits."""
        return FusedHead(self._model, compiled=self._compiled)

    def run(self, inputs: dict[str, Any], function: HeadFunction[Result]) -> Result:
        """Run the model on ``inputs`` with ``function(hidden, weight, bias)`` in place of its head: `FusedHead.run`.

        Under autocast the adapter's weights are cast once, and the casts serve until the end of the loss's backward.
        Call backward before an optimizer changes the weights.

        Raises:
            RuntimeError: the model does not allow a replaced head; the message has the reason.
        """
        device = next(self._model.parameters()).device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.lora.precast_weights(dtype))
            result = self.head.run(self._model, inputs, function)
            if result is None:
                raise RuntimeError(
                    f"the model's head cannot be replaced ({self.head.reason}): compute the loss from "
                    "model(**inputs).logits"
                )
            loss = result if isinstance(result, Tensor) else result.loss
            if loss.requires_grad:
                casts, engine = stack.pop_all(), torch.autograd.Variable._execution_engine
                loss.register_hook(lambda _: engine.queue_callback(casts.close))
        return result

    def attach(self) -> None:
        """Replace the forwards until `detach`; layers that already run a faster forward keep it."""
        self._undo.enter_context(self.attached())

    def detach(self) -> None:
        """Restore the forwards that `attach` replaced; a no-op if it replaced none."""
        self._undo.close()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the forwards for the duration of a block."""
        with self.lora.attached(), self.norms.attached(), self._checkpointed():
            yield

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        if not self._checkpointing:
            yield
            return
        base: Any = causal_lm(self._model)
        base.gradient_checkpointing_enable(checkpointing_arguments(self._model))
        try:
            yield
        finally:
            base.gradient_checkpointing_disable()

    def report(self) -> list[str]:
        """Return one line per kind of layer: how many ran the faster forward in their latest call, why others did not.

        After a call of `run`, one more line describes the head.

        Raises:
            RuntimeError: a layer ran its original forward although the argument was True.
        """
        head = [f"head: {self.head.describe()}"] if "head" in self.__dict__ else []
        return [str(layers) for layers in (self.lora, self.norms) if layers.layers] + head


def attach(model: nn.Module, **options: Any) -> FasterLayers:
    """Attach faster layers to ``model``. ``options`` are those of `FasterLayers`.

    Returns:
        The handle: `FasterLayers.report` describes the layers, `FasterLayers.detach` removes them.
    """
    layers = FasterLayers(model, **options)
    layers.attach()
    return layers


@contextlib.contextmanager
def attached(model: nn.Module, **options: Any) -> Iterator[FasterLayers]:
    """`attach` for the duration of a block."""
    layers = FasterLayers(model, **options)
    with layers.attached():
        yield layers
