"""Our matrix products on a Hopper GPU: against fp64, and bitwise independent of the number of rows."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_ext import _C
from grpo_ext._ops import products


def _hopper() -> bool:
    return _C.CUDA_HOPPER_PRODUCTS and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU and a build for it"),
]

# rows around a tile of 128 and a pair of them; vocabularies around 256, odd, real; H around steps of 64
SHAPES = [
    (1, 1, 8),
    (3, 7, 64),
    (127, 257, 136),
    (128, 512, 64),
    (257, 1001, 1024),
    (300, 50_257, 256),
    (5, 151_936, 72),
]


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "vocab", "size"), SHAPES)
def test_logits(
    rows: int, vocab: int, size: int, with_bias: bool, dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    """At most twice the error of torch's product in the same dtype, and nothing beside the result. Torch gets many rows
    (for a few it splits the depth and adds the parts up, which is not what it does at full size)."""
    hidden = torch.randn(rows, size, device="cuda").to(dtype)
    weight = (torch.randn(vocab, size, device="cuda") / math.sqrt(size)).to(dtype)
    bias = torch.randn(vocab, device="cuda") if with_bias else None
    stride = -(-vocab // 64) * 64 + 64
    buffer = torch.full((rows + 1, stride), math.nan, device="cuda", dtype=out_dtype or dtype)
    out = buffer[:rows, :vocab]
    products.logits_product(hidden, weight, bias, out)
    exact = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    theirs = torch.mm(hidden.repeat(-(-4096 // rows), 1), weight.t(), out_dtype=torch.float32)[:rows]
    theirs = (theirs if bias is None else theirs + bias).to(out.dtype)
    limit = 2 * (theirs.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (out.double() - exact).abs().max() <= limit
    assert buffer[rows].isnan().all()
    assert buffer[:, -(-vocab // 8) * 8 :].isnan().all()
    for start, end in ((0, 1), (rows // 2, rows)):
        part = torch.empty(end - start, stride, device="cuda", dtype=out.dtype)[:, :vocab]
        products.logits_product(hidden[start:end], weight, bias, part)
        assert torch.equal(part, out[start:end])


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("rows", "vocab", "size"), [(1, 7, 8), (64, 256, 256), (300, 1001, 576), (1024, 3000, 1032)])
def test_head_gradient(rows: int, vocab: int, size: int, chunks: int) -> None:
    """The sum over chunks, rounded once; nothing is lost between them."""
    stride = -(-vocab // 64) * 64
    left = [torch.randn(rows, stride, device="cuda").bfloat16()[:, :vocab] for _ in range(chunks)]
    right = [torch.randn(rows, size, device="cuda").bfloat16() for _ in range(chunks)]
    upper, lower = torch.full((2, vocab + 1, size), math.nan, device="cuda", dtype=torch.bfloat16).unbind()
    exact = torch.zeros(vocab, size, device="cuda", dtype=torch.float64)
    for n, (a, b) in enumerate(zip(left, right, strict=True)):
        last = n == chunks - 1
        products.head_gradient(a, b, upper[:vocab], lower[:vocab], first=n == 0, last=last)
        exact += a.double().t() @ b.double()
        theirs = torch.mm(a.t(), b, out_dtype=torch.float32).double() - a.double().t() @ b.double()
        if not last:
            words = (upper.view(torch.int16).int() << 16) | (lower.view(torch.int16).int() & 0xFFFF)
            error = (words[:vocab].view(torch.float32).double() - exact).abs().max()
            assert error <= (n + 1) * (2 * theirs.abs().max() + 1e-6 * exact.abs().max())
    error = (upper[:vocab].double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
    assert upper[vocab].isnan().all()
    assert lower[vocab].isnan().all()


def test_served() -> None:
    weight = torch.empty(100, 64, device="cuda", dtype=torch.bfloat16)
    assert products.supports(weight, weight[:7])
    assert not products.supports(weight.cpu())
    assert not products.supports(weight, weight.t())
    assert not products.supports(weight[:, 1:])
    assert not products.supports(torch.empty(100, 69, device="cuda", dtype=torch.bfloat16)[:, :64])
