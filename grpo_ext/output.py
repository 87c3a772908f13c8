"""What every loss of the package returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: Keys of ``GRPOLossOutput.metrics``, in this order; detached 0-d tensors on the loss's device.
METRIC_NAMES: tuple[str, ...] = (
    "tokens",
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "ratio/mean",
    "ratio/max",
    "importance_weight/mean",
    "importance_weight/min",
    "importance_weight/max",
    "sampling_logp_difference/mean",
    "sampling_logp_difference/max",
    "off_policy_kept",
    "nonfinite_tokens",
)


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
    metrics: dict[str, Tensor]
