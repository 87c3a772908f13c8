"""Check the bytes between and behind the rows of the operands of matrix products.

oneDNN's AMX GEMM reads the rows of a 16-bit left operand up to the next multiple of `K_STEP` columns. This check finds
uninitialized bytes in that range on any processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

K_STEP = 32


def span(operand: Tensor, step: int) -> Tensor:
    """All elements from the operand's first to its last, flat; a row ends at its stride and at a multiple of `step`."""
    rows = operand if operand.stride(-1) == 1 else operand.mT
    width = max(rows.stride(-2), -(-rows.shape[-1] // step) * step)
    start = rows.storage_offset()
    end = start + (rows.shape[-2] - 1) * rows.stride(-2) + width
    return rows.as_strided((min(end, rows.untyped_storage().nbytes() // rows.itemsize) - start,), (1,), start)


def check(name: str, left: Tensor, right: Tensor) -> None:
    """Raise for an operand with NaN in its span."""
    for side, operand, step in (("left", left, K_STEP), ("right", right, 1)):
        where = f"{name}: {side} operand {tuple(operand.shape)}, strides {operand.stride()}, {operand.dtype}"
        assert operand.dim() == 2, where
        if operand.numel():
            assert not span(operand, step).isnan().any(), f"{where}: NaN in reach"


def rows_are_apart(left: Tensor) -> bool:
    """Whether reading a row up to a multiple of `K_STEP` columns stays clear of the next row."""
    one_row = left.shape[0] <= 1 or left.stride(1) != 1 or left.itemsize != 2
    return one_row or left.stride(0) >= -(-left.shape[1] // K_STEP) * K_STEP


class Products:
    """Replaces torch's products by ones that check their operands. `names`: what ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, apart: bool = True) -> None:
        self.names: list[str] = []
        self.apart = apart
        for owner, name, left in (
            (torch, "mm", 0),
            (torch, "matmul", 0),
            (torch, "addmm", 1),
            (Tensor, "mm", 0),
            (Tensor, "__matmul__", 0),
            (Tensor, "addmm_", 1),
            (torch.nn.functional, "linear", 0),
            (torch.ops.mkldnn, "_linear_pointwise", 0),
        ):
            monkeypatch.setattr(owner, name, self.checked(getattr(owner, name), name, left))

    def checked(self, function: Callable[..., Any], name: str, left: int) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            a, b = arguments[left : left + 2]
            if a.dim() == b.dim() == 2:
                self.names.append(name)
                check(name, a, b)
                if self.apart:
                    assert rows_are_apart(a), f"{name}: a row of the left operand {tuple(a.shape)} reaches the next one"
            return function(*arguments, **options)

        return run
