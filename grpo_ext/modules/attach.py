"""Attach the faster LoRA and RMSNorm layers to a transformers model, and detach them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from grpo_ext.modules.lora import FusedLora
from grpo_ext.modules.norms import FusedNorms


class FasterLayers:
    """Replace the forward of a model's LoRA and RMSNorm layers; classes, parameters and hooks stay.

    Args:
        model: any transformers model, with or without LoRA layers of PEFT.
        lora, norm: None uses the faster forward if a layer allows it, False never, True always.
        compiled: whether ``torch.compile`` will wrap the model; it fuses such layers itself.

    Raises:
        ValueError: an argument is True, and the model has no such layers or is compiled.

    Attributes:
        lora, norms: handles of the two kinds of layers, `FusedLora` and `FusedNorms`.
    """

    def __init__(
        self, model: nn.Module, *, lora: bool | None = None, norm: bool | None = None, compiled: bool = False
    ) -> None:
        self.lora = FusedLora(model, lora, compiled=compiled)
        self.norms = FusedNorms(model, norm, compiled=compiled)
        self._undo = contextlib.ExitStack()

    def attach(self) -> None:
        """Replace the forwards until `detach`; layers that already run a faster forward keep it."""
        self._undo.enter_context(self.attached())

    def detach(self) -> None:
        """Restore the forwards that `attach` replaced; a no-op if it replaced none."""
        self._undo.close()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the forwards for the duration of a block."""
        with self.lora.attached(), self.norms.attached():
            yield

    def report(self) -> list[str]:
        """Return one line per kind of layer: how many ran the faster forward in their latest call, why others did not.

        Raises:
            RuntimeError: a layer ran its original forward although the argument was True.
        """
        return [str(layers) for layers in (self.lora, self.norms) if layers.layers]


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
