"""group_advantages and importance_weights: numbers by hand, every option, every error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import grpo_ext
from grpo_ext.advantages import group_advantages, importance_weights, weighted_rewards
from grpo_ext.config import IMPORTANCE_MODES, LossConfig

NAN = math.nan


def test_group_scaling_by_hand() -> None:
    # Group 1: mean 2, unbiased std of 1, 2, 3 = 1. Group 2: mean 1, std sqrt(((-1)^2 + 1 + 0) / 2) = 1.
    got = group_advantages(torch.tensor([1.0, 2.0, 3.0, 0.0, 2.0, 1.0]), 3)
    s = 1 / (1 + 1e-4)
    torch.testing.assert_close(got, torch.tensor([-s, 0.0, s, -s, s, 0.0]))
    assert got.dtype == torch.float32


@pytest.mark.parametrize(("scale", "same"), [(True, "group"), (False, "none")])
def test_boolean_scales(scale: bool, same: str) -> None:
    rewards = torch.rand(12)
    torch.testing.assert_close(
        group_advantages(rewards, 4, scale_rewards=scale), group_advantages(rewards, 4, scale_rewards=same)
    )


def test_no_scaling_and_batch_scaling() -> None:
    rewards = [0.0, 1.0, 10.0, 14.0]
    assert group_advantages(rewards, 2, scale_rewards="none").tolist() == [-0.5, 0.5, -2.0, 2.0]
    mean = 25 / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
    expected = [x / (std + 1e-4) for x in (-0.5, 0.5, -2.0, 2.0)]
    assert group_advantages(rewards, 2, scale_rewards="batch").tolist() == pytest.approx(expected)


def test_equal_rewards_give_exactly_zero() -> None:
    third = [1 / 3] * 3  # a mean that does not come out even
    for scale in ("group", "batch", "none"):
        got = group_advantages([*third, 0.0, 1.0, 1.0], 3, scale_rewards=scale)
        assert got[:3].tolist() == [0.0, 0.0, 0.0]
        assert got[3] < 0 < got[4]


def test_weights_and_functions_that_do_not_apply() -> None:
    rewards = [[1.0, None], [0.0, 4.0], [None, 2.0], [None, None]]
    weights = [2.0, 0.5]
    total = weighted_rewards(rewards, weights)
    assert total[:3].tolist() == [2.0, 2.0, 1.0]
    assert total[3].isnan()
    got = group_advantages(rewards, 4, reward_weights=weights, scale_rewards="none")
    assert got.tolist() == pytest.approx([1 / 3, 1 / 3, -2 / 3, 0.0])
    std = math.sqrt((1 / 9 + 1 / 9 + 4 / 9) / 2)  # three rows, not four
    got = group_advantages(rewards, 4, reward_weights=torch.tensor(weights))
    assert got.tolist() == pytest.approx([x / (std + 1e-4) for x in (1 / 3, 1 / 3, -2 / 3)] + [0.0])
    tensor = torch.tensor([[1.0, NAN], [0.0, 4.0], [NAN, 2.0], [NAN, NAN]])
    torch.testing.assert_close(got, group_advantages(tensor, 4, reward_weights=weights))


def test_rows_without_reward_stay_out_of_the_batch_scale() -> None:
    got = group_advantages([0.0, 1.0, None, None], 2, scale_rewards="batch")
    assert got.tolist() == pytest.approx([-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4), 0, 0])
    assert group_advantages([None, None], 2).tolist() == [0.0, 0.0]
    assert group_advantages([3.0, None], 2).tolist() == [0.0, 0.0]  # alone: its own baseline


@pytest.mark.parametrize("rewards", [torch.tensor([1, 0, 0, 1]), [True, False, False, True]])
def test_integers_and_booleans_are_numbers(rewards: object) -> None:
    assert group_advantages(rewards, 2, scale_rewards="none").tolist() == [0.5, -0.5, -0.5, 0.5]  # type: ignore[arg-type]


def test_dtype_device_and_gradient(device: torch.device) -> None:
    rewards = torch.rand(8, 2, device=device, requires_grad=True)
    got = group_advantages(rewards, 4)
    assert got.device.type == device.type
    assert not got.requires_grad
    assert group_advantages(rewards.double(), 4).dtype == torch.float64
    assert group_advantages(rewards.bfloat16(), 4).dtype == torch.float32
    assert group_advantages(rewards[:0], 4).shape == (0,)
    assert group_advantages([], 4).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "generations", "options", "message"),
    [
        ([1.0, 2.0], 1, {}, "num_generations must be an integer of at least 2"),
        ([1.0, 2.0], 2.0, {}, "num_generations"),
        ([1.0, 2.0, 3.0], 2, {}, "3 rows.*num_generations=2"),
        ([1.0, 2.0], 2, {"scale_rewards": "groups"}, "scale_rewards.*'groups'"),
        ([1.0, 2.0], 2, {"scale_rewards": ["group"]}, "scale_rewards"),
        ([1.0, 2.0], 2, {"reward_weights": [1.0, 2.0]}, "reward_weights has shape.*1 function"),
        ([1.0, 2.0], 2, {"reward_weights": [NAN]}, "reward_weights must be finite"),
        ([1.0, math.inf], 2, {}, "infinite in row 1"),
        ([[1.0, 2.0], [1.0]], 2, {}, r"1 value\(s\) in row 1 and 2 in row 0"),
        ([1.0, "a"], 2, {}, "'a' in row 1"),
        (torch.zeros(2, 2, 2), 2, {}, r"\(2, 2, 2\)"),
        (torch.zeros(2, 0), 2, {}, "at least one function"),
        (torch.zeros(2, dtype=torch.complex64), 2, {}, "real numbers"),
        ([1.0, "2"], 2, {}, "'2' in row 1: pass numbers"),
        ([1.0, 10**400], 2, {}, "a number beyond float64 in row 1: scale it"),
        ([1e39, 0.0], 2, {"scale_rewards": "none"}, r"the advantage of row 0 is 5e\+38, beyond float32: scale the"),
        ([1.0, 2e150], 2, {}, r"sum of the rewards in row 1 is 2e\+150, beyond 1e\+150: scale"),
        ([[1e200, 1.0], [0.0, 0.0]], 2, {"reward_weights": [1e200, 1.0]}, "sum of the rewards in row 0 is inf"),
        ([1.0, 2.0], 2, {"reward_weights": ["1"]}, "reward_weights must be one number per reward function.*'1'"),
        ([1.0, 2.0], 2, {"reward_weights": [10**400]}, "reward_weights must be one number per reward function"),
        ([1.0, 2.0], 2, {"reward_weights": torch.ones(1).cfloat()}, "reward_weights must be one number per reward"),
    ],
)
def test_complaints(rewards: object, generations: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, generations, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_sums_beyond_float32_are_exact(device: torch.device, scale: str) -> None:
    """The sum of two finite rewards of float32 is 6e38; so is its distance from the mean."""
    rewards = torch.tensor([[3e38, 3e38], [1.0, 1.0]], device=device)
    got = group_advantages(rewards, 2, scale_rewards=scale)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-7)
    assert group_advantages(rewards.tolist(), 2, scale_rewards=scale).tolist() == got.tolist()
    assert group_advantages([1e39, 0.0], 2, scale_rewards=scale).tolist() == got.tolist()
    assert group_advantages(rewards / 4, 2, scale_rewards="none").tolist() == pytest.approx([7.5e37, -7.5e37])


def test_sums_that_differ_by_rounding_are_equal() -> None:
    for rewards in ([[0.1, 0.2], [0.3, 0.0]], torch.tensor([[0.1, 0.2], [0.3, 0.0]])):
        assert group_advantages(rewards, 2).tolist() == [0.0, 0.0]


OLD = torch.tensor([[4.0, 0.5, 1.0], [0.5, 2.0, NAN]]).log()
SAMPLING = torch.zeros(2, 3)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 1.0], [0.5, 2.0, 1.0]]),
        ("token_mask", [[0.0, 0.5, 1.0], [0.5, 2.0, 1.0]]),
        ("sequence_truncate", [[2.0], [1.0]]),
        ("sequence_mask", [[2.0], [1.0]]),
    ],
)
def test_modes(device: torch.device, mode: str, expected: list) -> None:
    got = importance_weights(OLD.to(device), SAMPLING.to(device), MASK.to(device), mode=mode, cap=2.0 + 1e-6)
    torch.testing.assert_close(got.cpu(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_bounds_are_inclusive_and_low_ones_work() -> None:
    old = torch.tensor([[0.0, -1.0, 1.0]])
    none = torch.zeros(1, 3)
    one = torch.ones(1, 3)
    assert importance_weights(old, none, one, mode="token_mask", cap=1.0, min=1.0).tolist() == [[1.0, 0.0, 0.0]]
    assert importance_weights(old, none, one, mode="token_truncate", cap=1.5, min=0.5).tolist() == [[1, 0.5, 1.5]]
    low = importance_weights(old - 1, none, one, mode="sequence_mask", cap=9.0, min=0.5)
    assert low.tolist() == [[0.0]]


def test_unknown_log_probabilities_count_as_equal() -> None:
    old = torch.tensor([[NAN, -math.inf, -1.0]])
    sampling = torch.tensor([[-1.0, -math.inf, NAN]])
    assert importance_weights(old, sampling, torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("mode", IMPORTANCE_MODES)
def test_infinities_of_both_signs_in_a_sequence(device: torch.device, mode: str) -> None:
    """Their sum is a ratio of 0 to 0, which counts as 1; each alone stays what it is. The losses form these weights."""
    old = torch.tensor([[-1.0, -math.inf, -1.0], [-1.0, -1.0, -1.0], [-math.inf, -1.0, -1.0]], device=device)
    sampling = torch.tensor([[-math.inf, -1.0, -1.0], [-math.inf, -1.0, -1.0], [-1.0] * 3], device=device)
    one = torch.ones(3, 3, device=device)
    got = importance_weights(old, sampling, one, mode=mode)
    high = 2.0 if mode.endswith("truncate") else 0.0
    if mode.startswith("token"):
        assert got.tolist() == [[high, 0.0, 1.0], [high, 1.0, 1.0], [0.0, 1.0, 1.0]]
    else:
        assert got.tolist() == [[1.0], [high], [0.0]]
    config = LossConfig(loss_type="grpo", vllm_importance_sampling_mode=mode)  # type: ignore[arg-type]
    given: Any = (-one, torch.tensor([1.0, 2.0, 4.0], device=device), one, config)
    expected = grpo_ext.reference.policy_loss(*given, old_logps=old, importance_weights=got).loss
    assert expected.isfinite()
    for policy_loss in (grpo_ext.policy_loss, grpo_ext.reference.policy_loss):
        loss = policy_loss(*given, old_logps=old, sampling_logps=sampling).loss
        torch.testing.assert_close(loss, expected)


def test_no_gradient_and_dtypes() -> None:
    old = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    got = importance_weights(old, torch.randn(2, 3), MASK)
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert importance_weights(old.bfloat16(), torch.randn(2, 3), MASK).dtype == torch.float32
    assert importance_weights(old[0], torch.randn(3), MASK[0]).shape == (3,)
    assert importance_weights(old[0], torch.randn(3), MASK[0], mode="sequence_mask").shape == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "tokens"}, "mode must be one of"),
        ({"cap": 0.0}, "cap must be positive"),
        ({"cap": NAN}, "cap must be positive"),
        ({"min": 3.0}, "min must be between 0 and cap=2.0"),
        ({"min": -1.0}, "min must be between"),
        ({"sampling_logps": torch.zeros(2, 4)}, r"sampling_logps has shape \(2, 4\)"),
        ({"mask": torch.ones(2)}, r"mask has shape \(2,\)"),
        ({"old_logps": torch.zeros(1, 2, 3)}, "old_logps has shape"),
        ({"sampling_logps": torch.zeros(2, 3, device="meta")}, "move them to one device"),
    ],
)
def test_importance_complaints(change: dict, message: str) -> None:
    arguments = {"old_logps": OLD, "sampling_logps": SAMPLING, "mask": MASK} | change
    with pytest.raises(ValueError, match=message):
        importance_weights(
            arguments.pop("old_logps"), arguments.pop("sampling_logps"), arguments.pop("mask"), **arguments
        )
