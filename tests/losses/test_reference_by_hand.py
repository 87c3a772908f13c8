"""The reference against numbers worked out by hand from SPEC: scalars and `math`, no tensor formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_ext import reference
from grpo_ext.config import LossConfig

# Two completions of three and two tokens; the last position of the second is padding and holds rubbish.
# ratios:            1.5   0.5   1.1                1.5   0.9
NEW = [[0.6, 0.2, 0.55], [0.3, 0.45, math.nan]]
OLD = [[0.4, 0.4, 0.50], [0.2, 0.50, math.nan]]
REF = [[0.3, 0.4, 0.55], [0.6, 0.45, math.nan]]
SAMPLING = [[0.1, 0.8, 0.50], [0.4, 0.25, math.nan]]
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
A = torch.tensor([2.0, -1.0], dtype=torch.float64)

# -min(r A, clamp(r, 0.8, 1.2) A) of the five tokens: 1.5 is cut to 1.2 under A = 2, kept under A = -1;
# 0.5 is kept under A = 2 (the clamp would give the larger 1.6).
CLIPPED = [[-2.4, -1.0, -2.2], [1.5, 0.9, 0.0]]
CLIPPED_GRADIENT = [[0.0, -1.0, -2.2], [1.5, 0.9, 0.0]]  # dl/dnew = -r A, 0 where cut
TOTAL = -3.2  # -5.6 + 2.4


def logs(p: list[list[float]]) -> Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


def run(config: LossConfig, **options: object) -> tuple[reference.GRPOLossOutput, Tensor]:
    """Loss and dloss/dnew for the batch above; ``options`` override the inputs."""
    new = logs(NEW).requires_grad_()
    inputs: dict = {"old_logps": logs(OLD)} | options
    out = reference.policy_loss(new, inputs.pop("advantages", A), MASK, config, **inputs)
    out.loss.backward()
    assert new.grad is not None
    return out, new.grad


def tokens(config: LossConfig, **options: object) -> tuple[list[float], list[float]]:
    """Loss and derivative of each of the five tokens, read off with luspo-like weights of one."""
    values, gradients = [], []
    for position in MASK.nonzero():
        b, t = (int(i) for i in position)
        only = torch.zeros_like(MASK)
        only[b, t] = 1
        new = logs(NEW).requires_grad_()
        inputs: dict = {"old_logps": logs(OLD)} | options
        out = reference.policy_loss(
            new,
            inputs.pop("advantages", A),
            only,
            config,
            num_items_in_batch=1,
            **inputs,
        )
        out.loss.backward()
        assert new.grad is not None
        scale = 2 if config.loss_type in ("grpo", "sapo", "luspo") else 1  # those divide by B = 2
        values.append(out.loss.item() * scale)
        gradients.append(new.grad[b, t].item() * scale)
    return values, gradients


@pytest.mark.parametrize(
    ("loss_type", "expected", "token_weight"),
    [
        ("grpo", (-5.6 / 3 + 2.4 / 2) / 2, [[1 / 6] * 3, [1 / 4] * 3]),
        ("bnpo", TOTAL / 5, [[1 / 5] * 3] * 2),
        ("dr_grpo", TOTAL / (2 * 10), [[1 / 20] * 3] * 2),
        ("luspo", TOTAL / 2, [[1 / 2] * 3] * 2),
        ("dapo", TOTAL / 8, [[1 / 8] * 3] * 2),
    ],
)
def test_reductions_of_the_clipped_objective(loss_type: str, expected: float, token_weight: list[list[float]]) -> None:
    config = LossConfig(loss_type=loss_type, max_completion_length=10)
    out, grad = run(config, num_items_in_batch=8)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        grad,
        torch.tensor(CLIPPED_GRADIENT).double() * torch.tensor(token_weight).double(),
    )


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_without_a_divisor_the_local_tokens_count(loss_type: str) -> None:
    config = LossConfig(loss_type=loss_type)
    alone, _ = run(config)
    given, _ = run(config, num_items_in_batch=torch.tensor(5.0))
    assert alone.loss.item() == pytest.approx(given.loss.item(), rel=1e-12)
    for useless in (0, -3, torch.tensor(0)):
        one, _ = run(config, num_items_in_batch=useless)
        assert one.loss.item() == pytest.approx(5 * alone.loss.item(), rel=1e-12)


def test_bnpo_with_one_sequence_is_grpo() -> None:
    losses = [
        reference.policy_loss(
            logs(NEW)[:1],
            A[:1],
            MASK[:1],
            LossConfig(loss_type=t),
            old_logps=logs(OLD)[:1],
        ).loss
        for t in ("grpo", "bnpo")
    ]
    assert losses[0] == losses[1]


def test_epsilon_high_widens_the_upper_side_only() -> None:
    values, gradients = tokens(LossConfig(epsilon_high=0.6))
    assert values == pytest.approx([-3.0, -1.0, -2.2, 1.5, 0.9])
    assert gradients == pytest.approx([-3.0, -1.0, -2.2, 1.5, 0.9])


def test_delta_bounds_the_unclipped_ratio() -> None:
    values, gradients = tokens(LossConfig(delta=1.3))
    # Only the 1.5 under A = -1 was unbounded: min(1.3 * -1, 1.2 * -1) = -1.3, flat.
    assert values == pytest.approx([-2.4, -1.0, -2.2, 1.3, 0.9])
    assert gradients == pytest.approx([0.0, -1.0, -2.2, 0.0, 0.9])


def test_low_ratio_under_a_negative_advantage_is_cut() -> None:
    values, gradients = tokens(LossConfig(), advantages=-A)
    # A = -2: r = 1.5 -> 3.0, r = 0.5 -> max(1.0, 1.6) = 1.6 flat, 1.1 -> 2.2; A = 1: 1.5 -> -1.2 flat, -0.9
    assert values == pytest.approx([3.0, 1.6, 2.2, -1.2, -0.9])
    assert gradients == pytest.approx([3.0, 0.0, 2.2, 0.0, -0.9])


def test_cispo_caps_the_ratio_and_keeps_the_gradient() -> None:
    values, gradients = tokens(LossConfig(loss_type="cispo", epsilon_high=1.2))
    weights = [1.2 * 2, 0.5 * 2, 1.1 * 2, 1.2 * -1, 0.9 * -1]
    logp = [math.log(p) for p in (0.6, 0.2, 0.55, 0.3, 0.45)]
    assert values == pytest.approx([-w * x for w, x in zip(weights, logp, strict=True)])
    assert gradients == pytest.approx([-w for w in weights])


def test_sapo_gates_by_a_sigmoid() -> None:
    values, gradients = tokens(LossConfig(loss_type="sapo", sapo_temperature_pos=1.5))
    expected, slopes = [], []
    for r, a in ((1.5, 2.0), (0.5, 2.0), (1.1, 2.0), (1.5, -1.0), (0.9, -1.0)):
        tau = 1.5 if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        expected.append(-gate * 4 / tau * a)
        slopes.append(-4 * gate * (1 - gate) * a * r)
    assert values == pytest.approx(expected)
    assert gradients == pytest.approx(slopes)


def vespo_phi(s: float, k: float, lam: float) -> float:
    lw = min(max(s, math.log(1e-8)), 20.0)
    return math.exp(lam + k * lw - lam * math.exp(lw))


def test_vespo_weighs_whole_sequences() -> None:
    out, grad = run(LossConfig(loss_type="vespo"), num_items_in_batch=1)
    phi = [
        vespo_phi(math.log(1.5 * 0.5 * 1.1), 2, 3),
        vespo_phi(math.log(1.5 * 0.9), 3, 2),
    ]
    expected = -phi[0] * 2 * math.log(0.6 * 0.2 * 0.55) + phi[1] * math.log(0.3 * 0.45)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        grad,
        torch.tensor([[-2 * phi[0]] * 3, [phi[1], phi[1], 0.0]], dtype=torch.float64),
    )


def test_vespo_adds_the_importance_weights_to_the_exponent() -> None:
    config = LossConfig(loss_type="vespo", vllm_importance_sampling_mode="token_mask")
    # old / sampling: 4 (masked to 0), 0.5, 1; 0.5, 2. log 0 is bounded by log 1e-8.
    s = [
        math.log(1.5 * 0.5 * 1.1) + math.log(1e-8) + math.log(0.5),
        math.log(1.5 * 0.9),
    ]
    phi = [vespo_phi(s[0], 2, 3), vespo_phi(s[1], 3, 2)]
    out, _ = run(config, sampling_logps=logs(SAMPLING), num_items_in_batch=1)
    expected = -phi[0] * 2 * math.log(0.6 * 0.2 * 0.55) + phi[1] * math.log(0.3 * 0.45)
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    # One weight per sequence enters once, not once per token.
    per_sequence, _ = run(config, importance_weights=torch.tensor([0.5, 2.0]), num_items_in_batch=1)
    phi = [
        vespo_phi(math.log(1.5 * 0.5 * 1.1 * 0.5), 2, 3),
        vespo_phi(math.log(1.5 * 0.9 * 2.0), 3, 2),
    ]
    expected = -phi[0] * 2 * math.log(0.6 * 0.2 * 0.55) + phi[1] * math.log(0.3 * 0.45)
    assert per_sequence.loss.item() == pytest.approx(expected, rel=1e-12)


def test_vespo_bounds_each_log_ratio_and_their_sum() -> None:
    new = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    old = torch.tensor([[-51.0, 14.0]], dtype=torch.float64)  # d = 50 -> 20, -15; s = 5
    one = torch.ones(1, 2)
    out = reference.policy_loss(
        new,
        torch.ones(1),
        one,
        LossConfig(loss_type="vespo", vespo_lambda_pos=0.01),
        old_logps=old,
    )
    assert out.loss.item() == pytest.approx(vespo_phi(5.0, 2, 0.01), rel=1e-12)


def test_sequence_level_uses_the_geometric_mean() -> None:
    out, grad = run(LossConfig(loss_type="grpo", importance_sampling_level="sequence"))
    r = [
        (1.5 * 0.5 * 1.1) ** (1 / 3),
        math.sqrt(1.5 * 0.9),
    ]  # 0.938, 1.162: inside the clip range
    assert out.loss.item() == pytest.approx((-2 * r[0] + r[1]) / 2, rel=1e-12)
    # Each token carries 1/|y| of its sequence's ratio: (1/B) * (-A r) / |y|.
    expected = [[-2 * r[0] / 3 / 2] * 3, [r[1] / 2 / 2, r[1] / 2 / 2, 0.0]]
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64))


def test_kl_and_its_bias_correction() -> None:
    def k3(ref: float, new: float) -> float:
        return ref / new - math.log(ref / new) - 1

    kl = [k3(0.3, 0.6), k3(0.4, 0.2), 0.0, k3(0.6, 0.3), 0.0]
    slope = [
        1 - 0.3 / 0.6,
        1 - 0.4 / 0.2,
        0.0,
        1 - 0.6 / 0.3,
        0.0,
    ]  # dkl/dnew = 1 - ref/new
    r = [1.5, 0.5, 1.1, 1.5, 0.9]
    clipped = [-2.4, -1.0, -2.2, 1.5, 0.9]
    clipped_slope = [0.0, -1.0, -2.2, 1.5, 0.9]

    values, gradients = tokens(LossConfig(beta=0.3), ref_logps=logs(REF))
    assert values == pytest.approx([c + 0.3 * k for c, k in zip(clipped, kl, strict=True)])
    assert gradients == pytest.approx([c + 0.3 * s for c, s in zip(clipped_slope, slope, strict=True)])

    corrected = LossConfig(beta=0.3, use_bias_correction_kl=True, delta=1.3)  # r before delta
    values, gradients = tokens(corrected, ref_logps=logs(REF))
    clipped[3], clipped_slope[3] = 1.3, 0.0
    assert values == pytest.approx([c + 0.3 * k * x for c, k, x in zip(clipped, kl, r, strict=True)])
    assert gradients == pytest.approx(
        [c + 0.3 * (s * x + k * x) for c, s, k, x in zip(clipped_slope, slope, kl, r, strict=True)]
    )
    out, _ = run(corrected, ref_logps=logs(REF))
    assert out.kl is not None
    expected = [k * x for k, x in zip(kl, r, strict=True)]
    torch.testing.assert_close(out.kl[MASK.bool()], torch.tensor(expected, dtype=torch.float64))


def test_without_beta_there_is_no_kl() -> None:
    assert run(LossConfig(), ref_logps=logs(REF))[0].kl is None
    with pytest.raises(ValueError, match="ref_logps"):
        run(LossConfig(beta=0.1))


def test_off_policy_mask_drops_only_negative_sequences() -> None:
    # mean of old - new: -log(0.825)/3 = 0.064 and -log(1.35)/2 = -0.150
    ref = logs(REF)
    for threshold, advantages, expected in (
        (0.1, -A, [3.0 + 1.6 + 2.2, -2.1]),  # both kept
        (0.05, -A, [0.0, -2.1]),  # the first is over the line and negative
        (0.05, A, [-5.6, 2.4]),  # positive: kept whatever the difference
        (-0.2, A, [-5.6, 0.0]),
    ):
        config = LossConfig(loss_type="luspo", off_policy_mask_threshold=threshold)
        out, _ = run(config, advantages=advantages)
        assert out.loss.item() == pytest.approx(sum(expected) / 2)
        assert out.metrics["off_policy_kept"].item() == sum(x != 0 for x in expected) / 2
        # The KL term stays.
        with_kl, _ = run(config.replace(beta=0.3), advantages=advantages, ref_logps=ref)
        assert with_kl.kl is not None
        assert (with_kl.loss - out.loss).item() == pytest.approx(0.3 * with_kl.kl.sum().item() / 2)
    # Where the engine's log probabilities are given they are the behaviour: 4 * .1.. means log(s/new)/n
    sampling_mean = math.log(0.1 * 0.8 * 0.5 / (0.6 * 0.2 * 0.55)) / 3  # -0.167
    config = LossConfig(
        loss_type="luspo",
        off_policy_mask_threshold=sampling_mean - 0.01,
        vllm_importance_sampling_correction=False,
    )
    out, _ = run(config, advantages=torch.tensor([-2.0, 1.0]), sampling_logps=logs(SAMPLING))
    assert out.loss.item() == pytest.approx(-2.1 / 2)


def test_entropy_mask_keeps_the_top_share() -> None:
    entropy = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, math.nan]], dtype=torch.float64)
    config = LossConfig(loss_type="luspo", top_entropy_quantile=0.4)
    out, grad = run(config, entropy=entropy)  # the 0.6 quantile of five values is 0.34
    assert out.loss.item() == pytest.approx((1.5 + 0.9) / 2)
    assert grad[0].tolist() == [0.0, 0.0, 0.0]
    # q = 0.75: the 0.25 quantile is exactly the second value, which is kept.
    out, _ = run(config.replace(top_entropy_quantile=0.75), entropy=entropy)
    assert out.loss.item() == pytest.approx((-1.0 - 2.2 + 1.5 + 0.9) / 2)
    for threshold in (0.45, torch.tensor(0.45)):
        out, _ = run(config, entropy=entropy, entropy_threshold=threshold)
        assert out.loss.item() == pytest.approx(0.9 / 2)
    with pytest.raises(ValueError, match="entropy"):
        run(config)


def test_entropy_bonus_lowers_the_loss_and_has_a_gradient() -> None:
    entropy = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, math.nan]], dtype=torch.float64, requires_grad=True)
    config = LossConfig(loss_type="luspo", entropy_coef=0.5, top_entropy_quantile=0.4)
    out, _ = run(config, entropy=entropy, importance_weights=torch.tensor([1.0, 0.5]))
    # The bonus is not touched by the masks and weights of the policy term.
    assert out.loss.item() == pytest.approx((0.5 * (1.5 + 0.9) - 0.5 * 1.5) / 2)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == [[-0.25] * 3, [-0.25, -0.25, 0.0]]


# old / sampling per token: 4, 0.5, 1; 0.5, 2
@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token_truncate", [[1.5, 0.6, 1.0], [0.6, 1.5]]),
        ("token_mask", [[0.0, 0.0, 1.0], [0.0, 0.0]]),
        ("sequence_truncate", [[1.5] * 3, [1.0] * 2]),
        ("sequence_mask", [[0.0] * 3, [1.0] * 2]),
    ],
)
def test_importance_weights_in_four_modes(mode: str, weights: list[list[float]]) -> None:
    made = reference.importance_weights(logs(OLD), logs(SAMPLING), MASK, mode=mode, cap=1.5, min=0.6)
    assert made.shape == ((2, 3) if mode.startswith("token") else (2, 1))
    expanded = made.expand(2, 3)[MASK.bool()].tolist()
    assert expanded == pytest.approx([w for row in weights for w in row])

    config = LossConfig(
        loss_type="luspo",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_cap=1.5,
        vllm_importance_sampling_clip_min=0.6,
    )
    out, grad = run(config, sampling_logps=logs(SAMPLING))
    expected = sum(c * w for c, w in zip([x for r in CLIPPED for x in r], expanded_full(weights), strict=True))
    assert out.loss.item() == pytest.approx(expected / 2)
    slopes = torch.tensor(CLIPPED_GRADIENT, dtype=torch.float64).flatten() * torch.tensor(
        expanded_full(weights), dtype=torch.float64
    )
    torch.testing.assert_close(grad.flatten(), slopes / 2)
    off, _ = run(
        config.replace(vllm_importance_sampling_correction=False),
        sampling_logps=logs(SAMPLING),
    )
    assert off.loss.item() == pytest.approx(TOTAL / 2)


def expanded_full(weights: list[list[float]]) -> list[float]:
    return [*weights[0], *weights[1], 0.0]


@pytest.mark.parametrize("weights", [[1.0, 0.5], [[1.0], [0.5]], [[1.0, 1.0, 1.0], [0.5, 0.5, math.nan]]])
def test_given_importance_weights(weights: list) -> None:
    config = LossConfig(loss_type="luspo", beta=0.3)
    out, _ = run(config, importance_weights=torch.tensor(weights), ref_logps=logs(REF))
    assert out.kl is not None
    assert out.loss.item() == pytest.approx((-5.6 + 0.5 * 2.4 + 0.3 * out.kl.sum().item()) / 2)


def test_on_policy_importance_weights_equal_the_two_forward_route() -> None:
    for mode in ("token_truncate", "sequence_mask"):
        config = LossConfig(vllm_importance_sampling_mode=mode)
        one, grad_one = run(config, old_logps=None, sampling_logps=logs(SAMPLING))
        two, grad_two = run(config, old_logps=logs(NEW), sampling_logps=logs(SAMPLING))
        assert one.loss.item() == pytest.approx(two.loss.item(), rel=1e-12)
        torch.testing.assert_close(grad_one, grad_two)


def test_metrics_by_hand() -> None:
    entropy = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, math.nan]], dtype=torch.float64)
    out, _ = run(
        LossConfig(),
        entropy=entropy,
        sampling_logps=logs(SAMPLING),
        advantages=torch.tensor([2.0, 1.0]),
    )
    difference = [math.log(4), math.log(2), 0.0, math.log(2), math.log(2)]
    expected = {
        "tokens": 5,
        "entropy": 0.3,
        "kl": 0,
        "clip_ratio/low_mean": 0,
        "clip_ratio/high_mean": 2 / 5,
        "clip_ratio/region_mean": 2 / 5,
        "ratio/mean": (1.5 + 0.5 + 1.1 + 1.5 + 0.9) / 5,
        "ratio/max": 1.5,
        "importance_weight/mean": (2 + 0.5 + 1 + 0.5 + 2) / 5,
        "importance_weight/min": 0.5,
        "importance_weight/max": 2,
        "sampling_logp_difference/mean": sum(difference) / 5,
        "sampling_logp_difference/max": math.log(4),
        "off_policy_kept": 1,
        "nonfinite_tokens": 0,
    }
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(expected)
    low, _ = run(LossConfig(beta=0.2), advantages=-A, ref_logps=logs(REF))
    assert low.metrics["clip_ratio/low_mean"].item() == pytest.approx(1 / 5)
    assert low.metrics["clip_ratio/high_mean"].item() == pytest.approx(1 / 5)
    assert low.metrics["clip_ratio/region_mean"].item() == pytest.approx(2 / 5)
    assert low.kl is not None
    assert low.metrics["kl"].item() == pytest.approx(low.kl.sum().item() / 5)
    sequence, _ = run(
        LossConfig(importance_sampling_level="sequence", epsilon=0.1),
        advantages=torch.tensor([-1.0, 1.0]),
    )
    assert sequence.metrics["ratio/mean"].item() == pytest.approx((0.825 ** (1 / 3) + 1.35**0.5) / 2)
    assert sequence.metrics["clip_ratio/high_mean"].item() == pytest.approx(1 / 2)
    assert sequence.metrics["clip_ratio/low_mean"].item() == pytest.approx(0)
    cispo, _ = run(LossConfig(loss_type="cispo", epsilon_high=1.2))
    assert cispo.metrics["clip_ratio/high_mean"].item() == pytest.approx(1 / 5)


def test_log_probability_and_entropy() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]], dtype=torch.float64)
    logp, entropy = reference.selective_log_softmax(logits, torch.tensor([1]), return_entropy=True)
    assert logp.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    logp = reference.selective_log_softmax(
        torch.tensor([[1.0, -2.0]], dtype=torch.float64),
        torch.tensor([0]),
        temperature=0.5,
        logit_scale=3.0,
        logit_softcap=2.0,
    )
    x = [2 * math.tanh(3 / 2) / 0.5, 2 * math.tanh(-6 / 2) / 0.5]
    assert logp.item() == pytest.approx(x[0] - math.log(math.exp(x[0]) + math.exp(x[1])))


def test_linear_forms_are_the_product_and_the_loss() -> None:
    hidden, weight, bias = (
        torch.randn(2, 3, 4).double(),
        torch.randn(5, 4).double(),
        torch.randn(5).double(),
    )
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, -100]]), MASK
    logits = torch.einsum("bth,vh->btv", hidden, weight) + bias
    config = LossConfig(beta=0.1, temperature=0.7)
    hidden[1, 2] = math.nan
    a = reference.linear_grpo_loss(hidden, weight, ids, A, mask, config, bias=bias, ref_logps=logs(REF))
    b = reference.grpo_loss(logits, ids, A, mask, config, ref_logps=logs(REF))
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-12)
    logp = reference.linear_selective_log_softmax(hidden, weight, ids, bias=bias, mask=mask)
    assert isinstance(logp, Tensor)
    kept = reference.selective_log_softmax(logits, ids.clamp(min=0))
    assert isinstance(kept, Tensor)
    torch.testing.assert_close(logp, torch.where(mask != 0, kept, 0.0))
