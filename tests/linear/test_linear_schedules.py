"""Schedules and plans: how many passes a loss needs, in which chunks, and that all of them give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import H, batch, head, loss_of

from grpo_ext._checks import PolicyTensors
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import Numerics, chunk_plan, row_stride
from grpo_ext.linear.routes.base import Wanted
from grpo_ext.linear.rows import row_chunks, sequence_chunks
from grpo_ext.linear.schedule import choose_schedule


def test_schedules() -> None:
    """Which losses take one pass, which need whole completions, which go through log probabilities."""
    mask = torch.ones(4, 50, dtype=torch.bool)
    numbers = torch.ones(4, 50)

    def schedule(config: LossConfig, trained: bool = True, rows: int = 64, **more: Any) -> str:
        given = {"old_logps": numbers, "sampling_logps": None, "importance_weights": None, "dtype": torch.float32}
        given |= {"group": None, "valid_rows": None, "grad_scale": 1.0} | more
        tensors = PolicyTensors(
            mask, numbers[:, 0], given["old_logps"], numbers if config.beta else None, given["sampling_logps"],
            given["importance_weights"], None, None,
        )  # fmt: skip
        numerics = Numerics([1.0, 0.0, 1.0], given["dtype"], given["dtype"], None, given["group"])
        wanted = Wanted(True, trained, False)
        return choose_schedule(config, tensors, wanted, numerics, rows, given["valid_rows"], given["grad_scale"])

    sequence = LossConfig(importance_sampling_level="sequence")
    for trained in (False, True):
        for loss_type in ("grpo", "bnpo", "dapo", "luspo", "cispo", "sapo"):
            assert schedule(LossConfig(loss_type=loss_type), trained) == "one_pass"
        assert schedule(LossConfig(beta=0.1), trained) == "one_pass"
        assert schedule(sequence, trained, old_logps=None) == "one_pass"
        assert schedule(sequence.replace(entropy_coef=0.1), trained) == "three_pass_sequences"
        assert schedule(LossConfig(loss_type="grpo", entropy_coef=0.1), trained) == "three_pass"
        assert schedule(LossConfig(top_entropy_quantile=0.2), trained) == "logps_then_loss"
        assert schedule(LossConfig(), trained, dtype=torch.float16) == "logps_then_loss"
        assert schedule(LossConfig(), trained, dtype=torch.float16, grad_scale=1024.0) == "one_pass"
    for config in (sequence, LossConfig(loss_type="vespo"), LossConfig(off_policy_mask_threshold=0.1)):
        assert schedule(config, trained=False) == "logps_then_loss"  # dlogp/dhidden costs no more
        assert schedule(config) == "three_pass_sequences"
        assert schedule(config, rows=40) == "logps_then_loss"  # a completion is longer than the buffer
        assert schedule(config, rows=200) == "logps_then_loss"  # all logits fit and are kept
        assert schedule(config, valid_rows=150) == "logps_then_loss"  # row counts would be a host sync
    assert schedule(LossConfig(), group="0") == "three_pass"
    assert schedule(LossConfig(), trained=False, group="0") == "logps_then_loss"
    assert schedule(LossConfig(loss_type="grpo", beta=0.1)) == "three_pass"


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(importance_sampling_level="sequence"),
        LossConfig(loss_type="vespo"),
        LossConfig(top_entropy_quantile=0.5),
        LossConfig(loss_type="grpo", beta=0.1, entropy_coef=0.05),
        LossConfig(vllm_importance_sampling_mode="sequence_truncate"),
        LossConfig(),
    ],
)
def test_every_budget_gives_the_same_gradients(device: torch.device, config: LossConfig) -> None:
    """Kept logits, completions per chunk, logits made again: 200, 64, 40 rows."""
    data = batch(device)
    old = torch.full((4, 50), -7.0, device=device)
    results = []
    for rows in (200, 64, 40):
        torch.manual_seed(1)
        weight, bias = head(device)
        leaves = [data["hidden"].clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        budget = rows * (1024 + row_stride(H)) * 4
        out = loss_of(
            data | {"hidden": leaves[0]}, leaves[1], config, bias=bias, memory_budget=budget, old_logps=old,
            ref_logps=old, sampling_logps=old + 0.1,
        )  # fmt: skip
        out.loss.backward()
        results.append([out.loss.detach()] + [leaf.grad for leaf in leaves])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_plans() -> None:
    """Buffers within the budget; blocks that divide them; nothing depends on the number of rows."""
    for vocab, size in ((151936, 4096), (262144, 2048), (50257, 768), (7, 3)):
        for kind in ("cuda", "cpu"):
            for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
                for budget in (None, 512 << 20, 1 << 20, 1):
                    plan = chunk_plan(vocab, size, *dtypes, kind, budget)
                    per_row = plan.stride * dtypes[1].itemsize + size * 2
                    assert plan.rows % plan.block == 0
                    assert plan.stride >= vocab
                    assert plan.block >= 1
                    if budget is not None and plan.rows > 1:
                        assert plan.rows * per_row <= budget
    plan = chunk_plan(151936, 4096, torch.bfloat16, torch.bfloat16, "cuda", None)
    assert (plan.block, plan.rows) == (1024, 4096)


def test_chunks() -> None:
    assert row_chunks(0, 4) == []
    assert row_chunks(9, 4) == [(0, 4), (4, 8), (8, 9)]
    assert sequence_chunks([3, 0, 1, 4, 2, 2, 0], 4) == [(0, 4), (4, 8), (8, 12)]
    assert sequence_chunks([], 4) == []
    assert sequence_chunks([0, 0], 4) == []
