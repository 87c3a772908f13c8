"""The row kernels on a chunk of logits: statistics, and the gradient in place of the logits.

`WholeVocabulary` and `parallel.VocabularyShard` have the same three methods; the loops in `chunks` know no difference.
Of the contents of Z the loops know only this: `Head.logits` made it, one of these methods looked at it, and after
`derivative_` or `gradient_` it is the left factor of the gradient's products (`Head.factor`). A first product that
leaves something other than logits there (unnormalised probabilities, say) is another `Head.logits` and another class
like these; factors per row that its products need belong into `Head.back_to_hidden` and `HeadGradient.add`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grpo_ext._ops import loss_spec, statistics_dtype
from grpo_ext.config import LossConfig

kernels = torch.ops.grpo_ext

#: With an advantage of -1, on-policy and undivided, this loss has the coefficient dLoss/dlogp = 1: the kernel that
#: reads the logits once then leaves dlogp/dlogits behind.
UNIT_LOSS = LossConfig(loss_type="dapo", epsilon=0.2)


class Statistics(NamedTuple):
    """Of a chunk of rows, each (rows,) in the statistics' dtype; `entropy` and `lse` may be empty."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor

    def first(self, count: int) -> Statistics:
        return Statistics(*(t[:count] for t in self))


class Vocabulary(Protocol):
    """What happens to a chunk of logits ``Z (rows,V)``; `live` (rows,) bool, None = all rows count."""

    def statistics(self, Z: Tensor, ids: Tensor, live: Tensor | None, with_entropy: bool) -> Statistics: ...

    def derivative_(self, Z: Tensor, ids: Tensor, live: Tensor | None) -> Statistics:
        """Overwrites Z with dlogp/dZ."""
        ...

    def gradient_(
        self, Z: Tensor, ids: Tensor, live: Tensor | None, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> None:
        """Overwrites Z with ``coef * dlogp/dZ + entropy_coef * dentropy/dZ``."""
        ...


def one_sequence(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


class WholeVocabulary:
    """All of the vocabulary is on this device."""

    def __init__(self, transform: list[float]) -> None:
        self.transform = transform

    def statistics(self, Z: Tensor, ids: Tensor, live: Tensor | None, with_entropy: bool) -> Statistics:
        out = kernels.row_stats(Z.unsqueeze(0), ids.unsqueeze(0), one_sequence(live), self.transform, with_entropy)
        return Statistics(*(t.flatten() for t in out))

    def derivative_(self, Z: Tensor, ids: Tensor, live: Tensor | None) -> Statistics:
        mask = torch.ones_like(ids, dtype=torch.bool) if live is None else live
        dtype = statistics_dtype(Z.dtype)
        minus_one = torch.full(ids.shape, -1.0, dtype=dtype, device=Z.device).unsqueeze(0)
        one = torch.ones((), dtype=dtype, device=Z.device)
        _, logps, entropy, _, _ = kernels.row_loss_(
            Z.unsqueeze(0), ids.unsqueeze(0), mask.unsqueeze(0), minus_one, None, None, None, None, one, None,
            loss_spec(UNIT_LOSS, 1.0), self.transform,
        )  # fmt: skip
        return Statistics(logps.flatten(), entropy.flatten(), logps.new_empty(0))

    def gradient_(
        self, Z: Tensor, ids: Tensor, live: Tensor | None, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> None:
        kernels.row_gradient_(
            Z.unsqueeze(0),
            ids.unsqueeze(0),
            one_sequence(live),
            stats.logps.unsqueeze(0),
            stats.entropy.unsqueeze(0) if entropy_coef is not None else None,
            stats.lse.unsqueeze(0),
            coef.unsqueeze(0),
            one_sequence(entropy_coef),
            self.transform,
        )
