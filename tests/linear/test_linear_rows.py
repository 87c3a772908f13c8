"""Which rows are looked at: independent of each other bit for bit, removed where nothing can come of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_cases import H, V, batch, head, loss_of
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import LossConfig


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["column", "expanded", "one sequence"])
def test_ids_and_mask_may_have_strides(device: torch.device, layout: str, masked: bool) -> None:
    """Such views are flattened without a copy; the kernels would read what lies between."""
    weight, _ = head(device)
    N = 6
    columns = torch.randint(0, V, (N, 3), device=device)
    ids = {"column": columns[:, 1], "expanded": columns[0, :1].expand(N), "one sequence": columns[:1, :1].expand(1, N)}
    ids, mask = ids[layout], None
    if masked:
        mask = (torch.rand(N, 2, device=device) < 0.6)[:, 0].view(ids.shape)
    results = []
    hidden = torch.randn(*ids.shape, H, device=device)
    for module in (grpo_ext, reference):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        # Not counting the rows, the kernels walk over the mask by themselves.
        known = {"valid_rows": N} if masked and module is grpo_ext else {}
        logps = module.linear_selective_log_softmax(*leaves, ids, mask=mask, **known)
        results.append([logps.detach(), *torch.autograd.grad(logps.sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, "float32"])
def test_a_row_does_not_depend_on_the_others(
    device: torch.device, dtype: torch.dtype, logits_dtype: str | None
) -> None:
    """Bit for bit: alone, among others, in another place, under other masks, beside NaN, with and without gradient."""
    weight, bias = head(device, dtype)
    N = 300  # more than one block on the CPU
    hidden, ids = torch.randn(N, H).to(device, dtype), torch.randint(0, V, (N,), device=device)

    def logps(hidden: Tensor, ids: Tensor, **options: Any) -> Tensor:
        out = grpo_ext.linear_selective_log_softmax(
            hidden, weight, ids, bias=bias, logits_dtype=logits_dtype, **options
        )
        assert isinstance(out, Tensor)
        return out.detach()

    together = logps(hidden, ids)
    for i in (0, 7, 299):
        assert torch.equal(logps(hidden[i : i + 1], ids[i : i + 1]), together[i : i + 1])
    assert torch.equal(logps(hidden[3:120], ids[3:120]), together[3:120])
    order = torch.randperm(N, device=device)
    assert torch.equal(logps(hidden[order], ids[order]), together[order])
    for share in (0.1, 0.5, 0.95):
        mask = torch.rand(N, device=device) < share
        assert torch.equal(logps(hidden, ids, mask=mask), torch.where(mask, together, 0.0))
        assert torch.equal(
            logps(hidden, ids, mask=mask, valid_rows=int(mask.sum()) + 3), torch.where(mask, together, 0.0)
        )
    others = hidden.clone()
    others[::2] = math.nan
    assert torch.equal(logps(others, ids)[1::2], together[1::2])
    assert torch.equal(logps(hidden.clone().requires_grad_(), ids), together)
    leaf = hidden.clone().requires_grad_()
    out = grpo_ext.linear_grpo_loss(
        leaf, weight, ids, torch.randn(N, device=device), torch.ones(N, device=device), LossConfig(), bias=bias,
        logits_dtype=logits_dtype,
    )  # fmt: skip
    assert torch.equal(out.logps, together)


def test_chunk_sizes_agree_to_rounding(device: torch.device) -> None:
    weight, _ = head(device)
    data = batch(device)
    results = [
        grpo_ext.linear_selective_log_softmax(data["hidden"], weight, data["ids"], memory_budget=budget)
        for budget in (None, 1 << 19, 1 << 16, 1)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_rows_without_a_gradient_leave_early(device: torch.device, products: dict[str, int], trained: bool) -> None:
    """Masked rows enter nothing, rows with advantage 0 no gradient product; with a KL term they do."""
    weight, _ = head(device)
    data = batch(device)
    data["advantages"][:2] = 0.0
    data["hidden"].requires_grad_()
    weight.requires_grad_(trained)
    valid, active = int(data["mask"].sum()), int(data["mask"][2:].sum())
    loss_of(data, weight).loss.backward()
    assert products == {"logits": valid, "back": active}
    products.update(logits=0, back=0)
    loss_of(data, weight, LossConfig(beta=0.1), ref_logps=torch.zeros(4, 50, device=device)).loss.backward()
    assert products == {"logits": valid, "back": valid}


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(importance_sampling_level="sequence")])
def test_clipped_rows_leave_early_on_the_cpu(products: dict[str, int], config: LossConfig) -> None:
    device = torch.device("cpu")
    weight, _ = head(device)
    weight.requires_grad_()
    data = batch(device)
    data["advantages"] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    data["hidden"].requires_grad_()
    logps = grpo_ext.linear_selective_log_softmax(data["hidden"].detach(), weight.detach(), data["ids"])
    assert isinstance(logps, Tensor)
    old = logps - torch.tensor([1.0, 0.0, 1.0, 0.0]).unsqueeze(1)  # sequence 0 is clipped, 2 pushes back
    products.update(logits=0, back=0)
    out = loss_of(data, weight, config, old_logps=old)
    out.loss.backward()
    assert products["back"] == int(data["mask"][1:].sum())
    grads = [data["hidden"].grad, weight.grad]
    data["hidden"] = data["hidden"].detach().requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    reference.linear_grpo_loss(
        data["hidden"], twin, data["ids"], data["advantages"], data["mask"], config, old_logps=old
    ).loss.backward()
    for ours, theirs in zip(grads, (data["hidden"].grad, twin.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 4)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
def test_no_rows_at_all(device: torch.device, shape: tuple[int, ...], trained: bool, loss_type: Any) -> None:
    """An empty batch, and one whose mask is 0 everywhere."""
    weight, bias = head(device)
    weight.requires_grad_(trained)
    hidden = torch.full((*shape, H), math.nan, device=device, requires_grad=True)
    ids = torch.full(shape, -100, device=device)
    zeros = torch.zeros(shape, device=device)
    out = grpo_ext.linear_grpo_loss(
        hidden, weight, ids, zeros if len(shape) == 1 else zeros[:, :1].sum(1), zeros, LossConfig(loss_type=loss_type),
        bias=bias,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    if trained:
        assert weight.grad is not None
        assert not weight.grad.any()
    logp = grpo_ext.linear_selective_log_softmax(hidden, weight, ids, mask=zeros)
    assert isinstance(logp, Tensor)
    logp.sum().backward()
    assert torch.equal(logp.detach(), zeros)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("budget", [None, 100_000])
def test_what_arrives_at_a_masked_row_is_ignored(device: torch.device, trained: bool, budget: int | None) -> None:
    """Its log probability is a 0 that no hidden state moves: a gradient of it, NaN even, goes nowhere."""
    weight, bias = head(device)
    data = batch(device)
    hidden = torch.where(data["mask"].unsqueeze(-1), data["hidden"], math.nan)
    up = torch.randn(data["mask"].shape, device=device)
    results = []
    for upstream in (up, torch.where(data["mask"], up, math.nan)):
        leaves = [t.clone().requires_grad_(trained or i == 0) for i, t in enumerate((hidden, weight, bias))]
        logp = grpo_ext.linear_selective_log_softmax(
            *leaves[:2], data["ids"], bias=leaves[2], mask=data["mask"], memory_budget=budget
        )
        assert isinstance(logp, Tensor)
        logp.backward(upstream)
        results.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert not results[0][0][~data["mask"]].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("trained", [False, True])
def test_a_nan_shows_and_stays_in_its_row(device: torch.device, trained: bool) -> None:
    weight, bias = head(device)
    bias[5] = -math.inf  # a token that is switched off
    data = batch(device)
    data["mask"][:] = True
    data["ids"][data["ids"] == 5] = 6
    data["hidden"][1, 3] = math.nan
    data["hidden"].requires_grad_()
    out = loss_of(data, weight.requires_grad_(trained), LossConfig(entropy_coef=0.01), bias=bias)
    out.loss.backward()
    assert out.loss.isnan()
    assert out.metrics["nonfinite_tokens"] == 1
    bad = torch.zeros(4, 50, dtype=torch.bool, device=device)
    bad[1, 3] = True
    assert torch.equal(out.logps.isnan(), bad)
    assert data["hidden"].grad is not None
    assert torch.equal(data["hidden"].grad.isnan().any(-1), bad)


def test_more_rows_than_sixteen_bits_count(device: torch.device) -> None:
    """One sequence of 70,001 tokens."""
    N = 70_001
    hidden, weight = torch.randn(N, 3, device=device), torch.randn(7, 3, device=device)
    ids, mask = torch.randint(0, 7, (N,), device=device), torch.rand(N, device=device) > 0.2
    A = torch.randn(N, device=device)
    grads = []
    for module in (grpo_ext, reference):
        leaf = hidden.clone().requires_grad_()
        module.linear_grpo_loss(leaf, weight, ids, A, mask, LossConfig(loss_type="grpo")).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-8)
