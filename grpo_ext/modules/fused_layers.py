"""Replace the forward of layers during a training run.

A layer keeps its class, its parameters and its hooks; only ``forward`` is replaced, on the instance. Each call that the
replacement does not support falls back to the layer's original forward, and the layer records the reason.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

#: Attribute of a layer: why its latest call fell back to the original forward; None if it did not.
FALLBACK_REASON = "_fallback_reason"

#: Reason for a layer without calls, such as one in a vision tower, or an expert without tokens.
IDLE = "never called"


class FusedLayers:
    """Run layers with a replaced forward.

    Args:
        layers: candidates for the replacement.
        forward: the new method; sets the layer's attribute `FALLBACK_REASON` in each call.
        fits: whether a layer supports the new method.
        plain: name of the layers that do.
        kind, owner, option: names of the layers, of the original forward's owner and of the trainer's argument, for
            messages.
        wanted: value of that argument. None replaces the forward if a layer allows it, False never, True always.
        compiled: whether ``torch.compile`` will wrap the model.

    Attributes:
        reason: why no layer's forward is replaced; None if `attached` replaces forwards.

    Raises:
        ValueError: ``wanted`` is True, and the model has no such layers or is compiled.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        forward: Callable[..., Tensor],
        fits: Callable[[Any], bool],
        plain: str,
        *,
        kind: str,
        owner: str,
        option: str,
        wanted: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.layers = layers
        self.wanted = wanted
        self.reason: str | None = None
        self._forward, self._fits, self._plain = forward, fits, plain
        self._kind, self._owner, self._option = kind, owner, option
        if wanted is False:
            self.reason = f"{option}=False"
        elif not layers:
            self.reason = f"the model has no {kind}"
        elif compiled:
            self.reason = "torch.compile fuses them itself"
        if wanted and self.reason is not None:
            raise ValueError(f"{option}=True, but {self.reason}: leave it None")

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the forwards for the ``with`` block."""
        changed = [x for x in self.layers if "forward" not in x.__dict__ and self._fits(x)] if not self.reason else []
        for layer in changed:
            # A method, not a closure: a deep copy of the model binds it to the copied layer.
            layer.forward = types.MethodType(self._forward, layer)
        try:
            yield
        finally:
            for layer in filter(self._is_ours, changed):  # a forward that was wrapped in between stays
                del layer.forward
                layer.__dict__.pop(FALLBACK_REASON, None)

    def describe(self) -> str:
        """Describe the latest calls: ``fused, 196 of 196 layers``, or ``PEFT's forward, <reason>``.

        Raises:
            RuntimeError: ``wanted`` is True and a layer ran, or would run, its original forward.
        """
        if self.reason is not None:
            return f"{self._owner}'s forward, {self.reason}"
        found = Counter(self._fallback_reason(layer) for layer in self.layers)
        fused, idle, total = found.pop(None, 0), found.pop(IDLE, 0), len(self.layers)
        fallbacks = [f"{count} run by {self._owner}: {reason}" for reason, count in found.items()]
        if self.wanted and fallbacks:
            listed = ", ".join(fallbacks)
            raise RuntimeError(f"{self._option}=True, but of {total} {self._kind} {listed}; leave it None to allow it")
        notes = ", ".join(fallbacks + ([f"{idle} {IDLE}"] if idle else []))
        return f"fused, {fused} of {total} layers" + (f" ({notes})" if notes else "")

    def __str__(self) -> str:
        return f"{self._kind}: {self.describe()}"

    def _is_ours(self, layer: Any) -> bool:
        return getattr(layer.__dict__.get("forward"), "__func__", None) is self._forward

    def _fallback_reason(self, layer: Any) -> str | None:
        return layer.__dict__.get(FALLBACK_REASON, IDLE) if self._is_ours(layer) else f"no plain {self._plain}"
