"""The row kernels on a chunk of logits: statistics, and the gradient written over the logits.

The protocol `Vocabulary` has two implementations, `WholeVocabulary` and `shards.VocabularyShard`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grpo_ext._ops import loss_spec, statistics_dtype
from grpo_ext.config import LossConfig

kernels = torch.ops.grpo_ext

#: On-policy, with advantage -1 and divisor 1, this loss has dLoss/dlogp = 1: the one-pass kernel forms dlogp/dlogits.
UNIT_LOSS = LossConfig(loss_type="dapo", epsilon=0.2)


class Statistics(NamedTuple):
    """Statistics of a chunk of rows, each (rows,) in the statistics' dtype; None: not computed."""

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor | None


class Vocabulary(Protocol):
    """Kernels on a chunk of logits ``Z (rows,V)``. `mask`: (rows,) bool; None: no row is masked."""

    def statistics(self, Z: Tensor, ids: Tensor, mask: Tensor | None, with_entropy: bool) -> Statistics: ...

    def derivative_(self, Z: Tensor, ids: Tensor, mask: Tensor | None) -> Statistics:
        """Overwrite Z with dlogp/dZ."""
        ...

    def gradient_(
        self, Z: Tensor, ids: Tensor, mask: Tensor | None, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> None:
        """Overwrite Z with ``coef * dlogp/dZ + entropy_coef * dentropy/dZ``.

        Args:
            stats: with ``lse``, and with ``entropy`` if there is an `entropy_coef`.
        """
        ...


def one_sequence(tensor: Tensor | None) -> Tensor | None:
    """View rows as a batch of one sequence, which the kernels take."""
    return None if tensor is None else tensor.unsqueeze(0)


class WholeVocabulary:
    """`Vocabulary` that is whole on this rank."""

    def __init__(self, transform: list[float]) -> None:
        self.transform = transform

    def statistics(self, Z: Tensor, ids: Tensor, mask: Tensor | None, with_entropy: bool) -> Statistics:
        logps, entropy, lse = kernels.row_stats(*map(one_sequence, (Z, ids, mask)), self.transform, with_entropy)
        return Statistics(logps.flatten(), entropy.flatten() if with_entropy else None, lse.flatten())

    def derivative_(self, Z: Tensor, ids: Tensor, mask: Tensor | None) -> Statistics:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        dtype = statistics_dtype(Z.dtype)
        minus_one = torch.full(ids.shape, -1.0, dtype=dtype, device=Z.device)
        one = torch.ones((), dtype=dtype, device=Z.device)
        rows = map(one_sequence, (Z, ids, mask, minus_one))
        absent = (None,) * 4  # log probabilities of other policies, and importance weights
        _, logps, entropy, _, _ = kernels.row_loss_(
            *rows, *absent, one, None, loss_spec(UNIT_LOSS, 1.0), self.transform
        )
        return Statistics(logps.flatten(), entropy.flatten(), None)

    def gradient_(
        self, Z: Tensor, ids: Tensor, mask: Tensor | None, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> None:
        entropy = None if entropy_coef is None else stats.entropy
        rows = (Z, ids, mask, stats.logps, entropy, stats.lse, coef, entropy_coef)
        kernels.row_gradient_(*map(one_sequence, rows), self.transform)
