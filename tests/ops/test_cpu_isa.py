"""All instruction sets of the CPU kernels that the machine supports compute the same loss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import grpo_ext
from grpo_ext import _C, LossConfig, reference

ISAS = ("avx512", "avx2", "portable")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    usual = _C.cpu_isa()
    if not _C.select_cpu_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _C.select_cpu_isa(usual)


def test_unknown_set_is_refused() -> None:
    usual = _C.cpu_isa()
    assert not _C.select_cpu_isa("avx1024")
    assert _C.cpu_isa() == usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "entropy_coef": 0.1},
        {"logit_softcap": 20.0, "logit_scale": 0.5, "entropy_coef": 0.1},
        {"logit_scale": -1.5},
    ],
    ids=["plain", "entropy", "softcap", "negative-scale"],
)
@pytest.mark.parametrize("vocab", [1, 7, 31, 2049, 5003])  # 2049: one lane into the second block
def test_loss_and_gradient(isa: str, dtype: torch.dtype, options: dict[str, float], vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(2, 3, vocab) * 4).to(dtype)
    if vocab > 1 and "logit_scale" not in options:
        logits[0, 0, vocab // 2] = -torch.inf  # a masked token
    logits.requires_grad_()
    ids = torch.randint(0, vocab, (2, 3))
    ids[0, 0] = 0
    mask, advantages = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([1.0, -0.5])
    config = LossConfig(**options)  # type: ignore[arg-type]
    assert _C.cpu_isa() == isa

    def run(function: object, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = function(z, ids, advantages, mask, config)  # type: ignore[operator]
        (grad,) = torch.autograd.grad(out.loss, z)
        return out.loss, out.logps, out.entropy, grad

    got = run(grpo_ext.grpo_loss, logits)
    exact = run(reference.grpo_loss, logits.detach().double().requires_grad_())
    plain = run(reference.grpo_loss, logits)
    for name, ours, truth, torchs in zip(("loss", "logps", "entropy", "grad"), got, exact, plain, strict=True):
        assert not ours.isnan().any(), name
        error, allowed = (ours - truth).abs().max(), 2 * (torchs - truth).abs().max()
        floor = 1e-6 * (1 + truth.abs().max())  # where plain torch is exact by luck
        assert error <= allowed + floor, f"{name}: {error} > 2 * {allowed / 2}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """The gradient of a one-token vocabulary pair is known in fp32; what is stored must be its nearest value."""
    torch.manual_seed(0)
    logits = torch.randn(64, 40).to(dtype).requires_grad_()
    ids, one = torch.randint(0, 40, (64,)), torch.ones(64)
    advantages = torch.randn(64)
    (grad,) = torch.autograd.grad(grpo_ext.grpo_loss(logits, ids, advantages, one, LossConfig()).loss, logits)
    fine = logits.detach().float().requires_grad_()
    (full,) = torch.autograd.grad(grpo_ext.grpo_loss(fine, ids, advantages, one, LossConfig()).loss, fine)
    assert torch.equal(grad, full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_summed_as_accurately_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    """Root mean square, without a floor: two chains of 1,000 fp32 additions err by 2.4 times torch's sum."""
    torch.manual_seed(0)
    logits, ids = torch.randn(64, 2000).to(dtype), torch.randint(0, 2000, (64,))
    exact = reference.selective_log_softmax(logits.double(), ids, return_entropy=True)
    plain = reference.selective_log_softmax(logits, ids, return_entropy=True)
    ours = grpo_ext.selective_log_softmax(logits, ids, return_entropy=True)
    for name, got, torchs, truth in zip(("logps", "entropy"), ours, plain, exact, strict=True):
        error, torch_error = ((x - truth).square().mean().sqrt() for x in (got, torchs))
        assert error <= 2 * torch_error, f"{name}: {error} > 2 * {torch_error}"
