"""Results of edge cases: empty masks, garbage at masked positions, infinities, NaN, empty batches."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from grpo_ext.config import LOSS_TYPES, LossConfig
from grpo_ext.output import METRIC_NAMES

B, T, V = 3, 5, 11
TWICE = pytest.mark.parametrize("level", ["token", "sequence"])
EVERY_LOSS = pytest.mark.parametrize("loss_type", LOSS_TYPES)


def config_for(loss_type: str, level: str = "token", **more: object) -> LossConfig:
    """All options on unless switched off by name."""
    options: dict = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "max_completion_length": 8,
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "delta": 3.0,
        "entropy_coef": 0.01,
        "off_policy_mask_threshold": 0.5,
        "top_entropy_quantile": 0.7,
    }
    return LossConfig(**(options | more))


def plain(loss_type: str, level: str = "token", **more: object) -> LossConfig:
    return LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=8, **more)


def batch(device: torch.device, dtype: torch.dtype, mask: Tensor | None = None) -> dict:
    logits = (torch.randn(B, T, V) * 2).to(device, dtype)
    ids = torch.randint(0, V, (B, T))
    around = logits.detach().cpu().double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    jitter = {
        name: (around + 0.3 * torch.randn(B, T)).to(device, dtype)
        for name in ("old_logps", "ref_logps", "sampling_logps")
    }
    if mask is None:
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    return {
        "logits": logits,
        "completion_ids": ids.to(device),
        "advantages": torch.tensor([1.0, -0.5, 0.25], device=device),
        "completion_mask": mask.to(device),
        **jitter,
    }


def evaluate(impl: ModuleType, config: LossConfig, inputs: dict) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient of the logits, metrics."""
    inputs = dict(inputs)
    logits = inputs.pop("logits").detach().clone().requires_grad_()
    out = impl.grpo_loss(logits, config=config, **inputs)
    out.loss.backward()
    assert logits.grad is not None
    assert tuple(out.metrics) == METRIC_NAMES
    for tensor in (out.logps, out.entropy, out.kl):
        if tensor is not None:
            assert tensor.shape == inputs["completion_ids"].shape
            assert not tensor.requires_grad
            masked = inputs["completion_mask"] == 0
            assert not tensor[masked].any(), "outputs are 0 where the mask is"
    return out.loss.detach(), logits.grad, {k: v.item() for k, v in out.metrics.items()}


@EVERY_LOSS
@TWICE
def test_an_empty_mask_gives_zero(
    impl: ModuleType, device: torch.device, real: torch.dtype, loss_type: str, level: str
) -> None:
    inputs = batch(device, real, torch.zeros(B, T))
    inputs["logits"].fill_(math.nan)
    loss, grad, metrics = evaluate(impl, config_for(loss_type, level), inputs)
    assert loss.item() == 0
    assert not grad.any()
    assert set(metrics.values()) == {0.0}


@EVERY_LOSS
@TWICE
def test_what_lies_under_the_mask_is_inert(
    impl: ModuleType, device: torch.device, real: torch.dtype, loss_type: str, level: str
) -> None:
    clean = batch(device, real)
    clean["advantages"] = torch.randn(B, T).to(device)
    clean["importance_weights"] = torch.rand(B, T).to(device, real) + 0.5
    masked = clean["completion_mask"] == 0
    dirty = {k: v.clone() for k, v in clean.items()}
    for name, tensor in dirty.items():
        if name != "completion_mask":
            tensor[masked] = -100 if name == "completion_ids" else math.nan
    config = config_for(loss_type, level)
    loss, grad, metrics = evaluate(impl, config, dirty)
    expected_loss, expected_grad, expected_metrics = evaluate(impl, config, clean)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(grad, expected_grad)
    assert metrics == expected_metrics
    assert loss.isfinite()
    assert not grad[masked].any()


@EVERY_LOSS
@TWICE
def test_a_nan_logit_shows(
    impl: ModuleType, device: torch.device, real: torch.dtype, loss_type: str, level: str
) -> None:
    inputs = batch(device, real)
    inputs["logits"][1, 1, 4] = math.nan
    for config in (plain(loss_type, level), config_for(loss_type, level)):
        loss, _, metrics = evaluate(impl, config, inputs)
        assert loss.isnan()
        assert metrics["nonfinite_tokens"] >= 1
        assert metrics["nonfinite_tokens"] <= metrics["tokens"]


@pytest.mark.parametrize(
    "options",
    [{}, {"off_policy_mask_threshold": 0.1}, {"top_entropy_quantile": 0.2}, {"beta": 0.1}],
    ids=["plain", "off_policy", "entropy", "kl"],
)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_nan_logit_shows_through_every_mask(
    impl: ModuleType, device: torch.device, real: torch.dtype, options: dict, advantage: float
) -> None:
    """A factor of zero must not hide that the model has broken down."""
    inputs = batch(device, real)
    inputs["logits"][1, 1, 4] = math.nan
    inputs["advantages"][1] = advantage
    loss, _, metrics = evaluate(impl, LossConfig(**options), inputs)
    assert loss.isnan()
    assert metrics["nonfinite_tokens"] == 1


@EVERY_LOSS
@TWICE
def test_forbidden_tokens(
    impl: ModuleType, device: torch.device, real: torch.dtype, loss_type: str, level: str
) -> None:
    """-inf logits: as if those entries of the vocabulary did not exist, with a gradient of exactly 0."""
    inputs = batch(device, real)
    inputs["completion_ids"] = inputs["completion_ids"].clamp(max=6)
    inputs["logits"][..., 7:] = -math.inf
    small = inputs | {"logits": inputs["logits"][..., :7].contiguous()}
    config = config_for(loss_type, level)
    loss, grad, metrics = evaluate(impl, config, inputs)
    expected_loss, expected_grad, expected_metrics = evaluate(impl, config, small)
    tight = {"rtol": 1e-10, "atol": 1e-12} if real == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, expected_loss, **tight)
    torch.testing.assert_close(grad[..., :7], expected_grad, **tight)
    assert not grad[..., 7:].any()
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo"])
@TWICE
def test_a_forbidden_target_on_policy_has_ratio_one(
    impl: ModuleType, device: torch.device, real: torch.dtype, loss_type: str, level: str
) -> None:
    inputs = batch(device, real)
    for name in ("old_logps", "ref_logps", "sampling_logps"):
        del inputs[name]
    usual, usual_grad, _ = evaluate(impl, plain(loss_type, level), inputs)
    inputs["logits"][0, 1, inputs["completion_ids"][0, 1]] = -math.inf
    loss, grad, metrics = evaluate(impl, plain(loss_type, level), inputs)
    torch.testing.assert_close(loss, usual)  # -A * 1, whatever the logits
    assert metrics["ratio/mean"] == 1
    assert metrics["ratio/max"] == 1
    assert metrics["nonfinite_tokens"] == 0
    assert grad.isfinite().all()
    # dlogp/dz = onehot - p, and p = 0 at the target.
    target = (0, 1, inputs["completion_ids"][0, 1])
    others = usual_grad.clone()
    torch.testing.assert_close(grad[0, 1].sum(), torch.zeros_like(loss).to(real), atol=1e-6, rtol=0)
    others[0, 1] = grad[0, 1]
    torch.testing.assert_close(grad, others)
    assert abs(grad[target].item()) > abs(usual_grad[target].item())


@EVERY_LOSS
@TWICE
def test_a_zero_advantage_silences_an_overflowing_ratio(
    impl: ModuleType, device: torch.device, real: torch.dtype, loss_type: str, level: str
) -> None:
    inputs = batch(device, real)
    inputs["advantages"].zero_()
    inputs["old_logps"] = torch.full_like(inputs["old_logps"], -2000.0)
    del inputs["sampling_logps"]
    loss, grad, metrics = evaluate(impl, plain(loss_type, level), inputs)
    assert loss.item() == 0
    assert not grad.any()
    assert metrics["ratio/max"] == math.inf
    assert metrics["nonfinite_tokens"] == 0


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "sapo"])
@TWICE
def test_an_overflowing_ratio_is_clipped_without_gradient(
    impl: ModuleType, device: torch.device, real: torch.dtype, loss_type: str, level: str
) -> None:
    inputs = batch(device, real)
    inputs["advantages"].fill_(2.0)
    inputs["old_logps"] = torch.full_like(inputs["old_logps"], -2000.0)
    del inputs["sampling_logps"]
    loss, grad, _ = evaluate(impl, plain(loss_type, level), inputs)
    assert loss.item() == pytest.approx(-8.0 if loss_type == "sapo" else -2.4, rel=1e-6)
    assert not grad.any()
    if loss_type != "sapo":  # below zero the bound delta keeps it finite
        inputs["advantages"].neg_()
        loss, grad, _ = evaluate(impl, plain(loss_type, level, delta=4.0), inputs)
        assert loss.item() == pytest.approx(8.0, rel=1e-6)
        assert not grad.any()


@pytest.mark.parametrize("factor", ["off_policy", "importance"])
def test_a_factor_of_zero_removes_an_infinite_term(
    impl: ModuleType, device: torch.device, real: torch.dtype, factor: str
) -> None:
    inputs = batch(device, real)
    inputs["advantages"].fill_(-1.0)
    inputs["old_logps"] = torch.full_like(inputs["old_logps"], -2000.0)
    del inputs["sampling_logps"]
    config = LossConfig()
    if factor == "off_policy":
        config = LossConfig(off_policy_mask_threshold=-3000.0)
    else:
        inputs["importance_weights"] = torch.zeros(B, device=device)
    loss, grad, metrics = evaluate(impl, config, inputs)
    assert loss.item() == 0
    assert not grad.any()
    assert metrics["nonfinite_tokens"] == 0


def test_clipping_is_inclusive_at_its_borders(impl: ModuleType) -> None:
    """At r = 1 - epsilon and r = 1 + epsilon the gradient still passes; epsilon = 0.5 is exact in binary."""
    config = LossConfig(loss_type="luspo", epsilon=0.5)
    new = torch.tensor([[1.5, 0.5, 1.0, 1.5, 0.5, 1.0]], dtype=torch.float64).log()
    old = torch.zeros_like(new)
    ratio = new.exp()  # what exp(log r) rounds to decides whether a border is reached exactly
    A = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    leaf = new.clone().requires_grad_()
    out = impl.policy_loss(leaf, A, torch.ones_like(new), config, old_logps=old)
    out.loss.backward()
    assert leaf.grad is not None
    inside = (ratio >= 0.5) & (ratio <= 1.5)
    unclipped = inside | ((A > 0) & (ratio < 0.5)) | ((A < 0) & (ratio > 1.5))
    torch.testing.assert_close(leaf.grad, torch.where(unclipped, -A * ratio, 0.0))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.filterwarnings("ignore:delta=")
def test_delta_inside_the_clip_range(impl: ModuleType, advantage: float) -> None:
    """delta = 1.1 < 1 + epsilon_high = 1.5, r = 1.3: under A > 0 the flat bound is chosen, else r itself."""
    config = LossConfig(loss_type="luspo", epsilon=0.5, delta=1.1)
    new = torch.tensor([[1.3]], dtype=torch.float64).log().requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    out = impl.policy_loss(new, advantage * one[0], one, config, old_logps=0 * one)
    out.loss.backward()
    assert new.grad is not None
    assert out.loss.item() == pytest.approx(-1.1 if advantage > 0 else 1.3)
    assert new.grad.item() == pytest.approx(0.0 if advantage > 0 else 1.3)


@EVERY_LOSS
@TWICE
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty_batches(
    impl: ModuleType,
    device: torch.device,
    real: torch.dtype,
    loss_type: str,
    level: str,
    shape: tuple[int, ...],
) -> None:
    inputs = {
        "logits": torch.randn(*shape, V).to(device, real),
        "completion_ids": torch.zeros(shape, dtype=torch.int64, device=device),
        "completion_mask": torch.ones(shape, device=device),
        "advantages": torch.ones(shape[0], device=device),
        "ref_logps": torch.zeros(shape, device=device),
    }
    loss, grad, metrics = evaluate(impl, config_for(loss_type, level), inputs)
    assert loss.item() == 0
    assert grad.shape == (*shape, V)
    assert set(metrics.values()) == {0.0}
    logp = impl.selective_log_softmax(inputs["logits"], inputs["completion_ids"])
    assert logp.shape == shape


def test_one_row_is_one_sequence(impl: ModuleType, device: torch.device, real: torch.dtype) -> None:
    """(N, V) logits mean one sequence of N tokens with one advantage per token."""
    inputs = batch(device, real)
    inputs["advantages"] = torch.randn(B, T).to(device)
    flat = {k: v.flatten(0, 1) for k, v in inputs.items()}
    one = {k: v.unsqueeze(0) for k, v in flat.items()}
    for loss_type in ("grpo", "vespo"):
        a = evaluate(impl, config_for(loss_type, "sequence"), flat)
        b = evaluate(impl, config_for(loss_type, "sequence"), one)
        torch.testing.assert_close(a[0], b[0])
        torch.testing.assert_close(a[1], b[1].squeeze(0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32])
def test_mask_dtypes(impl: ModuleType, device: torch.device, real: torch.dtype, dtype: torch.dtype) -> None:
    inputs = batch(device, real)
    expected = evaluate(impl, config_for("dapo"), inputs)
    inputs["completion_mask"] = inputs["completion_mask"].to(dtype)
    assert torch.equal(evaluate(impl, config_for("dapo"), inputs)[1], expected[1])


def test_grad_scale_and_upstream_gradient(impl: ModuleType, device: torch.device, real: torch.dtype) -> None:
    inputs = batch(device, real)
    config = config_for("dapo")
    loss, grad, _ = evaluate(impl, config, inputs)
    scaled_loss, scaled_grad, _ = evaluate(impl, config, inputs | {"grad_scale": 0.125})
    assert torch.equal(scaled_loss, loss)
    torch.testing.assert_close(scaled_grad, grad / 8)
    logits = inputs.pop("logits").clone().requires_grad_()
    (impl.grpo_loss(logits, config=config, **inputs).loss * 8).backward()
    torch.testing.assert_close(logits.grad, grad * 8)
