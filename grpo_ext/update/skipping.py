"""Rows of a micro-batch whose gradient is known to be zero, and what leaving them out does to the reduction."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_ext.config import LossConfig


def rows_with_gradient(
    config: LossConfig, advantages: Sequence[float], trained: Sequence[bool], advantage_decides: bool = True
) -> list[int]:
    """Positions of the rows that the loss has a gradient at.

    A row outside the loss mask never has one. A row of advantage 0 has none where nothing but the policy term looks at
    it: not with a KL term, an entropy bonus, or an entropy quantile over all tokens.

    Args:
        advantages, trained: one value per row.
        advantage_decides: False keeps rows of advantage 0.
    """
    policy_only = config.beta == 0 and config.entropy_coef == 0 and config.top_entropy_quantile >= 1
    drop_zero = advantage_decides and policy_only
    return [i for i, (a, use) in enumerate(zip(advantages, trained, strict=True)) if use and not (drop_zero and a == 0)]


def remaining_weight(loss_type: str, rows: float, kept_rows: int, tokens: float, kept_tokens: int) -> float:
    """Factor that turns the loss of the kept rows into that of all rows (SPEC section 3).

    Means over sequences and the constant divisor of dr_grpo count rows, bnpo counts the tokens of the loss mask; the
    divisor of the others comes from outside.

    Args:
        rows, kept_rows: sequences of the micro-batch, and of what is left of it.
        tokens, kept_tokens: tokens of their loss masks.
    """
    if loss_type in ("grpo", "sapo", "luspo", "dr_grpo"):
        return kept_rows / max(rows, 1)
    if loss_type == "bnpo":
        return kept_tokens / max(tokens, 1)
    return 1.0
