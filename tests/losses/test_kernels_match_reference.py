"""The compiled functions against the reference in fp64: values and gradients over a pairwise grid."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from loss_cases import DTYPES, FACTORS, TRANSFORMS, Result, build, case_id, laid_out, pairwise, run
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import LossConfig
from grpo_ext.output import METRIC_NAMES

GRID = pairwise(FACTORS)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}

EVERY_DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))


def skip_fp64_on_gpu(dtype: str, device: torch.device) -> None:
    if dtype == "fp64" and device.type != "cpu":
        pytest.skip("fp64 logits are for the CPU")


def assert_as_exact_as_torch(name: str, ours: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, plus a few units in the last place of fp32.

    The floor is for quantities that torch happens to hit exactly (zeros, a single token).
    """
    if truth.numel() == 0:
        return
    truth = truth.double()
    scale = truth.abs().max().item()
    ours_error = (ours.double() - truth).abs().max().item()
    torch_error = (same_dtype.double() - truth).abs().max().item()
    floor = 8 * torch.finfo(torch.float32).eps * scale + 1e-9
    if ours.dtype in (torch.bfloat16, torch.float16):  # half a unit of the rounding both end with
        floor += 0.5 * torch.finfo(ours.dtype).eps * scale + torch.finfo(ours.dtype).smallest_normal
    assert ours_error <= 2 * torch_error + floor, f"{name}: {ours_error:.3g} against torch's {torch_error:.3g}"


def compare(ours: Result, same_dtype: Result | None, truth: Result) -> None:
    """Loss, per-token outputs, metrics and gradient."""
    fields: list[tuple[str, Any, Any, Any]] = [
        (name, getattr(ours.out, name), getattr((same_dtype or truth).out, name), getattr(truth.out, name))
        for name in ("loss", "logps", "entropy", "kl")
    ]
    fields.append(("grad", ours.grad, (same_dtype or truth).grad, truth.grad))
    for name, a, b, exact in fields:
        if exact is None:
            assert a is None, name
            continue
        a, b, exact = a.detach(), b.detach(), exact.detach()
        assert a.shape == exact.shape, name
        assert not a.isnan().any(), name
        if same_dtype is None:
            torch.testing.assert_close(a, exact, msg=lambda m, n=name: f"{n}: {m}", **TIGHT)
        else:
            assert_as_exact_as_torch(name, a, b, exact)
    assert tuple(ours.out.metrics) == METRIC_NAMES
    loose = 1e-9 if same_dtype is None else 2e-3
    for name, value in ours.out.metrics.items():
        assert value.dim() == 0
        assert value.item() == pytest.approx(truth.out.metrics[name].item(), rel=loose, abs=loose), name


@pytest.mark.parametrize(
    ("number", "case"), list(enumerate(GRID)), ids=[f"{i}-{case_id(c)}" for i, c in enumerate(GRID)]
)
def test_grpo_loss(device: torch.device, number: int, case: dict[str, Any]) -> None:
    skip_fp64_on_gpu(case["dtype"], device)
    batch = build(case, device, seed=number)
    truth = run(reference.grpo_loss, batch, torch.float64)
    same_dtype = None if case["dtype"] == "fp64" else run(reference.grpo_loss, batch)
    ours = run(grpo_ext.grpo_loss, batch)
    assert ours.out.loss.dtype == (torch.float64 if case["dtype"] == "fp64" else torch.float32)
    assert ours.grad.dtype == batch.leaf.dtype
    compare(ours, same_dtype, truth)


@pytest.mark.parametrize(
    ("number", "case"),
    [(i, c) for i, c in enumerate(GRID) if c["vocab"] == 7 or c["layout"] == "flat"],
    ids=lambda value: case_id(value) if isinstance(value, dict) else str(value),
)
def test_policy_loss(device: torch.device, number: int, case: dict[str, Any]) -> None:
    """The same losses from log probabilities and entropies: gradients of both."""
    case = case | {"dtype": "fp64" if device.type == "cpu" and number % 2 else "fp32"}
    batch = build(case, device, seed=number)
    with torch.no_grad():
        logp, entropy = reference.selective_log_softmax(
            batch.view(batch.leaf), batch.ids, return_entropy=True, **TRANSFORMS[case["transform"]]
        )
    results = []
    for function, dtype in (
        (grpo_ext.policy_loss, None),
        (reference.policy_loss, None),
        (reference.policy_loss, torch.float64),
    ):
        leaves = [t.to(dtype or t.dtype).clone().requires_grad_() for t in (logp, entropy)]
        options = {k: v.to(dtype) if dtype and isinstance(v, Tensor) else v for k, v in batch.options.items()}
        out = function(leaves[0], batch.advantages, batch.mask, batch.config, entropy=leaves[1], **options)
        (out.loss * batch.upstream).backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append(Result(out, torch.stack(grads)))
    ours, same_dtype, truth = results
    compare(ours, None if logp.dtype == torch.float64 else same_dtype, truth)


# 1: one token, no gradient; 7: less than a vector; 1000: a multiple of 8, not of 16; 32000 and 50257: real
# vocabularies, the latter odd so that most rows are misaligned; 49152: SmolLM2
@pytest.mark.parametrize(
    "factors",
    [
        {"kl": "corrected"},  # the ratio in the KL term
        {"isw": "token_truncate"},  # a weight of its own for each token, from this forward
        {"isw": "(B,T)"},
        {"advantages": "(B,T)"},
        {"quantile": "given"},
        {"loss_type": "grpo", "kl": "corrected", "isw": "token_mask"},
    ],
    ids=lambda factors: "-".join(map(str, factors.values())),
)
@pytest.mark.parametrize("inplace", [False, True])
def test_on_policy_sequence_ratios(device: torch.device, factors: dict[str, Any], inplace: bool) -> None:
    """The ratio is 1, its gradient a mean over the completion: with anything of a token's own beside it, the other
    tokens have to be seen first. The grid has pairs of factors, and these are three."""
    case = {name: values[0] for name, values in FACTORS.items()} | {
        "loss_type": "dapo", "level": "sequence", "dtype": "fp32" if device.type == "cuda" else "fp64",
        "old": "absent", "layout": "slice", "inplace": inplace, "vocab": 33,
    }  # fmt: skip
    batch = build(case | factors, device, seed=1)
    truth = run(reference.grpo_loss, batch, torch.float64)
    same_dtype = None if case["dtype"] == "fp64" else run(reference.grpo_loss, batch)
    compare(run(grpo_ext.grpo_loss, batch), same_dtype, truth)


@EVERY_DTYPE
@pytest.mark.parametrize("vocab", [1, 7, 1000, 32000, 49152, 50257])
@pytest.mark.parametrize("inplace", [False, True])
def test_real_vocabularies(device: torch.device, dtype: str, vocab: int, inplace: bool) -> None:
    skip_fp64_on_gpu(dtype, device)
    base = {name: values[0] for name, values in FACTORS.items()}
    case = base | {
        "loss_type": "dapo", "dtype": dtype, "old": "near", "kl": "on", "entropy_coef": 0.02,
        "isw": "token_truncate", "layout": "slice", "inplace": inplace, "vocab": vocab,
    }  # fmt: skip
    batch = build(case, device, seed=vocab, B=2, T=3)
    truth = run(reference.grpo_loss, batch, torch.float64)
    same_dtype = None if dtype == "fp64" else run(reference.grpo_loss, batch)
    compare(run(grpo_ext.grpo_loss, batch), same_dtype, truth)


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "slice", "misaligned", "rows_apart"])
@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("vocab", [7, 1000, 50257])
def test_selective_log_softmax(device: torch.device, dtype: str, layout: str, transform: str, vocab: int) -> None:
    skip_fp64_on_gpu(dtype, device)
    values = (torch.randn(2, 3, vocab) * 3).to(device, DTYPES[dtype])
    full, view = laid_out(values, layout)
    ids = torch.randint(0, vocab, (2, 3), device=device)
    up = torch.randn(2, 2, 3, dtype=torch.float64).to(device, torch.float64 if dtype == "fp64" else torch.float32)

    results = []
    for module, lift in ((grpo_ext, full.dtype), (reference, full.dtype), (reference, torch.float64)):
        leaf = full.to(lift).clone().requires_grad_()
        logp, entropy = module.selective_log_softmax(view(leaf), ids, return_entropy=True, **TRANSFORMS[transform])
        torch.autograd.backward([logp, entropy], [up[0].to(logp.dtype), up[1].to(logp.dtype)])
        alone = module.selective_log_softmax(view(leaf.detach()), ids, **TRANSFORMS[transform])
        assert torch.equal(alone, logp.detach())
        results.append((logp.detach(), entropy.detach(), leaf.grad))
    for name, ours, same_dtype, truth in zip(("logp", "entropy", "grad"), *results, strict=True):
        if dtype == "fp64":
            torch.testing.assert_close(ours, truth, **TIGHT)
        else:
            assert_as_exact_as_torch(name, ours, same_dtype, truth)


def test_selective_log_softmax_of_rows_and_batches(device: torch.device) -> None:
    logits = torch.randn(6, 4, 9, device=device)
    ids = torch.randint(0, 9, (6, 4), device=device)
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    for shape in ((24, 9), (1, 24, 9), (6, 4, 9)):
        got = grpo_ext.selective_log_softmax(logits.view(shape), ids.view(shape[:-1]))
        torch.testing.assert_close(got, expected.view(shape[:-1]))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "logit_softcap": 3.0, "logit_scale": 1.4}])
def test_gradcheck_of_selective_log_softmax(options: dict[str, float]) -> None:
    logits = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 6, (2, 3))
    torch.autograd.gradcheck(
        lambda z: grpo_ext.selective_log_softmax(z, ids, return_entropy=True, **options), (logits,)
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo"])
def test_gradcheck_of_the_losses(loss_type: str, level: str) -> None:
    """Numerical derivatives; not of cispo and vespo, whose weights have no gradient by definition."""
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=4,
        beta=0.2,
        use_bias_correction_kl=True,
        entropy_coef=0.1,
        delta=4.0,
        temperature=0.8,
        vllm_importance_sampling_correction=False,
    )
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 5, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    new, entropy = reference.selective_log_softmax(logits.detach(), ids, return_entropy=True, temperature=0.8)
    old, ref = new + 0.5 * torch.randn(2, 4).double(), new + 0.5 * torch.randn(2, 4).double()
    A = torch.tensor([1.3, -0.7], dtype=torch.float64)
    options = {"old_logps": old, "ref_logps": ref}
    torch.autograd.gradcheck(lambda z: grpo_ext.grpo_loss(z, ids, A, mask, config, **options).loss, (logits,))
    torch.autograd.gradcheck(
        lambda p, h: grpo_ext.policy_loss(p, A, mask, config, entropy=h, **options).loss,
        (new.requires_grad_(), entropy.requires_grad_()),
    )


def test_more_rows_than_sixteen_bits_count(device: torch.device) -> None:
    """One sequence of 70,001 tokens: row numbers beyond 65,535."""
    N = 70_001
    logits = torch.randn(N, 7).to(device)
    ids = torch.randint(0, 7, (N,), device=device)
    A, mask = torch.randn(N).to(device), (torch.rand(N) > 0.2).to(device)
    config = LossConfig(loss_type="grpo", entropy_coef=0.01)
    results = []
    for module, dtype in ((grpo_ext, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        out = module.grpo_loss(leaf, ids, A.to(dtype), mask, config)
        out.loss.backward()
        results.append(Result(out, leaf.grad))
    compare(*results)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])  # one pass and staged
def test_a_given_threshold_replaces_the_quantile(impl: ModuleType, device: torch.device, loss_type: str) -> None:
    """Far from the quantile of this batch, as that of other ranks' tokens may be."""
    logits = torch.randn(3, 5, 50, device=device)
    ids, one = torch.randint(0, 50, (3, 5), device=device), torch.ones(3, 5, device=device)
    logp, entropy = impl.selective_log_softmax(logits, ids, return_entropy=True)
    config = LossConfig(loss_type=loss_type, top_entropy_quantile=0.5)
    values = entropy.flatten().sort().values
    for kept in (15, 12, 3, 0):
        threshold = values[15 - kept - 1 : 15 - kept + 1].mean() if 0 < kept < 15 else (0.0 if kept else 99.0)
        leaf = logits.clone().requires_grad_()
        impl.grpo_loss(leaf, ids, one[:, 0], one, config, entropy_threshold=threshold).loss.backward()
        p = logp.detach().clone().requires_grad_()
        impl.policy_loss(p, one[:, 0], one, config, entropy=entropy, entropy_threshold=threshold).loss.backward()
        for grad in (leaf.grad.abs().amax(-1), p.grad):
            assert torch.equal(grad != 0, entropy >= threshold)
            assert int((grad != 0).sum()) == kept


def test_a_threshold_is_only_for_the_entropy_mask(device: torch.device) -> None:
    """entropy_threshold replaces a quantile; without one (top_entropy_quantile = 1) it has no effect."""
    logits = torch.randn(3, 5, 50, device=device)
    ids, one = torch.randint(0, 50, (3, 5), device=device), torch.ones(3, 5, device=device)
    for config in (LossConfig(), LossConfig(off_policy_mask_threshold=0.1)):  # one pass and staged
        for module in (grpo_ext, reference):
            with_threshold = module.grpo_loss(logits, ids, one[:, 0], one, config, entropy_threshold=99.0)
            assert with_threshold.loss.item() == pytest.approx(-1.0)


def test_importance_weights_need_no_second_forward(device: torch.device) -> None:
    """SPEC section 4: on-policy, the weight formed inside the loss equals the two-forward route."""
    logits = torch.randn(3, 5, 50, device=device)
    ids, mask = torch.randint(0, 50, (3, 5), device=device), torch.ones(3, 5, device=device)
    old = grpo_ext.selective_log_softmax(logits, ids)
    sampling = old + 0.4 * torch.randn_like(old)
    A = torch.tensor([1.0, -1.0, 0.5], device=device)
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        config = LossConfig(vllm_importance_sampling_mode=mode, vllm_importance_sampling_cap=1.3)
        grads = []
        for options in ({}, {"old_logps": old}):
            leaf = logits.clone().requires_grad_()
            out = grpo_ext.grpo_loss(leaf, ids, A, mask, config, sampling_logps=sampling, **options)
            out.loss.backward()
            grads.append(leaf.grad)
            weights = grpo_ext.importance_weights(old, sampling, mask, mode=mode, cap=1.3)
            mean = weights.expand(3, 5).mean()
            torch.testing.assert_close(out.metrics["importance_weight/mean"], mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
