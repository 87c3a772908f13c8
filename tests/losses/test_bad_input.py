"""Invalid arguments raise an error that names the argument and a remedy, before any computation."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

import grpo_ext
from grpo_ext.config import LossConfig
from grpo_ext.integrations.row_logps import row_logps

B, T, V = 2, 3, 9


def arguments(device: torch.device | str = "cpu") -> dict[str, Any]:
    return {
        "logits": torch.randn(B, T, V, device=device),
        "completion_ids": torch.randint(0, V, (B, T), device=device),
        "advantages": torch.ones(B, device=device),
        "completion_mask": torch.ones(B, T, device=device),
        "config": LossConfig(),
    }


@pytest.mark.parametrize("bad", [V, -1, -100, 2**40])
def test_ids_outside_the_vocabulary(impl: ModuleType, bad: int) -> None:
    given = arguments()
    given["completion_ids"][1, 2] = bad
    with pytest.raises(IndexError, match=rf"{bad}.*\[0, {V}\)"):
        impl.grpo_loss(**given)
    with pytest.raises(IndexError, match=rf"{bad}.*\[0, {V}\)"):
        impl.selective_log_softmax(given["logits"], given["completion_ids"])
    given["completion_mask"][1, 2] = 0  # nobody looks there
    assert impl.grpo_loss(**given).loss.isfinite()


def test_the_error_names_the_argument_and_the_position() -> None:
    given = arguments()
    given["completion_ids"][1, 2] = V
    with pytest.raises(IndexError, match=r"^completion_ids\[1, 2\].*set completion_mask to 0 there"):
        grpo_ext.grpo_loss(**given)
    with pytest.raises(IndexError, match=r"^ids\[1, 2\](?!.*mask)"):
        grpo_ext.selective_log_softmax(given["logits"], given["completion_ids"])


def test_a_bad_id_leaves_no_half_written_gradient() -> None:
    """The row of a bad id is reported; afterwards the same call with good ids works."""
    given = arguments()
    good = given["completion_ids"].clone()
    given["completion_ids"][0, 1] = V
    leaf = given.pop("logits").requires_grad_()
    with pytest.raises(IndexError):
        grpo_ext.grpo_loss(leaf, **given)
    assert leaf.grad is None
    grpo_ext.grpo_loss(leaf, **(given | {"completion_ids": good})).loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(B, T, V).long()}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(B, T, V, dtype=torch.complex64)}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(V)}, ValueError, "logits must be"),
        ({"logits": torch.zeros(1, B, T, V)}, ValueError, "logits must be"),
        ({"logits": [[1.0]]}, (TypeError, ValueError), "logits must be"),
        ({"logits": torch.zeros(B, T, 0)}, ValueError, "vocabulary"),
        ({"logits": torch.zeros(B, V, T).transpose(1, 2)}, ValueError, r"dense.*logits.contiguous"),
        ({"logits": torch.zeros(B, T + 1, V)}, ValueError, r"completion_ids.*\(2, 4\).*\(2, 3\)"),
        ({"completion_ids": torch.zeros(B, T).int()}, TypeError, r"int64.*completion_ids.long\(\)"),
        ({"completion_ids": [[0]]}, TypeError, "completion_ids must be an int64 tensor, got list"),
        ({"completion_ids": torch.zeros(B, T + 1).long()}, ValueError, "completion_ids"),
        (
            {"completion_ids": torch.zeros(B, T, device="meta").long()},
            ValueError,
            "completion_ids is on meta",
        ),
        ({"completion_mask": torch.ones(B)}, ValueError, "completion_mask must have the shape"),
        ({"completion_mask": torch.ones(B, T, device="meta")}, ValueError, "completion_mask is on meta"),
        ({"completion_mask": None}, TypeError, "completion_mask must be a tensor, got NoneType"),
        ({"advantages": torch.ones(B + 1)}, ValueError, r"advantages must be.*\(3,\)"),
        ({"advantages": torch.ones(T, B)}, ValueError, "advantages must be"),
        ({"advantages": torch.ones(B, device="meta")}, ValueError, "advantages is on meta"),
        ({"advantages": None}, TypeError, "advantages must be a tensor"),
        ({"advantages": [1.0, 2.0]}, TypeError, "advantages must be a tensor, got list"),
        ({"config": "dapo"}, TypeError, "config must be a LossConfig, got str"),
        ({"old_logps": torch.ones(B, T + 1)}, ValueError, r"old_logps.*completion_ids \(2, 3\).*\(2, 4\)"),
        ({"old_logps": [[0.0]]}, TypeError, "old_logps must be a tensor, got list"),
        ({"ref_logps": torch.ones(B), "config": LossConfig(beta=0.1)}, ValueError, "ref_logps"),
        ({"config": LossConfig(beta=0.1)}, ValueError, "beta=0.1 needs ref_logps"),
        ({"sampling_logps": torch.ones(T, B)}, ValueError, "sampling_logps"),
        ({"sampling_logps": torch.ones(B, T, device="meta")}, ValueError, "sampling_logps is on meta"),
        ({"importance_weights": torch.ones(B, 2)}, ValueError, "importance_weights must be"),
        ({"importance_weights": 1.0}, TypeError, "importance_weights must be a tensor, got float"),
        ({"completion_mask": torch.ones(B, T).cfloat()}, TypeError, "completion_mask must hold real numbers, got"),
        ({"advantages": torch.ones(B).cfloat()}, TypeError, r"advantages must hold real.*complex64.*advantages.real"),
        ({"old_logps": torch.ones(B, T).cfloat()}, TypeError, "old_logps must hold real numbers"),
        ({"importance_weights": torch.ones(B).cfloat()}, TypeError, "importance_weights must hold real numbers"),
        ({"num_items_in_batch": torch.ones(1).cfloat()}, TypeError, "num_items_in_batch must hold real numbers"),
        ({"num_items_in_batch": "3"}, ValueError, "num_items_in_batch must be a number, got '3'"),
        ({"num_items_in_batch": math.nan}, ValueError, "num_items_in_batch must be a number, got nan; pass None"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be a number"),
        ({"entropy_threshold": torch.ones(2)}, ValueError, "entropy_threshold must be a number"),
    ],
)
def test_grpo_loss_complains(change: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        grpo_ext.grpo_loss(**(arguments() | change))


def test_policy_loss_complains() -> None:
    logps, one, A = torch.zeros(B, T), torch.ones(B, T), torch.ones(B)
    for config in (LossConfig(entropy_coef=0.1), LossConfig(top_entropy_quantile=0.5)):
        with pytest.raises(ValueError, match="entropy"):
            grpo_ext.policy_loss(logps, A, one, config)
    with pytest.raises(ValueError, match="entropy must have the shape"):
        grpo_ext.policy_loss(logps, A, one, LossConfig(), entropy=torch.ones(B))
    with pytest.raises(ValueError, match=r"entropy is on meta, logps on cpu.*entropy.to\('cpu'\)"):
        grpo_ext.policy_loss(logps, A, one, LossConfig(), entropy=torch.ones(B, T, device="meta"))
    with pytest.raises(ValueError, match="logps must be"):
        grpo_ext.policy_loss(torch.zeros(B, T, V), A, one, LossConfig())
    with pytest.raises(ValueError, match=r"completion_mask must have the shape of logps \(2, 3\)"):
        grpo_ext.policy_loss(logps, A, torch.ones(B), LossConfig())
    with pytest.raises(ValueError, match="advantages is on meta, logps on cpu"):
        grpo_ext.policy_loss(logps, A.to("meta"), one, LossConfig())
    with pytest.raises(TypeError, match="logps must be a floating-point tensor, got list"):
        grpo_ext.policy_loss([[0.0]], A, one, LossConfig())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logps"):
        grpo_ext.policy_loss(logps.long(), A, one, LossConfig())


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": math.nan}, {"logit_softcap": -1.0}, {"logit_scale": 0.0}],
)
def test_selective_log_softmax_complains(options: dict[str, float]) -> None:
    logits, ids = torch.zeros(B, T, V), torch.zeros(B, T).long()
    with pytest.raises(ValueError, match=next(iter(options))):
        grpo_ext.selective_log_softmax(logits, ids, **options)
    with pytest.raises(ValueError, match="ids"):
        grpo_ext.selective_log_softmax(logits, ids[:, :1])
    with pytest.raises(TypeError, match="ids must be an int64 tensor"):
        grpo_ext.selective_log_softmax(logits, ids.float())


@pytest.mark.parametrize("temperature", [1e-45, 1e39, math.inf, True, "1"])
def test_a_temperature_that_float32_does_not_hold(temperature: Any) -> None:
    logits, ids = torch.zeros(B, T, V), torch.zeros(B, T).long()
    for call in (
        lambda: grpo_ext.selective_log_softmax(logits, ids, temperature=temperature),
        lambda: grpo_ext.linear_selective_log_softmax(logits, torch.ones(5, V), ids, temperature=temperature),
        lambda: row_logps(logits, ids, torch.ones(B, T).bool(), temperature=temperature, overwrite=False),
    ):
        with pytest.raises(ValueError, match=r"temperature must be (positive|a number)"):
            call()


@pytest.mark.parametrize("wrong", [0.5, 2.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_float_mask_holds_0_and_1_only(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, wrong: float, compiled: bool
) -> None:
    """An error on the CPU; on a GPU and for a compiler, which cannot look, NaN instead of a wrong number."""
    mask = torch.ones(B, T, device=device)
    mask[1, 1] = wrong
    given = arguments(device) | {"completion_mask": mask}
    weight, ids = torch.ones(5, V, device=device), given["completion_ids"] % 5
    logps = torch.zeros(B, T, device=device)
    calls = {
        "completion_mask": lambda: grpo_ext.grpo_loss(**given).loss,
        "completion_mask ": lambda: grpo_ext.reference.grpo_loss(**given).loss,
        "mask": lambda: grpo_ext.linear_selective_log_softmax(given["logits"], weight, ids, mask=mask),
        "mask ": lambda: grpo_ext.reference.linear_selective_log_softmax(given["logits"], weight, ids, mask=mask),
        "mask  ": lambda: grpo_ext.importance_weights(logps, logps, mask),
    }
    if compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for name, call in calls.items():
        if device.type == "cpu" and not compiled:
            with pytest.raises(ValueError, match=f"^{name.strip()} must hold 0 and 1 only, got {wrong:g}: "):
                call()
        else:
            assert call().isnan().all(), name
    mask[1, 1] = 1.0
    assert all(call().isfinite().all() for call in calls.values())


def test_integers_in_a_mask_count_as_one() -> None:
    given = arguments()
    expected = grpo_ext.grpo_loss(**given).loss
    given["completion_mask"] = torch.tensor([[1, 2, 3], [-1, 7, 1]])
    assert torch.equal(grpo_ext.grpo_loss(**given).loss, expected)


def test_an_unknown_loss_type() -> None:
    with pytest.raises(ValueError, match=r"loss_type must be one of grpo, bnpo.*'ppo'"):
        LossConfig(loss_type="ppo")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_tensors_on_two_devices() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch sees none")
    for name in ("completion_ids", "advantages", "completion_mask"):
        given = arguments("cuda")
        given[name] = given[name].cpu()
        with pytest.raises(ValueError, match=f"{name} is on cpu"):
            grpo_ext.grpo_loss(**given)


def test_rows_without_a_distribution_are_nan_not_a_crash(impl: ModuleType, device: torch.device) -> None:
    """All logits -inf, or one +inf: NaN, counted; the other rows keep their values."""
    given = arguments(device)
    expected = impl.grpo_loss(**given)
    given["logits"][0, 1] = -math.inf
    out = impl.grpo_loss(**given)
    assert out.loss.isnan()
    assert out.metrics["nonfinite_tokens"] == 1
    assert torch.equal(out.logps[1], expected.logps[1])
    given["logits"][0, 1, given["completion_ids"][0, 1]] = math.inf
    out = impl.grpo_loss(**given)
    assert out.loss.isnan()
    assert out.metrics["nonfinite_tokens"] == 1
