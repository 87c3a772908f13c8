"""Skip the rows of a micro-batch whose gradient is known to be zero, and correct the reduction for them."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_ext.config import LossConfig


def rows_with_gradient(
    config: LossConfig, advantages: Sequence[float], in_loss: Sequence[bool], advantage_decides: bool = True
) -> list[int]:
    """Return the positions of the rows whose gradient may be nonzero.

    A row outside the loss mask has no gradient. A row of advantage 0 has none if the loss consists of the policy term
    only: no KL term, no entropy bonus, and no entropy mask, whose quantile every row affects.

    Args:
        config: the constants of the loss.
        advantages: advantage of each row.
        in_loss: whether the loss mask includes the row.
        advantage_decides: False keeps rows of advantage 0 in any case.
    """
    policy_only = config.beta == 0 and config.entropy_coef == 0 and config.top_entropy_quantile >= 1
    drop_zero = advantage_decides and policy_only
    return [i for i, (a, use) in enumerate(zip(advantages, in_loss, strict=True)) if use and not (drop_zero and a == 0)]


def kept_rows_weight(loss_type: str, rows: float, kept_rows: int, tokens: float, kept_tokens: int) -> float:
    """Return the factor that turns the loss of the kept rows into that of all rows (SPEC section 3).

    The divisors of grpo, sapo, luspo and dr_grpo count rows. That of bnpo counts tokens of the loss mask. The others
    divide by ``num_items_in_batch``, which skipping does not change.

    Args:
        loss_type: a `LossConfig.loss_type`.
        rows, kept_rows: number of all rows and of the kept rows.
        tokens, kept_tokens: number of tokens in the loss masks of all rows and of the kept rows.
    """
    if loss_type in ("grpo", "sapo", "luspo", "dr_grpo"):
        return kept_rows / max(rows, 1)
    if loss_type == "bnpo":
        return kept_tokens / max(tokens, 1)
    return 1.0
