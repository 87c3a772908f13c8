"""Dtypes, autocast, tied and partly frozen heads, gradient buffers, gathering."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import H, V, batch, head, loss_of
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import LossConfig
from grpo_ext.linear.routes import select_route


def test_fp16_gradients_wait_for_the_loss_scale(device: torch.device) -> None:
    """With many tokens and a large vocabulary the elements of the logits' gradient are below fp16's range."""
    weight, _ = head(device, torch.float16)
    data = batch(device, dtype=torch.float16)
    config, items, scale = LossConfig(), {"num_items_in_batch": 1_000_000}, 2.0**16

    def grads(module: Any, dtype: torch.dtype, upstream: float, **options: Any) -> list[Tensor]:
        leaves = [data["hidden"].to(dtype, copy=True), weight.to(dtype, copy=True)]
        for leaf in leaves:
            leaf.requires_grad_()
        out = module.linear_grpo_loss(
            *leaves, data["ids"], data["advantages"], data["mask"], config, **items, **options
        )
        (out.loss * upstream).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    truth = grads(reference, torch.float32, scale)
    for ours in (
        grads(grpo_ext, torch.float16, scale),
        grads(grpo_ext, torch.float16, 1.0, grad_scale=scale),
    ):
        for a, b in zip(ours, truth, strict=True):
            assert (a.float() - b).norm() <= 5e-3 * b.norm()


@pytest.mark.parametrize("parts", [(0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_any_part_may_be_frozen(device: torch.device, parts: tuple[int, ...], level: Any) -> None:
    data = batch(device)
    weight, bias = head(device)
    config = LossConfig(importance_sampling_level=level)
    grads = []
    for module in (grpo_ext, reference):
        leaves = [t.clone().requires_grad_(bool(p)) for t, p in zip((data["hidden"], weight, bias), parts, strict=True)]
        module.linear_grpo_loss(
            leaves[0], leaves[1], data["ids"], data["advantages"], data["mask"], config, bias=leaves[2]
        ).loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_with_master_weights(device: torch.device, trained: bool) -> None:
    """fp32 weights under bf16 autocast: products in bf16, gradients in fp32, as exact as torch's."""
    weight, bias = head(device)
    data = batch(device)

    def run(ours: bool, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).clone().requires_grad_(trained or i == 0) for i, t in enumerate((data["hidden"], weight))]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float64):
            module = grpo_ext if ours else reference
            out = module.linear_grpo_loss(
                *leaves, data["ids"], data["advantages"].to(dtype), data["mask"], LossConfig(), bias=bias.to(dtype)
            )
        out.loss.backward()
        return [out.logps] + [leaf.grad for leaf in leaves if leaf.grad is not None]

    truth, ours, theirs = run(False, torch.float64), run(True, torch.float32), run(False, torch.float32)
    for exact, a, b in zip(truth, ours, theirs, strict=True):
        assert a.dtype == torch.float32
        floor = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_logits_are_not_rounded(device: torch.device, dtype: torch.dtype) -> None:
    weight, _ = head(device, dtype)
    hidden, ids = torch.randn(64, H).to(device, dtype), torch.randint(0, V, (64,), device=device)
    exact = reference.linear_selective_log_softmax(hidden.double(), weight.double(), ids)
    for name in ("float32", torch.float32):
        got = grpo_ext.linear_selective_log_softmax(hidden, weight, ids, logits_dtype=name)
        assert (got - exact).abs().max() <= 1e-5
    select_route("logits")  # bf16 probabilities come from logits that nobody rounds
    try:
        rounded = grpo_ext.linear_selective_log_softmax(hidden, weight, ids)
    finally:
        select_route("auto")
    assert (rounded - exact).abs().max() > 1e-4


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tied_embeddings(device: torch.device, level: Any) -> None:
    """The head is the embedding: its gradient is the sum of both uses."""
    grads = []
    data = batch(device)
    for module in (grpo_ext, reference):
        torch.manual_seed(0)
        embedding = torch.randn(V, H).to(device).mul_(0.3).requires_grad_()
        hidden = torch.tanh(F.embedding(data["ids"].roll(1, 1), embedding))
        module.linear_grpo_loss(
            hidden, embedding, data["ids"], data["advantages"], data["mask"],
            LossConfig(importance_sampling_level=level),
        ).loss.backward()  # fmt: skip
        grads.append(embedding.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LossConfig(), LossConfig(importance_sampling_level="sequence")])
def test_accumulation_into_a_given_buffer(device: torch.device, dtype: torch.dtype, config: LossConfig) -> None:
    weight, _ = head(device, dtype)
    weight.requires_grad_()
    data = batch(device, dtype=dtype)
    options = {"memory_budget": 20_000, "old_logps": torch.full((4, 50), -7.0, device=device)}
    loss_of(data, weight, config, **options).loss.backward()
    assert weight.grad is not None
    expected, weight.grad = weight.grad.float(), None
    buffer = torch.ones(V, H, device=device)
    for _ in range(2):
        loss_of(data, weight, config, weight_grad=buffer, **options).loss.backward()
    assert weight.grad is None
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close((buffer - 1) / 2, expected, **tolerance)
    buffer.zero_()
    logp = grpo_ext.linear_selective_log_softmax(data["hidden"], weight, data["ids"], weight_grad=buffer)
    assert isinstance(logp, Tensor)
    (3 * logp.sum()).backward()
    twin = weight.detach().clone().requires_grad_()
    (3 * grpo_ext.linear_selective_log_softmax(data["hidden"], twin, data["ids"]).sum()).backward()
    torch.testing.assert_close(buffer, twin.grad.float(), rtol=2e-2, atol=1e-3 * float(buffer.abs().max()))


def test_a_given_buffer_wants_an_upstream_gradient_of_one() -> None:
    device = torch.device("cpu")
    weight, _ = head(device)
    loss = loss_of(batch(device), weight.requires_grad_(), weight_grad=torch.zeros(V, H)).loss
    with pytest.raises(RuntimeError, match="grad_scale"):
        (loss * 2).backward()


def test_gather_hook(device: torch.device) -> None:
    """A head that is whole inside the context only: filled in place, or handed out."""
    full, _ = head(device)
    data = batch(device)
    config = LossConfig(importance_sampling_level="sequence")

    def gradients(weight: Tensor, gather: Any = None) -> list[Tensor]:
        """Of a loss whose backward needs no head, and of entropies, whose backward makes the logits again."""
        leaf = data["hidden"].clone().requires_grad_()
        loss = loss_of(data | {"hidden": leaf}, weight, config, gather=gather).loss
        logp, entropy = grpo_ext.linear_selective_log_softmax(
            leaf, weight, data["ids"], mask=data["mask"], return_entropy=True, gather=gather
        )
        return [*torch.autograd.grad(loss, leaf), *torch.autograd.grad(logp.sum() + 2 * entropy.sum(), leaf)]

    expected = gradients(full)
    entered = []

    @contextlib.contextmanager
    def filled(weight: Tensor, bias: Tensor | None) -> Iterator[None]:
        entered.append("filled")
        weight.data = full
        yield
        weight.data = full.new_empty(0)

    @contextlib.contextmanager
    def handed(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        entered.append("handed")
        yield full, bias

    for gather in (filled, handed):
        for ours, theirs in zip(gradients(full.new_empty(0), gather), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert {"filled", "handed"} == set(entered)
    with pytest.raises(ValueError, match="gather="):
        loss_of(data, full.new_empty(0))


def test_valid_rows_must_hold_all_of_them() -> None:
    device = torch.device("cpu")
    data, (weight, _) = batch(device), head(device)
    with pytest.raises(RuntimeError, match="valid_rows"):
        loss_of(data, weight, valid_rows=int(data["mask"].sum()) - 1)


def test_sliced_hidden_states_and_heads(device: torch.device) -> None:
    """hidden[:, :-1] and a head that is a part of something larger."""
    weight, _ = head(device)
    data = batch(device)
    wide = torch.randn(V, H + 5, device=device)
    wide[:, :H] = weight
    whole = torch.cat([data["hidden"], data["hidden"][:, :1]], dim=1)
    expected = grpo_ext.linear_selective_log_softmax(data["hidden"], weight, data["ids"])
    got = grpo_ext.linear_selective_log_softmax(whole[:, :-1], wide[:, :H], data["ids"])
    torch.testing.assert_close(got, expected)
