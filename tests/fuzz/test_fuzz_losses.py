"""Compiled losses on random shapes, strides, dtypes, masks and parameters: exact, repeatable, rows independent.

`make test` runs the same cases every time; ``make fuzz`` (GRPO_EXT_FUZZ=20) runs twenty times as many new cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_cases import (
    DTYPES,
    LOSS_CASE,
    POLICY_CASE,
    Random,
    Result,
    call,
    cases,
    compare,
    flattened,
    in_dtype,
    laid_out,
    logits_of,
    loss_config,
    loss_inputs,
    near_a_decision,
    truth_of,
)
from hypothesis import Phase, assume, given
from hypothesis import strategies as st
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import LossConfig

Case = dict[str, Any]


def reach_of(x: Tensor) -> float:
    """The greatest processed logit in size, -inf apart."""
    return x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0


def loss_call(case: Case) -> tuple[dict[str, Tensor], Callable[..., Any], dict[str, Any], LossConfig, float]:
    """Leaves, the way from them to the arguments, the other inputs, the config, and how far a log probability reaches:
    the greatest logit and, for the sum of the exponentials, log V (equal logits of 0 have one of -log V)."""
    draw = Random(case["seed"])
    logits, ids = logits_of(case, draw)
    x = reference.processed_logits(
        logits.double(), *(case["transform"].get(k, v) for k, v in (("temperature", 1.0), ("logit_softcap", None))),
        case["transform"].get("logit_scale", 1.0),
    )  # fmt: skip
    new, entropy = reference.log_probability(x, ids), reference.entropy_of(x)
    values = loss_inputs(case, draw, new, entropy)
    # What masked rows hold must not matter: ids that are none, NaN logits.
    ids = torch.where(values["mask"], ids, -100)
    logits = torch.where(values["mask"].unsqueeze(-1), logits, torch.nan)
    real = torch.float64 if case["dtype"] == "fp64" else torch.float32
    if case["flat"]:
        logits, ids = logits.flatten(0, 1), ids.flatten()
        values = flattened(values, case["B"], case["T"])
    values = in_dtype(values, case, real)
    full, view = laid_out(logits, case)

    def arguments(leaves: dict[str, Tensor]) -> tuple[list[Any], dict[str, Any]]:
        # An in-place loss wants logits that came out of an operation.
        return [view(leaves["logits"].clone()), ids], {"inplace": case["inplace"]}

    return {"logits": full}, arguments, values, loss_config(case), reach_of(x) + math.log(x.shape[-1])


def check_grpo_loss(case: Case) -> None:
    leaves, arguments, values, config, reach = loss_call(case)
    rest = (arguments, values, config, case["upstream"])
    truth = truth_of(reference.grpo_loss, leaves, *rest)
    assume(not near_a_decision(config, values, truth.out, truth.out.entropy))
    ours, same = (call(f, leaves, *rest) for f in (grpo_ext.grpo_loss, reference.grpo_loss))
    dtype = DTYPES[case["dtype"]]
    real = torch.float64 if case["dtype"] == "fp64" else torch.float32
    assert ours.grads["logits"].dtype == dtype
    assert ours.out.loss.dtype == real
    compare(ours, same, truth, config, real, dtype, reach)


@given(LOSS_CASE)
@cases(1000)
def test_grpo_loss_is_the_reference(case: Case) -> None:
    check_grpo_loss(case)


@given(POLICY_CASE)
@cases(500)
def test_policy_loss_is_the_reference(case: Case) -> None:
    draw = Random(case["seed"])
    B, T = case["B"], case["T"]
    logps, entropy = -2 * draw.normal(B, T).abs(), draw.normal(B, T).abs()
    real = DTYPES[case["dtype"]]
    values = loss_inputs(case, draw, logps, entropy)
    leaves = {"logps": logps, "entropy": entropy}
    if case["flat"]:
        values, leaves = flattened(values, B, T), {k: v.flatten() for k, v in leaves.items()}
    values = in_dtype(values, case, real)
    leaves = {k: v.to(real) for k, v in leaves.items()}
    config = loss_config(case)
    rest = (lambda x: ([x["logps"]], {"entropy": x["entropy"]}), values, config, case["upstream"])
    truth = truth_of(reference.policy_loss, leaves, *rest)
    assume(not near_a_decision(config, values, truth.out, leaves["entropy"]))
    ours, same = (call(f, leaves, *rest) for f in (grpo_ext.policy_loss, reference.policy_loss))
    compare(ours, same, truth, config, real, real, reach_of(logps))


@given(LOSS_CASE)
@cases(400)
def test_selective_log_softmax_is_the_reference(case: Case) -> None:
    draw = Random(case["seed"])
    logits, ids = logits_of(case, draw)
    real = torch.float64 if case["dtype"] == "fp64" else torch.float32
    upstream = [draw.normal(case["B"], case["T"]).to(real) for _ in range(2)]
    if case["flat"]:
        logits, ids, upstream = logits.flatten(0, 1), ids.flatten(), [u.flatten() for u in upstream]
    full, view = laid_out(logits, case)
    results = []
    for function, dtype in ((grpo_ext, full.dtype), (reference, full.dtype), (reference, torch.float64)):
        leaf = full.to(dtype).clone().requires_grad_()
        outputs = function.selective_log_softmax(view(leaf), ids, return_entropy=True, **case["transform"])
        torch.autograd.backward(outputs, [u.to(outputs[0].dtype) for u in upstream])
        assert leaf.grad is not None
        results.append((*(x.detach() for x in outputs), leaf.grad))
    x = reference.processed_logits(
        logits.double(), case["transform"].get("temperature", 1.0), case["transform"].get("logit_softcap"),
        case["transform"].get("logit_scale", 1.0),
    )  # fmt: skip
    unit = 16 * torch.finfo(real).eps * (1 + reach_of(x))
    for name, ours, same, truth in zip(("logp", "entropy", "gradient"), *results, strict=True):
        allowed = 2 * (same.double() - truth).abs().max() + unit * max(1.0, truth.abs().max().item())
        if name == "gradient":
            allowed += torch.finfo(full.dtype).eps * truth.abs().max() + torch.finfo(full.dtype).smallest_normal
        error = (ours.double() - truth).abs().max()
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------------------------------------


def assert_same_bits(name: str, first: Tensor | None, second: Tensor | None) -> None:
    if first is None or second is None:
        assert first is second, name
        return
    assert torch.equal(first, second), f"{name} differs by {(first.double() - second.double()).abs().max():.3g}"


def assert_same_results(first: Result, second: Result) -> None:
    for name in ("loss", "logps", "entropy", "kl"):
        assert_same_bits(name, getattr(first.out, name), getattr(second.out, name))
    for name, value in first.out.metrics.items():
        assert_same_bits(name, value, second.out.metrics[name])
    for name, grad in first.grads.items():
        assert_same_bits(f"gradient of {name}", grad, second.grads[name])


@given(LOSS_CASE)
@cases(150)
def test_a_repeated_call_gives_the_same_bits(case: Case) -> None:
    leaves, arguments, values, config, _ = loss_call(case)
    first, second = (call(grpo_ext.grpo_loss, leaves, arguments, values, config, case["upstream"]) for _ in range(2))
    assert_same_results(first, second)


@given(LOSS_CASE)
@cases(150)
def test_masked_rows_and_layout_change_no_bit(case: Case) -> None:
    """Zeros in the place of what masked rows hold, and dense rows: the result is the same."""
    leaves, arguments, values, config, _ = loss_call(case)
    (logits, ids), _ = arguments(leaves)
    m = values["mask"] != 0
    clean = torch.where(m.unsqueeze(-1), logits, 0.0).contiguous()
    clean_ids = torch.where(m, ids, 0)
    first = call(grpo_ext.grpo_loss, leaves, arguments, values, config, 1.0)
    again = call(grpo_ext.grpo_loss, {"logits": clean}, lambda x: ([x["logits"], clean_ids], {}), values, config, 1.0)
    (gradient, _), _ = arguments({"logits": first.grads["logits"]})
    assert_same_results(Result(first.out, {"logits": gradient}), again)


#: Losses whose terms are divided by a number that the caller gives: a sequence can be looked at by itself.
BY_ITSELF = st.sampled_from(("dapo", "cispo", "vespo"))


@given(LOSS_CASE, BY_ITSELF, st.integers(0, 4))
@cases(150)
def test_a_sequence_does_not_depend_on_its_neighbours(case: Case, loss_type: str, which: int) -> None:
    case = case | {"loss_type": loss_type, "num_items": 40, "flat": False}
    if case["quantile"] < 1:
        case = case | {"threshold_given": True}  # without one the threshold is of the whole batch
    which %= case["B"]
    leaves, arguments, values, config, _ = loss_call(case)
    (logits, ids), _ = arguments(leaves)
    together = call(grpo_ext.grpo_loss, leaves, arguments, values, config, 1.0)
    (gradient, _), _ = arguments({"logits": together.grads["logits"]})
    one = slice(which, which + 1)
    of_one = {k: v[one] if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()}
    alone = call(
        grpo_ext.grpo_loss, {"logits": logits[one]}, lambda x: ([x["logits"], ids[one]], {}), of_one, config, 1.0
    )
    for name in ("logps", "entropy", "kl"):
        ours = getattr(together.out, name)
        assert_same_bits(name, None if ours is None else ours[one], getattr(alone.out, name))
    assert_same_bits("gradient", gradient[one], alone.grads["logits"])


# ---------------------------------------------------------------------------------------------------------------------
# Does the hunt find anything?
# ---------------------------------------------------------------------------------------------------------------------


def _slightly(function: Callable[..., Tensor], factor: float = 1 + 1e-3) -> Callable[..., Tensor]:
    return lambda *args: function(*args) * factor


@pytest.mark.parametrize("name", ["kl_k3", "policy_term", "reduce_loss", "entropy_of", "log_probability", "log_ratio"])
def test_a_function_that_is_off_by_a_thousandth_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, name, _slightly(getattr(reference, name)))

    @given(LOSS_CASE)
    @cases(60, phases=(Phase.generate,), report_multiple_bugs=False)
    def hunt(case: Case) -> None:
        if case["dtype"] in ("fp64", "fp32"):
            check_grpo_loss(case)

    with pytest.raises(AssertionError, match=r"off by|should be"):
        hunt()


def test_decisions_are_rarely_near() -> None:
    """`near_a_decision` leaves cases out; were it most of them, the hunt would be a walk."""
    left_out = []

    @given(LOSS_CASE)
    @cases(150, phases=(Phase.generate,))
    def count(case: Case) -> None:
        leaves, arguments, values, config, _ = loss_call(case)
        out = call(reference.grpo_loss, leaves, arguments, values, config, 1.0).out
        left_out.append(near_a_decision(config, values, out, out.entropy))

    count()
    assert len(left_out) >= 100
    assert math.fsum(left_out) < 0.35 * len(left_out)
