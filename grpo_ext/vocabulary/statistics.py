"""The row kernels on a chunk of logits: statistics, and the gradient in place of the logits.

`WholeVocabulary` and `shards.VocabularyShard` are the two `Vocabulary`s of the logits route.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grpo_ext._ops import loss_spec, statistics_dtype
from grpo_ext.config import LossConfig

kernels = torch.ops.grpo_ext

#: With an advantage of -1, on-policy and undivided, this loss has dLoss/dlogp = 1: the one-pass kernel then leaves
#: dlogp/dlogits.
UNIT_LOSS = LossConfig(loss_type="dapo", epsilon=0.2)


class Statistics(NamedTuple):
    """Statistics of a chunk of rows, each (rows,) in the statistics' dtype; None: not computed."""

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor | None


class Vocabulary(Protocol):
    """Kernels on a chunk of logits ``Z (rows,V)``; `mask` (rows,) bool, None = no row is masked."""

    def statistics(self, Z: Tensor, ids: Tensor, mask: Tensor | None, with_entropy: bool) -> Statistics: ...

    def derivative_(self, Z: Tensor, ids: Tensor, mask: Tensor | None) -> Statistics:
        """Overwrites Z with dlogp/dZ."""
        ...

    def gradient_(
        self, Z: Tensor, ids: Tensor, mask: Tensor | None, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> None:
        """Overwrites Z with ``coef * dlogp/dZ + entropy_coef * dentropy/dZ``. Needs ``stats.lse``, and ``entropy`` with
        an `entropy_coef`."""
        ...


def one_sequence(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


class WholeVocabulary:
    """All of the vocabulary is on this device."""

    def __init__(self, transform: list[float]) -> None:
        self.transform = transform

    def statistics(self, Z: Tensor, ids: Tensor, mask: Tensor | None, with_entropy: bool) -> Statistics:
        logps, entropy, lse = kernels.row_stats(
            Z.unsqueeze(0), ids.unsqueeze(0), one_sequence(mask), self.transform, with_entropy
        )
        return Statistics(logps.flatten(), entropy.flatten() if with_entropy else None, lse.flatten())

    def derivative_(self, Z: Tensor, ids: Tensor, mask: Tensor | None) -> Statistics:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        dtype = statistics_dtype(Z.dtype)
        minus_one = torch.full(ids.shape, -1.0, dtype=dtype, device=Z.device).unsqueeze(0)
        one = torch.ones((), dtype=dtype, device=Z.device)
        _, logps, entropy, _, _ = kernels.row_loss_(
            Z.unsqueeze(0), ids.unsqueeze(0), mask.unsqueeze(0), minus_one, None, None, None, None, one, None,
            loss_spec(UNIT_LOSS, 1.0), self.transform,
        )  # fmt: skip
        return Statistics(logps.flatten(), entropy.flatten(), None)

    def gradient_(
        self, Z: Tensor, ids: Tensor, mask: Tensor | None, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> None:
        kernels.row_gradient_(
            Z.unsqueeze(0),
            ids.unsqueeze(0),
            one_sequence(mask),
            stats.logps.unsqueeze(0),
            one_sequence(stats.entropy) if entropy_coef is not None else None,
            one_sequence(stats.lse),
            coef.unsqueeze(0),
            one_sequence(entropy_coef),
            self.transform,
        )
