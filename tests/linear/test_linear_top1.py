"""Whether a token has the greatest logit of its row, on both routes: ties, edges, and nothing else changes by a bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from linear_cases import budget_of
from test_linear_matches_reference import skip_fp64_on_gpu
from torch import Tensor

from grpo_ext._ops import logit_transform
from grpo_ext.linear.arguments import wanted_gradients
from grpo_ext.linear.logps import Request, linear_logps
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes import select_route

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@pytest.fixture(params=["logits", "probabilities"], autouse=True)
def _route(request: pytest.FixtureRequest) -> Iterator[None]:
    """`probabilities`: where that route takes the call."""
    select_route(request.param)
    yield
    select_route("auto")


def scored(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mask: Tensor | None = None, *,
    temperature: float = 2.0, softcap: float | None = None, scale: float = 1.0, budget: int | None = None,
    with_top1: bool = True, valid_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    transform = logit_transform(temperature, softcap, scale)
    numerics = Numerics(transform, hidden.dtype, hidden.dtype, budget, None)
    request = Request(numerics, wanted_gradients(hidden, weight, bias), True, False, valid_rows, None, with_top1)
    return linear_logps(hidden, weight, bias, ids, mask, None, None, request)


def example(
    device: torch.device, dtype: torch.dtype = torch.float32, rows: int = 120, vocab: int = 517
) -> list[Tensor]:
    """Hidden states, head, bias and ids. All logits are whole numbers, exact in any dtype, and the greatest of a row is
    seldom alone; the ids are its first column, its last one, and any."""
    g = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randint(-1, 2, (n, 16), generator=g) for n in (rows, vocab))
    bias = torch.randint(-1, 2, (vocab,), generator=g)
    logits = hidden @ weight.t() + bias
    last = vocab - 1 - logits.flip(1).argmax(1)
    ids = torch.where(torch.arange(rows) % 3 == 0, logits.argmax(1), last)
    ids = torch.where(torch.arange(rows) % 3 == 2, torch.randint(0, vocab, (rows,), generator=g), ids)
    return [*(t.to(device, dtype) for t in (hidden, weight, bias)), ids.to(device)]


def expected(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: float = 1.0) -> Tensor:
    logits = hidden.cpu().double() @ weight.cpu().double().t()
    logits = logits if bias is None else logits + bias.cpu().double()
    return ((scale * logits).argmax(1) == ids.cpu()).to(ids.device)


@pytest.mark.parametrize("trained", ["", "hidden", "weight"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (-1.0, None), (0.5, 20.0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equal_logits(
    dtype: str, masked: bool, scale: float, softcap: float | None, trained: str, device: torch.device
) -> None:
    skip_fp64_on_gpu(dtype, device)
    hidden, weight, bias, ids = example(device, DTYPES[dtype])
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    mask = torch.arange(120, device=device) % 5 != 1 if masked else None
    right = expected(hidden, weight, bias, ids, scale)
    assert scale < 0 or 40 <= int(right.sum()) < 70  # most of the last columns are not the first
    for budget in (None, budget_of(16, 517, 16, DTYPES[dtype])):
        logps, _, found = scored(hidden, weight, bias, ids, mask, scale=scale, softcap=softcap, budget=budget)
        assert torch.equal(found, right if mask is None else right & mask)
        assert not found.requires_grad
        assert logps.requires_grad == bool(trained)


@pytest.mark.parametrize("trained", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_else_changes(dtype: str, trained: tuple[int, ...], device: torch.device) -> None:
    skip_fp64_on_gpu(dtype, device)
    *tensors, ids = example(device, DTYPES[dtype])
    leaves = [tensor.mul_(0.7).requires_grad_(number in trained) for number, tensor in enumerate(tensors)]
    for budget in (None, budget_of(16, 517, 16, DTYPES[dtype])):
        results: list[list[Any]] = []
        for with_top1 in (False, True):
            logps, entropy, is_top1 = scored(*leaves, ids, budget=budget, with_top1=with_top1)
            assert is_top1.shape == (ids.shape if with_top1 else (0,))
            upstream = torch.linspace(-1, 2, ids.numel(), device=device, dtype=logps.dtype)
            gradients = torch.autograd.grad((logps * upstream).sum(), [leaves[i] for i in trained]) if trained else ()
            results.append([logps, entropy, *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 0.53, 0.56, 0.6])
def test_a_token_far_below_the_greatest(temperature: float, device: torch.device) -> None:
    """Exponents beyond the range of a tile's sum, which become relative to a logit near the tile's greatest."""
    hidden, weight, bias, ids = example(device, torch.bfloat16)
    hidden = hidden * 16
    least = (hidden.float() @ weight.float().t() + bias.float()).argmin(1)
    for tokens in (ids, least, least.new_full(least.shape, 0)):
        found = scored(hidden, weight, bias, tokens, temperature=temperature)[2]
        assert torch.equal(found, expected(hidden, weight, bias, tokens))


def test_tokens_switched_off(device: torch.device) -> None:
    hidden, weight, bias, ids = example(device)
    bias[::2] = -math.inf
    found = scored(hidden, weight, bias, ids)[2]
    assert torch.equal(found, expected(hidden, weight, bias, ids))
    assert not found[ids % 2 == 0].any()
    assert found.any()


def test_masked_rows_within_the_bound_have_no_greatest_logit(device: torch.device) -> None:
    hidden, weight, bias, ids = example(device)
    mask = torch.arange(120, device=device) % 5 != 1
    ids[~mask] = bias.argmax()  # a masked row's hidden states count as 0
    found = scored(hidden, weight, bias, ids, mask, valid_rows=120)[2]
    assert torch.equal(found, expected(hidden, weight, bias, ids) & mask)


def test_a_nan_is_no_greatest_logit(device: torch.device) -> None:
    hidden, weight, bias, ids = example(device)
    ids[7] = 0  # argmax of a row of NaN
    right = expected(hidden, weight, bias, ids)
    right[7] = False
    hidden[7] = math.nan
    logps, _, found = scored(hidden, weight, bias, ids)
    assert logps[7].isnan()
    assert torch.equal(found, right)


def test_no_rows(device: torch.device) -> None:
    hidden, weight, bias, ids = example(device, rows=0)
    assert scored(hidden, weight, bias, ids)[2].shape == (0,)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_looks_at_no_other(dtype: str, device: torch.device) -> None:
    g = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 24, generator=g).to(device, DTYPES[dtype]) for n in (300, 1031))
    ids = (hidden.float() @ weight.float().t()).topk(2).indices[torch.arange(300), torch.arange(300) % 2]
    together = scored(hidden, weight, None, ids)[2]
    alone = torch.cat([scored(hidden[i : i + 1], weight, None, ids[i : i + 1])[2] for i in range(0, 300, 7)])
    assert torch.equal(together[::7], alone)
    assert 100 < int(together.sum()) < 200
