"""Protocol of the layouts, and the comparison of logits that tests a layout."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

#: By dtype, how much a layout may change the logits of a sequence, relative to those computed without other tokens.
#: 1e-4 for fp32.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Layout(Protocol):
    """A micro-batch as model input.

    The model need not see the last token of a row: the loss has no token after it. `PackedLayout` omits it in every
    row, the other layouts only if that removes a column.

    Attributes:
        positions: token positions that go through the model, padding included.
    """

    positions: int

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward."""
        ...

    def first_positions(self) -> Tensor:
        """Return ``(B,)`` int64: index, in the flattened input, of the position that predicts completion token 0.

        The position of token t is t further.
        """
        ...

    def completion_rows(self, outputs: Tensor) -> Tensor:
        """Rearrange hidden states or logits into ``(B, T, ...)``: row t predicts completion token t.

        Args:
            outputs: hidden states or logits that the model computed from `inputs`.
        """
        ...


def scatter_tokens(values: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """Copy ``values (n, size)`` to the positions ``index`` of zeros ``(*shape, size)``, flattened over ``shape``."""
    size = values.shape[-1]
    return values.new_zeros((shape.numel(), size)).index_copy(0, index, values).view(*shape, size)


def same_logits(ours: Tensor, reference: Tensor) -> bool:
    """Whether the norm of the difference is within `TOLERANCE`, for the reference's dtype, times its norm."""
    bound = TOLERANCE.get(reference.dtype, 1e-4) * reference.float().norm()
    return bool((ours.float() - reference.float()).norm() <= bound)
