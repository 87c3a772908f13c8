"""The linear tests share the case tools of tests/losses and the checks of tests/poison."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from grpo_ext.linear.head import Head
from grpo_ext.linear.routes.probabilities import ProbabilityChunk, ProbabilityRoute

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("losses", "poison")]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that entered the product with the head, and the one back to the hidden states, on either route."""
    rows = {"logits": 0, "back": 0}
    real_logits, real_back = Head.logits, Head.back_to_hidden

    def logits(self: Head, hidden: Tensor, rows_of: Any, count: int, *rest: Any) -> tuple[Tensor, Tensor]:
        rows["logits"] += count
        return real_logits(self, hidden, rows_of, count, *rest)

    def back(self: Head, gradient: Tensor, *rest: Any) -> None:
        rows["back"] += gradient.shape[0]
        real_back(self, gradient, *rest)

    real_forward, real_factored = ProbabilityRoute.forward, ProbabilityRoute._back_to_hidden

    def forward(self: ProbabilityRoute, start: int, end: int, needed: int) -> ProbabilityChunk:
        rows["logits"] += end - start
        return real_forward(self, start, end, needed)

    def factored(self: ProbabilityRoute, chunk: ProbabilityChunk, out: Tensor) -> None:
        rows["back"] += chunk.factor.numel()
        real_factored(self, chunk, out)

    monkeypatch.setattr(ProbabilityRoute, "forward", forward)
    monkeypatch.setattr(ProbabilityRoute, "_back_to_hidden", factored)
    monkeypatch.setattr(Head, "logits", logits)
    monkeypatch.setattr(Head, "back_to_hidden", back)
    return rows
