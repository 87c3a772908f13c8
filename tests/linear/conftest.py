"""The linear tests share the case tools of tests/losses and the checks of tests/poison."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from grpo_ext.linear.head import Head
from grpo_ext.linear.probabilities import Chunk, Probabilities

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("losses", "poison")]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that entered the product with the head, and the one back to the hidden states, on either route."""
    rows = {"logits": 0, "back": 0}
    real_logits, real_back = Head.logits, Head.back_to_hidden

    def logits(self: Head, hidden: Tensor, where: Any, count: int, *rest: Any) -> tuple[Tensor, Tensor]:
        rows["logits"] += count
        return real_logits(self, hidden, where, count, *rest)

    def back(self: Head, gradient: Tensor, *rest: Any) -> None:
        rows["back"] += gradient.shape[0]
        real_back(self, gradient, *rest)

    real_chunk, real_factored = Probabilities.chunk, Probabilities.back_to_hidden

    def chunk(self: Probabilities, start: int, end: int, stored: int) -> Chunk:
        rows["logits"] += end - start
        return real_chunk(self, start, end, stored)

    def factored(self: Probabilities, chunk: Chunk, factor: Tensor, out: Tensor) -> None:
        rows["back"] += factor.numel()
        real_factored(self, chunk, factor, out)

    monkeypatch.setattr(Probabilities, "chunk", chunk)
    monkeypatch.setattr(Probabilities, "back_to_hidden", factored)
    monkeypatch.setattr(Head, "logits", logits)
    monkeypatch.setattr(Head, "back_to_hidden", back)
    return rows
