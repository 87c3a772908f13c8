"""`GRPOLossOutput` and `LossMetrics`: the result of every loss of the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext import _C

#: Keys of ``GRPOLossOutput.metrics``, in this order; detached 0-d tensors on the loss's device.
METRIC_NAMES: tuple[str, ...] = _C.METRIC_NAMES


class LossMetrics(Mapping[str, Tensor]):
    """Read-only mapping from metric name to value; the values share one tensor, and unread metrics cost nothing.

    Args:
        packed: ``(len(METRIC_NAMES),)`` values in the order of `METRIC_NAMES`.
    """

    __slots__ = ("packed",)

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.packed[_PLACES[name]]
        except KeyError:
            raise KeyError(f"{name!r} is not a metric of the loss; the metrics are {', '.join(METRIC_NAMES)}") from None

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
    """Map metric names to the packed values; a plain dict under torch.compile."""
    if torch.compiler.is_compiling():
        return dict(zip(METRIC_NAMES, packed.unbind(), strict=True))
    return LossMetrics(packed)


class GRPOLossOutput(NamedTuple):
    """Result of ``grpo_loss``, ``policy_loss`` and ``linear_grpo_loss``.

    Attributes:
        loss: 0-d tensor with gradient; fp32, or fp64 if the input was fp64.
        logps: log probability of each completion token, shape of the ids, detached; 0 where the mask is 0.
        entropy: entropy of each token's distribution in nats, same shape, detached; 0 where the mask is 0.
            None if the caller passed no entropy to ``policy_loss``.
        kl: KL term of each token against the reference model, same shape, detached; 0 where the mask is 0.
            None if ``beta`` is 0.
        metrics: one 0-d tensor for each name of ``METRIC_NAMES``. A mean is over unmasked tokens, or, at sequence
            level, over sequences with at least one unmasked token. An empty mask makes all metrics 0.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    metrics: Mapping[str, Tensor]


def loss_output(
    loss: Tensor, logps: Tensor | None, entropy: Tensor | None, kl: Tensor | None, metrics: Tensor, shape: torch.Size
) -> GRPOLossOutput:
    """Build the output from the operators' ``(B,T)`` results: ``shape`` of the caller's ids, None for an empty kl."""
    assert logps is not None
    if kl is not None and kl.shape != logps.shape:
        kl = None  # empty: beta is 0
    if logps.shape != shape:  # (N,) ids; an unnecessary view would cost 2 µs
        logps = logps.view(shape)
        entropy = None if entropy is None else entropy.view(shape)
        kl = None if kl is None else kl.view(shape)
    return GRPOLossOutput(loss, logps, entropy, kl, named_metrics(metrics))
