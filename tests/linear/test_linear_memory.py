"""Products read only memory that was written: padding between rows and behind them included."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from operands_in_reach import Products, check, rows_are_apart
from poisoned_memory import poisoned
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import LossConfig
from grpo_ext.linear.head import Head, padded_rows
from grpo_ext.linear.plan import Numerics, row_stride
from grpo_ext.linear.routes import select_route
from grpo_ext.linear.routes.base import Route

#: Neither vocabulary nor hidden size is a multiple of 32; the numbers of rows are none either.
SIZES = [(500, 33), (1001, 584)]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield
    select_route("auto")


def inputs(vocab: int, size: int, dtype: torch.dtype, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(3, 43, size).to(dtype).requires_grad_()
    weight = (2 * torch.randn(vocab, size) / size**0.5).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randint(0, vocab, (3, 43))


ADVANTAGES = torch.tensor([1.0, 0.0, -0.7])
MASK = torch.arange(43) < torch.tensor([[43], [20], [37]])


@pytest.mark.parametrize("route", ["logits", "probabilities"])
@pytest.mark.parametrize("rows", [None, 40])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("vocab", "size"), SIZES)
def test_operands_have_no_unwritten_bytes_in_reach(
    vocab: int, size: int, dtype: torch.dtype, trained: bool, rows: int | None, route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    select_route(route)
    hidden, weight, ids = inputs(vocab, size, dtype, trained)
    budget = None if rows is None else rows * (row_stride(vocab) + row_stride(size)) * dtype.itemsize
    products = Products(monkeypatch, apart=route == "logits")
    for config in (LossConfig(), LossConfig(loss_type="vespo"), LossConfig(entropy_coef=0.1)):
        grpo_ext.linear_grpo_loss(
            hidden, weight, ids, ADVANTAGES, MASK, config, memory_budget=budget, grad_scale=2.0
        ).loss.backward()
    logps, entropy = grpo_ext.linear_selective_log_softmax(
        hidden, weight, ids, mask=MASK, return_entropy=True, memory_budget=budget
    )
    (logps.sum() + entropy.sum()).backward()
    assert len(products.names) >= 8


def test_rounded_gradients_have_none_either() -> None:
    """The buffer of fp32 logits with a product in bf16, which only GPUs have."""
    numerics = Numerics([1.0, 0.0, 1.0], torch.bfloat16, torch.float32, None, None)
    head = Head(torch.randn(500, 33).bfloat16(), None, numerics, 43)
    gradient = head.in_compute_dtype(torch.randn(43, 500))
    assert rows_are_apart(gradient)
    check("factor", gradient, head.weight)


def test_the_check_sees_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.empty(4, 512), torch.randn(500, 7)
    a[:, :500] = 1
    Products(monkeypatch)
    with pytest.raises(AssertionError, match=r"mm: left operand \(4, 500\), strides \(512, 1\).*NaN in reach"):
        torch.mm(a[:, :500], b)
    with pytest.raises(AssertionError, match="reaches the next one"):
        torch.mm(torch.zeros(4, 33).bfloat16(), torch.zeros(33, 2).bfloat16())
    assert not padded_rows(a, 4, 500, 512)[:, 500:].isnan().any()
    torch.mm(padded_rows(a, 4, 500, 512).fill_(1.0), b)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("vocab", "size"), SIZES)
def test_bf16_gradients_against_fp64(device: torch.device, vocab: int, size: int, trained: bool) -> None:
    """A read of unwritten padding gives NaN on a processor with AMX."""
    leaves = inputs(vocab, size, torch.bfloat16, trained)
    config = LossConfig()

    def step(function: Any, dtype: torch.dtype) -> list[Tensor]:
        hidden, weight = (t.detach().to(device, dtype).requires_grad_(t.requires_grad) for t in leaves[:2])
        given = (t.to(device) for t in (leaves[2], ADVANTAGES, MASK))
        out = function(hidden, weight, *given, config)
        out.loss.backward()
        return [out.logps, *(leaf.grad for leaf in (hidden, weight) if leaf.requires_grad)]

    ours, plain, exact = (
        step(*how)
        for how in (
            (grpo_ext.linear_grpo_loss, torch.bfloat16),
            (reference.linear_grpo_loss, torch.bfloat16),
            (reference.linear_grpo_loss, torch.float64),
        )
    )
    for got, torchs, truth in zip(ours, plain, exact, strict=True):
        assert got.isfinite().all()
        assert (got - truth).abs().max() <= 2 * (torchs - truth).abs().max() + 1e-6 * truth.abs().max()


@pytest.mark.parametrize(("vocab", "size"), SIZES)
def test_a_nan_row_leaves_its_neighbours_alone(device: torch.device, vocab: int, size: int) -> None:
    hidden, weight, ids = (t.detach().to(device) for t in inputs(vocab, size, torch.bfloat16, False))
    expected = grpo_ext.linear_selective_log_softmax(hidden, weight, ids)
    hidden[1, 20] = torch.nan
    got = grpo_ext.linear_selective_log_softmax(hidden, weight, ids)
    here = torch.zeros(3, 43, dtype=torch.bool, device=device)
    here[1, 20] = True
    assert torch.equal(got.isnan(), here)
    assert torch.equal(got[~here], expected[~here])


@pytest.mark.parametrize("route", ["logits", "probabilities"])
@pytest.mark.parametrize("trained", [False, True])
def test_buffers_go_with_their_call(route: str, trained: bool) -> None:
    """No reference cycle keeps a route, and with it 1.2 GiB on a GPU, until the garbage collector runs."""
    select_route(route)
    hidden, weight, ids = inputs(500, 33, torch.float32, trained)
    gc.collect()
    gc.disable()
    try:
        for config in (LossConfig(), LossConfig(loss_type="vespo"), LossConfig(entropy_coef=0.1)):
            grpo_ext.linear_grpo_loss(hidden, weight, ids, ADVANTAGES, MASK, config).loss.backward()
        logps, entropy = grpo_ext.linear_selective_log_softmax(hidden, weight, ids, mask=MASK, return_entropy=True)
        (logps.sum() + entropy.sum()).backward()
        assert not [kept for kept in gc.get_objects() if isinstance(kept, Route)]
    finally:
        gc.enable()
