"""Layers of a model that run another forward for the time of a training run.

A layer keeps its class, its parameters and its hooks; only ``forward`` is replaced, on the object. Each call decides
for itself whether it is an ordinary one; where it is not, the layer's own forward serves it, and the layer notes why.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

#: Where a layer keeps why its own forward served its latest call, None where it did not.
LATEST = "_left_alone"

#: Of a layer that no call has reached: in a tower that text does not pass through, an expert without a token.
IDLE = "never called"


class FusedLayers:
    """Runs layers with another forward.

    Args:
        layers: those that may be concerned.
        forward: the method in place of theirs; notes in the layer's attribute `LATEST` what served the call.
        fits: whether a layer may be given it, and ``plain``, what it is then called.
        kind, owner, option: the layers, whose forward is replaced, and the trainer's argument, in words.
        wanted: that argument. None takes the other forward where it is possible, False never, True always.
        compiled: whether the model is going to be wrapped by ``torch.compile``.

    Attributes:
        reason: why the layers' own forward is taken everywhere; None where `attached` replaces it.

    Raises:
        ValueError: ``wanted`` is True and there are no such layers, or the model is compiled.
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
        """Within it, the layers run the other forward."""
        changed = [x for x in self.layers if "forward" not in x.__dict__ and self._fits(x)] if not self.reason else []
        for layer in changed:
            # A method, not a closure: in a copy of the model it belongs to the copied layer.
            layer.forward = types.MethodType(self._forward, layer)
        try:
            yield
        finally:
            for layer in filter(self._is_ours, changed):  # not what somebody has put around it
                del layer.forward
                layer.__dict__.pop(LATEST, None)

    def describe(self) -> str:
        """What served each layer's latest call: ``fused, 196 of 196 layers``, or ``PEFT's own, <reason>``.

        Raises:
            RuntimeError: a layer's own forward did, or would, with ``wanted`` True.
        """
        if self.reason is not None:
            return f"{self._owner}'s own, {self.reason}"
        found = Counter(self._left_alone(layer) for layer in self.layers)
        fused, idle, total = found.pop(None, 0), found.pop(IDLE, 0), len(self.layers)
        why = [f"{count} left to {self._owner}: {reason}" for reason, count in found.items()]
        if self.wanted and why:
            left = ", ".join(why)
            raise RuntimeError(f"{self._option}=True, but of {total} {self._kind} {left}; leave it None to allow that")
        notes = ", ".join(why + ([f"{idle} {IDLE}"] if idle else []))
        return f"fused, {fused} of {total} layers" + (f" ({notes})" if notes else "")

    def __str__(self) -> str:
        return f"{self._kind}: {self.describe()}"

    def _is_ours(self, layer: Any) -> bool:
        return getattr(layer.__dict__.get("forward"), "__func__", None) is self._forward

    def _left_alone(self, layer: Any) -> str | None:
        return layer.__dict__.get(LATEST, IDLE) if self._is_ours(layer) else f"no plain {self._plain}"
