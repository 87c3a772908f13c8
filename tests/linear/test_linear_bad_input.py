"""Errors name the argument, what it is and what to pass instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grpo_ext
from grpo_ext.config import LossConfig


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "hidden": torch.randn(2, 3, 4),
        "weight": torch.randn(7, 4),
        "completion_ids": torch.randint(0, 7, (2, 3)),
        "advantages": torch.randn(2),
        "completion_mask": torch.ones(2, 3),
        "config": LossConfig(),
    } | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.randn(4)}, ValueError, r"hidden must be a \(B,T,H\) or \(N,H\) tensor, got \(4,\)"),
        ({"hidden": torch.ones(2, 3, 4).int()}, TypeError, "hidden must be float32.*cast it"),
        ({"hidden": torch.randn(2, 3, 4).bfloat16()}, TypeError, "run under torch.autocast, or cast"),
        ({"weight": torch.randn(4, 7)}, ValueError, r"weight must be \(V,H\) with H = 4.*\(4, 7\)"),
        ({"weight": torch.randn(0, 4)}, ValueError, "empty vocabulary"),
        ({"weight": torch.ones(7, 4).int()}, TypeError, "weight must be a floating-point"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must be \(7,\).*\(4,\)"),
        ({"completion_ids": torch.ones(2, 3)}, TypeError, "completion_ids must be an int64 tensor.*long"),
        ({"completion_ids": torch.ones(2, 4).long()}, ValueError, r"completion_ids must have.*\(2, 3\).*slice both"),
        ({"completion_ids": torch.full((2, 3), 7)}, IndexError, r"ids\[0, 0\] = 7 is outside \[0, 7\)"),
        ({"advantages": torch.randn(3)}, ValueError, r"advantages must be \(B,\).*\(3,\)"),
        ({"completion_mask": torch.ones(2, 4)}, ValueError, "completion_mask must have the shape"),
        ({"config": {}}, TypeError, "config must be a LossConfig"),
        ({"config": LossConfig(beta=0.1)}, ValueError, "needs ref_logps"),
        ({"logits_dtype": "int3"}, TypeError, "logits_dtype must be None, 'float32'"),
        ({"logits_dtype": torch.bfloat16}, TypeError, "logits_dtype must be None, 'float32' or the dtype"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be None or a number of bytes"),
        ({"valid_rows": -1}, ValueError, "valid_rows must be None or a count"),
        ({"weight_grad": torch.zeros(7, 3)}, ValueError, r"weight_grad must be a contiguous \(7, 4\)"),
        ({"weight_grad": torch.zeros(7, 4).bfloat16()}, ValueError, "torch.float32, got"),
    ],
)
def test_loss(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grpo_ext.linear_grpo_loss(**arguments(**changes))


def test_log_probabilities() -> None:
    hidden, weight, ids = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(0, 7, (2, 3))
    with pytest.raises(ValueError, match=r"mask must be a tensor of the shape of ids \(2, 3\)"):
        grpo_ext.linear_selective_log_softmax(hidden, weight, ids, mask=torch.ones(3))
    with pytest.raises(ValueError, match="temperature must be positive"):
        grpo_ext.linear_selective_log_softmax(hidden, weight, ids, temperature=0.0)
    ids[1, 2] = -1
    with pytest.raises(IndexError, match=r"ids\[1, 2\] = -1"):
        grpo_ext.linear_selective_log_softmax(hidden, weight, ids)
    mask = torch.ones(2, 3)
    mask[1, 2] = 0
    grpo_ext.linear_selective_log_softmax(hidden, weight, ids, mask=mask)
