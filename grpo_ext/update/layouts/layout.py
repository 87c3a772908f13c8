"""What every layout offers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

#: Greatest relative difference between the logits of a sequence alone and beside others, by dtype; 1e-4 for fp32.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Layout(Protocol):
    """A micro-batch as model input. The last completion token predicts nothing, so no layout feeds it.

    Attributes:
        positions: token positions that go through the model, padding included.
    """

    positions: int

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        ...

    def completion_rows(self, outputs: Tensor) -> Tensor:
        """Rearrange what the model's head takes or returns into ``(B, T, ...)``: row t predicts completion token t.

        Args:
            outputs: hidden states or logits of the model under `inputs`.
        """
        ...


def same_logits(ours: Tensor, reference: Tensor) -> bool:
    """Whether logits agree within `TOLERANCE` of their dtype, relative to the reference's norm."""
    bound = TOLERANCE.get(reference.dtype, 1e-4) * reference.float().norm()
    return bool((ours.float() - reference.float()).norm() <= bound)
