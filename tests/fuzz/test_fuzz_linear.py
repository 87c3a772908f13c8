"""Losses from hidden states on random shapes, chunk sizes, dtypes and parameters, against the reference."""

from __future__ import annotations

from typing import Any

import torch
from fuzz_cases import (
    DTYPES,
    POLICY,
    SHAPE,
    Random,
    call,
    cases,
    compare,
    in_dtype,
    loss_config,
    loss_inputs,
    near_a_decision,
    truth_of,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.linear.plan import row_stride

Case = dict[str, Any]

LINEAR = {
    # fp32 and fp64: in half precision the rounding of the logits decides, and tests/linear looks at that.
    "dtype": st.sampled_from(("fp64", "fp32")),
    "H": st.integers(1, 9),
    "V": st.integers(1, 70),
    "bias": st.booleans(),
    "trained": st.sampled_from(((), ("weight",), ("weight", "bias"))),
    "budget_rows": st.none() | st.integers(1, 20),
}
LINEAR_CASE = st.fixed_dictionaries(POLICY | SHAPE | LINEAR)


def parts(case: Case) -> tuple[Random, dict[str, Tensor], Tensor]:
    """Hidden states, head and bias of a case, and the ids."""
    draw = Random(case["seed"])
    real = DTYPES[case["dtype"]]
    tensors = {
        "hidden": draw.normal(case["B"], case["T"], case["H"]).to(real),
        "weight": draw.normal(case["V"], case["H"]).to(real),
    }
    if case["bias"]:
        tensors["bias"] = draw.normal(case["V"]).to(real)
    return draw, tensors, draw.integers(case["V"], case["B"], case["T"])


@given(LINEAR_CASE)
@cases(400)
def test_linear_grpo_loss_is_the_reference(case: Case) -> None:
    draw, tensors, ids = parts(case)
    double = {k: v.double() for k, v in tensors.items()}
    new, entropy = reference.linear_selective_log_softmax(
        double["hidden"], double["weight"], ids, bias=double.get("bias"), return_entropy=True, **case["transform"]
    )
    values = in_dtype(loss_inputs(case, draw, new, entropy), case, tensors["hidden"].dtype)
    config = loss_config(case)
    trained = ("hidden", *(name for name in case["trained"] if name in tensors))
    leaves = {name: tensors[name] for name in trained}

    def arguments(x: dict[str, Tensor]) -> tuple[list[Any], dict[str, Any]]:
        like = {k: v.to(x["hidden"].dtype) for k, v in tensors.items()} | x
        return [like["hidden"], like["weight"], ids], {"bias": like.get("bias")}

    rest = (arguments, values, config, case["upstream"])
    truth = truth_of(reference.linear_grpo_loss, leaves, *rest)
    assume(not near_a_decision(config, values, truth.out, truth.out.entropy))
    budget = None
    if case["budget_rows"] is not None:
        budget = case["budget_rows"] * (128 + row_stride(case["H"])) * tensors["hidden"].element_size()
    ours = call(grpo_ext.linear_grpo_loss, leaves, *rest, memory_budget=budget)
    same = call(reference.linear_grpo_loss, leaves, *rest)
    real = tensors["hidden"].dtype
    size = (double["hidden"] @ double["weight"].T).abs().max().item() + case["H"]
    factor = case["transform"].get("logit_scale", 1.0) / case["transform"].get("temperature", 1.0)
    compare(ours, same, truth, config, real, real, 4 * size * max(1.0, abs(factor)))


@given(LINEAR_CASE)
@cases(150)
def test_linear_selective_log_softmax_is_the_reference(case: Case) -> None:
    draw, tensors, ids = parts(case)
    m = draw.uniform(case["B"], case["T"]) < case["mask_share"]
    real = tensors["hidden"].dtype
    upstream = [draw.normal(case["B"], case["T"]) for _ in range(2)]
    results = []
    for function, dtype in ((grpo_ext, real), (reference, real), (reference, torch.float64)):
        x = {k: v.to(dtype).clone().requires_grad_() for k, v in tensors.items()}
        outputs = function.linear_selective_log_softmax(
            x["hidden"], x["weight"], ids, bias=x.get("bias"), mask=m, return_entropy=True, **case["transform"]
        )
        torch.autograd.backward(outputs, [u.to(dtype) for u in upstream])
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in x.values()]
        results.append([o.detach() for o in outputs] + grads)
    factor = case["transform"].get("logit_scale", 1.0) / case["transform"].get("temperature", 1.0)
    size = 4 * (10 + 4 * case["H"]) * max(1.0, abs(factor))
    for ours, same, truth in zip(*results, strict=True):
        scale = max(1.0, truth.abs().max().item())
        allowed = 2 * (same.double() - truth).abs().max() + 16 * torch.finfo(real).eps * (1 + size) * scale
        error = (ours.double() - truth).abs().max()
        assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


@given(LINEAR_CASE)
@cases(50)
def test_a_repeated_linear_call_gives_the_same_bits(case: Case) -> None:
    draw, tensors, ids = parts(case)
    new = -draw.normal(case["B"], case["T"]).abs()
    values = in_dtype(loss_inputs(case, draw, new, new.abs()), case, tensors["hidden"].dtype)
    runs = [
        call(
            grpo_ext.linear_grpo_loss,
            tensors,
            lambda x: ([x["hidden"], x["weight"], ids], {"bias": x.get("bias")}),
            values,
            loss_config(case),
            case["upstream"],
        )
        for _ in range(2)
    ]
    first, second = runs
    assert torch.equal(first.out.loss, second.out.loss)
    assert torch.equal(first.out.logps, second.out.logps)
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name]), name
