"""Regression tests of bugs found by fuzzing: each case once read memory outside the tensor."""

from __future__ import annotations

import pytest
import torch

import grpo_ext
from grpo_ext import reference


@pytest.mark.parametrize("layout", ["column", "column (B,1)", "expanded"])
@pytest.mark.parametrize("which", ["advantages", "importance_weights"])
def test_one_value_per_sequence_may_have_a_stride(which: str, layout: str) -> None:
    logits, ids, mask = torch.randn(4, 3, 7), torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3)
    table = torch.rand(4, 5) + 0.5
    strided = {"column": table[:, 2], "column (B,1)": table[:, 2:3], "expanded": table[0, :1].expand(4)}[layout]
    values = {"advantages": torch.randn(4), "importance_weights": torch.rand(4)} | {which: strided}
    advantages = values.pop("advantages")
    losses = [
        module.grpo_loss(logits, ids, advantages, mask, grpo_ext.LossConfig(loss_type="grpo"), **values).loss
        for module in (grpo_ext, reference)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_linear_loss_of_one_sequence_without_a_masked_token(tokens: int) -> None:
    """Its advantage, one number expanded over the tokens, is a view that steps over nothing."""
    hidden, head = torch.randn(1, tokens, 4), torch.randn(11, 4)
    ids, mask = torch.randint(0, 11, (1, tokens)), torch.ones(1, tokens)
    gradients = []
    for module in (grpo_ext, reference):
        leaf = hidden.clone().requires_grad_()
        out = module.linear_grpo_loss(leaf, head, ids, torch.tensor([1.5]), mask, grpo_ext.LossConfig())
        out.loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
