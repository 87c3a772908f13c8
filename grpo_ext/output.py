"""What every loss of the package returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext import _C

#: Keys of ``GRPOLossOutput.metrics``, in this order; detached 0-d tensors on the loss's device.
METRIC_NAMES: tuple[str, ...] = _C.METRIC_NAMES


class LossMetrics(Mapping[str, Tensor]):
    """The metrics of a loss by name, as they lie in one tensor: one that nobody asks for costs nothing.

    Args:
        packed: ``(len(METRIC_NAMES),)``, in the order of `METRIC_NAMES`.
    """

    __slots__ = ("packed",)

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.packed[_PLACES[name]]
        except KeyError:
            raise KeyError(f"{name!r} is not a metric of the loss; there are {', '.join(METRIC_NAMES)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(METRIC_NAMES)

    def __len__(self) -> int:
        return len(METRIC_NAMES)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self}

    def __repr__(self) -> str:
        values = self.packed.tolist()
        return f"LossMetrics({dict(zip(METRIC_NAMES, values, strict=True))})"


_PLACES = {name: place for place, name in enumerate(METRIC_NAMES)}


def named_metrics(packed: Tensor) -> Mapping[str, Tensor]:
    """The packed metrics by name; a plain dict where torch.compile traces."""
    if torch.compiler.is_compiling():
        return dict(zip(METRIC_NAMES, packed.unbind(), strict=True))
    return LossMetrics(packed)


class GRPOLossOutput(NamedTuple):
    """Result of ``grpo_loss``, ``policy_loss`` and ``linear_grpo_loss``.

    Attributes:
        loss: 0-d tensor with gradient; fp32, or fp64 where the input was fp64.
        logps: log probability of each completion token, shape of the ids, detached; 0 where the mask is 0.
        entropy: entropy of each token's distribution in nats, same shape, detached; 0 where the mask is 0.
            None where the loss was given no entropy (``policy_loss``).
        kl: KL term of each token against the reference model, same shape, detached; 0 where the mask is 0.
            None where ``beta`` is 0.
        metrics: one 0-d tensor for each name of ``METRIC_NAMES``. Means are over unmasked tokens, at sequence
            level over sequences with at least one; with an empty mask all of them are 0.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    metrics: Mapping[str, Tensor]


def loss_output(
    loss: Tensor, logps: Tensor | None, entropy: Tensor | None, kl: Tensor | None, metrics: Tensor, shape: torch.Size
) -> GRPOLossOutput:
    """What the operators returned for ``(B,T)`` tokens, in the ``shape`` of the caller's ids; an empty kl is None."""
    assert logps is not None
    if kl is not None and kl.shape != logps.shape:
        kl = None  # empty: beta is 0
    if logps.shape != shape:  # (N,) logits; a view of the same shape would cost 2 µs
        logps = logps.view(shape)
        entropy = None if entropy is None else entropy.view(shape)
        kl = None if kl is None else kl.view(shape)
    return GRPOLossOutput(loss, logps, entropy, kl, named_metrics(metrics))
