"""Tokens far below a float's range of probabilities on the probability route: right, with their gradients.

On the CPU on the plain-torch kernels, on a Hopper GPU on its own in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_linear_probabilities import served_here
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import LossConfig
from grpo_ext.linear.routes import select_route

#: Natural logarithm; -44 is where a tile is recentred, -69 where exponents were once cut off.
DEPTHS = (0.0, 30.0, 44.0, 60.0, 69.0, 70.0, 90.0, 225.0, 1000.0, 1e4)
B, H = 4, 16
T = 2 * len(DEPTHS)


@pytest.fixture(autouse=True)
def _on_this_route(device: torch.device) -> Iterator[None]:
    if not served_here(device):
        pytest.skip("needs a Hopper GPU")
    select_route("probabilities")
    yield
    select_route("auto")


def inputs(device: torch.device, dtype: torch.dtype, vocab: int = 1001) -> dict[str, Tensor]:
    """Completions of tokens as improbable as DEPTHS: their own logit is far below all others, or one logit is far
    above theirs."""
    if device.type == "cuda" and dtype != torch.bfloat16:
        pytest.skip("the kernels are for bf16")
    hidden, weight = 0.5 * torch.randn(B, T, H), torch.randn(vocab, H)
    weight[:, :2] = 0
    weight[::2, 0] = -1.0  # the even tokens
    weight[vocab // 2 | 1, 1] = 1.0
    ids = torch.randint(0, vocab // 4, (B, T)) * 2
    depths = torch.tensor(DEPTHS)
    hidden[..., :2] = 0
    hidden[:, : len(DEPTHS), 0] = depths
    hidden[:, len(DEPTHS) :, 1] = depths
    mask = torch.rand(B, T) > 0.2
    return {
        "hidden": hidden.to(device, dtype), "weight": weight.to(device, dtype), "ids": ids.to(device),
        "mask": mask.to(device), "advantages": torch.randn(B).to(device),
    }  # fmt: skip


def exact_logps(data: dict[str, Tensor], **options: Any) -> Tensor:
    return reference.linear_selective_log_softmax(
        data["hidden"].double(), data["weight"].double(), data["ids"], **options
    )


def assert_near(logps: Tensor, exact: Tensor) -> None:
    error = (logps.double() - exact).abs()
    assert (error <= 2e-5 + 1e-6 * exact.abs()).all(), (error.max(), exact[error == error.max()])


def assert_gradients(ours: list[Tensor], same_dtype: list[Tensor], truth: list[Tensor], slack: float) -> None:
    """At most twice the error of torch in the same dtype, and the share `slack` of the gradient."""
    for mine, theirs, right in zip(ours, same_dtype, truth, strict=True):
        error, allowed = (mine.double() - right).norm(), (theirs.double() - right).norm()
        assert error <= 2 * allowed + slack * right.norm()


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("vocab", [9, 256, 1001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities(device: torch.device, dtype: torch.dtype, vocab: int) -> None:
    data = inputs(device, dtype, vocab)
    exact, exact_entropy = exact_logps(data, return_entropy=True)
    logps, entropy = grpo_ext.linear_selective_log_softmax(
        data["hidden"], data["weight"], data["ids"], return_entropy=True
    )
    assert exact.min() < -9000
    assert_near(logps, exact)
    assert (entropy.double() - exact_entropy).abs().max() <= 2e-5
    masked = grpo_ext.linear_selective_log_softmax(data["hidden"], data["weight"], data["ids"], mask=data["mask"])
    assert torch.equal(masked, torch.where(data["mask"], logps, 0.0))


@pytest.mark.parametrize("rows", [None, 16])  # of a chunk on the CPU; None: all, and E is kept for backward
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7, "logit_scale": -1.3}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_log_probabilities(
    device: torch.device, dtype: torch.dtype, transform: dict[str, float], trained: bool, rows: int | None
) -> None:
    data = inputs(device, dtype)
    data["hidden"][..., :2] *= math.copysign(1, transform.get("logit_scale", 1.0))
    upstream = torch.rand(B, T, dtype=torch.float64).to(device) + 0.5
    budget = None if rows is None else rows * (1024 + H) * dtype.itemsize

    def gradients(module: Any, lift: torch.dtype, **options: Any) -> tuple[Tensor, list[Tensor]]:
        leaves = [
            data["hidden"].to(lift).clone().requires_grad_(), data["weight"].to(lift).clone().requires_grad_(trained)
        ]  # fmt: skip
        logps = module.linear_selective_log_softmax(*leaves, data["ids"], mask=data["mask"], **transform, **options)
        logps.backward(upstream.to(logps.dtype))
        return logps.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    exact, truth = gradients(reference, torch.float64)
    logps, ours = gradients(grpo_ext, dtype, memory_budget=budget)
    assert_near(logps, exact)
    slack = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 0.0}[dtype]
    assert_gradients(ours, gradients(reference, dtype)[1], truth, slack)
    rows_of = [t[0].double().flatten(0, 1) for t in (ours, truth)]
    size = rows_of[1].norm(dim=1).clamp(min=1e-3)
    assert ((rows_of[0] - rows_of[1]).norm(dim=1) / size).max() <= (2e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("rows", [None, 32])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(device: torch.device, dtype: torch.dtype, level: Any, trained: bool, rows: int | None) -> None:
    """Old and reference log probabilities from elsewhere: ratios and KL terms are those of fp64."""
    data = inputs(device, dtype)
    exact = exact_logps(data)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    old, ref = (exact + 0.1 * torch.randn(B, T).to(device, torch.float64) for _ in range(2))
    config = LossConfig(beta=0.1, importance_sampling_level=level)
    budget = None if rows is None else rows * (1024 + H) * dtype.itemsize

    def step(module: Any, lift: torch.dtype, **options: Any) -> tuple[Any, list[Tensor]]:
        leaves = [
            data["hidden"].to(lift).clone().requires_grad_(), data["weight"].to(lift).clone().requires_grad_(trained)
        ]  # fmt: skip
        real = torch.float64 if lift == torch.float64 else torch.float32
        out = module.linear_grpo_loss(
            *leaves, data["ids"], data["advantages"].to(real), data["mask"], config, old_logps=old.to(wide).to(real),
            ref_logps=ref.to(wide).to(real), **options,
        )  # fmt: skip
        out.loss.backward()
        return out, [leaf.grad for leaf in leaves if leaf.grad is not None]

    truth, right = step(reference, torch.float64)
    ours, got = step(grpo_ext, dtype, memory_budget=budget)
    assert_near(ours.logps[data["mask"]], exact[data["mask"]])
    # At a log probability of -1e4 the last bit of fp32 is 1e-3 of a ratio.
    torch.testing.assert_close(ours.loss.double(), truth.loss.detach(), rtol=1e-3, atol=1e-3)
    slack = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 0.0}[dtype]
    assert_gradients(got, step(reference, dtype)[1], right, slack)
    for mine, exactly in zip(got, right, strict=True):
        assert (mine.double() - exactly).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-3) * exactly.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_of_a_likely_token_depends_on_an_improbable_one(device: torch.device, dtype: torch.dtype) -> None:
    data = inputs(device, dtype)
    alike = data["hidden"].clone()
    alike[..., :2] = 0
    ordinary = (data["hidden"] == alike).all(dim=2)
    assert 0 < ordinary.sum() < ordinary.numel()
    results = []
    for hidden in (data["hidden"], alike):
        leaf = hidden.clone().requires_grad_()
        logps, entropy = grpo_ext.linear_selective_log_softmax(leaf, data["weight"], data["ids"], return_entropy=True)
        logps.sum().backward()
        results.append((logps.detach(), entropy.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[ordinary], other[ordinary])
        assert not torch.equal(one, other)


def test_no_bit_depends_on_another_policy(device: torch.device) -> None:
    """Old log probabilities, right or wrong, change no log probability: the ratio of an unchanged policy is 1."""
    data = inputs(device, torch.bfloat16)
    alone = grpo_ext.linear_selective_log_softmax(data["hidden"], data["weight"], data["ids"])
    assert isinstance(alone, Tensor)
    for old in (alone - 0.3, torch.full_like(alone, -100.0), torch.full_like(alone, -1e6), torch.full_like(alone, 1e6)):
        for name in ("old_logps", "sampling_logps"):
            out = grpo_ext.linear_grpo_loss(
                data["hidden"], data["weight"], data["ids"], data["advantages"], torch.ones_like(data["mask"]),
                LossConfig(), **{name: old},
            )  # fmt: skip
            assert torch.equal(out.logps, alone)


@pytest.mark.parametrize("level", [-300.0, 0.0, 300.0])
def test_a_target_switched_off(device: torch.device, level: float) -> None:
    """-inf, with the entropy of the others, wherever their logits lie. Infinite states and logits show as NaN."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    data = inputs(device, dtype)
    data["hidden"][..., :2] = 0
    bias = torch.full((1001,), level, device=device, dtype=dtype)
    bias[256:512] = -math.inf  # a whole tile
    bias[0] = -math.inf
    data["ids"][:, ::2] = 0
    logps, entropy = grpo_ext.linear_selective_log_softmax(
        data["hidden"], data["weight"], data["ids"], bias=bias, return_entropy=True
    )
    exact, exact_entropy = exact_logps(data, bias=bias.double(), return_entropy=True)
    off = (data["ids"] == 0) | ((data["ids"] >= 256) & (data["ids"] < 512))
    assert (logps[off] == -math.inf).all()
    assert (logps[~off] - exact[~off]).abs().max() <= 5e-5  # 300 + a logit has as many bits as fp32
    assert (entropy - exact_entropy).abs().max() <= 5e-5
    data["hidden"][2, 3, 1] = math.inf
    spoilt = grpo_ext.linear_selective_log_softmax(data["hidden"], data["weight"], data["ids"], bias=bias)
    assert isinstance(spoilt, Tensor)
    assert spoilt[2, 3].isnan()
    spoilt[2, 3] = logps[2, 3]
    assert torch.equal(spoilt, logps)
    bias[600] = math.inf
    spoilt = grpo_ext.linear_selective_log_softmax(data["hidden"], data["weight"], data["ids"], bias=bias)
    assert isinstance(spoilt, Tensor)
    assert spoilt.isnan().all()
