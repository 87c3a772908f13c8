"""The integrations on a GPU: Liger's drop-ins against its Triton kernels, our TRL class against TRL's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from liger_cases import batch, cases_of_liger, name_of

from grpo_ext import reference
from grpo_ext.integrations.liger import LigerFusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]


@pytest.fixture(scope="module")
def liger() -> Any:
    pytest.importorskip("liger_kernel.transformers.grpo_loss", reason="pip install 'grpo-ext[liger]'")
    import liger_kernel.chunked_loss
    import liger_kernel.transformers.grpo_loss

    return liger_kernel


def options_of(case: dict[str, Any], t: dict[str, torch.Tensor]) -> dict[str, Any]:
    options = {k: v for k, v in case.items() if k not in ("weights", "on_policy")}
    return {**options, "vllm_is_ratio": t.get("weights")}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", cases_of_liger(), ids=name_of)
def test_logits_loss_equals_ligers_triton_kernels(
    case: dict[str, Any], inplace: bool, reduce: bool, liger: Any
) -> None:
    t = batch(L=33, V=5003, weights=case.get("weights", "none"), device="cuda")
    old, ref = (None if "on_policy" in case else t["old"]), (t["ref"] if case["beta"] else None)
    results = []
    for function in (liger.transformers.grpo_loss.triton_grpo_loss, triton_grpo_loss):
        t["logits"].grad = None
        out = function(
            t["logits"] * 1, old, ref, t["ids"], t["advantages"], t["mask"], reduce=reduce, inplace=inplace,
            **options_of(case, t),
        )  # fmt: skip
        upstream = torch.linspace(0.5, 1.5, t["mask"].numel(), device="cuda").view_as(t["mask"])
        (out[0] if reduce else (out[0] * upstream).sum()).backward()
        rest = out[1] if reduce else out[1:]
        results.append([out[0].detach(), *rest, t["logits"].grad])
    for theirs, mine in zip(*results, strict=True):
        assert (theirs is None) == (mine is None)
        if theirs is not None:
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_softmax_equals_ligers_triton_kernel(dtype: torch.dtype, liger: Any) -> None:
    t = batch(L=33, V=5003, dtype=dtype, device="cuda")
    theirs = liger.transformers.grpo_loss.fused_selective_log_softmax(t["logits"], t["ids"], 0.7, t["mask"])
    mine = fused_selective_log_softmax(t["logits"], t["ids"], 0.7, t["mask"])
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases_of_liger(), ids=name_of)
def test_fused_linear_loss_equals_liger(case: dict[str, Any], liger: Any) -> None:
    t = batch(weights=case.get("weights", "none"), device="cuda")
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator).cuda() for shape in ((4, 9, 64), (131, 64)))
    options = {k: v for k, v in case.items() if k not in ("weights", "on_policy", "num_items_in_batch")}
    options["epsilon_high"] = options.pop("eps_high", 0.4)
    modules = ((liger.chunked_loss.LigerFusedLinearGRPOLoss, {"compiled": False}), (LigerFusedLinearGRPOLoss, {}))

    def results(kind: Any, place: Any, **more: Any) -> list[torch.Tensor]:
        leaves = [place(hidden).requires_grad_(), place(weight).requires_grad_()]
        given = {name: None if value is None else place(value) for name, value in t.items()}
        loss, metrics = kind(max_completion_length=9, **options, **more)(
            *leaves, given["ids"], given["mask"], given["advantages"], ref_per_token_logps=given["ref"],
            old_per_token_logps=None if "on_policy" in case else given["old"], vllm_is_ratio=given.get("weights"),
            num_items_in_batch=case.get("num_items_in_batch"),
        )  # fmt: skip
        loss.backward()
        return [x.detach().double().cpu() for x in (loss, *metrics, *(leaf.grad for leaf in leaves))]

    def exact(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu()

    # A KL term is an exponential of the distance between policies: where that is 7, both are off by what the fp32
    # logits are, e^7 times. So both are held against fp64.
    truth = results(LigerFusedLinearGRPOLoss, exact)
    theirs, mine = (results(kind, lambda x: x.clone(), **more) for kind, more in modules)
    for name, right, liger_says, we_say in zip(range(len(truth)), truth, theirs, mine, strict=True):
        error, others = (we_say - right).abs().max(), (liger_says - right).abs().max()
        assert error <= 2 * others + 1e-5 * right.abs().max() + 1e-6, name


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trl_seam_is_no_worse_than_trls_triton_class(dtype: torch.dtype, frozen: bool) -> None:
    """Both against the fp64 reference on the CPU, from the same inputs: at most twice TRL's error."""
    pytest.importorskip("trl", reason="pip install 'grpo-ext[trl]'")
    import grpo_ext.integrations.trl as ours

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import utils
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(777, 128, generator=generator).to(dtype)
    weight = torch.randn(5003, 128, generator=generator).mul_(0.3).to(dtype)
    ids = torch.randint(0, 5003, (777,), generator=generator)
    upstream = torch.randn(777, generator=generator)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_(not frozen)]
    truth = reference.linear_selective_log_softmax(*exact, ids, temperature=0.8)
    wanted = [truth, *torch.autograd.grad((truth * upstream).sum(), [x for x in exact if x.requires_grad])]
    errors = []
    for patched in (False, True):
        if patched:
            ours.patch()
        try:
            leaves = [hidden.cuda().requires_grad_(), weight.cuda().requires_grad_(not frozen)]
            outputs = ("log_probs", "entropy")
            logps, *_ = utils._ChunkedLogProbFunction.apply(*leaves, None, ids.cuda(), 0.8, 2048, None, 1.0, outputs)
            total = (logps * upstream.cuda()).sum()
            found = [logps, *torch.autograd.grad(total, [x for x in leaves if x.requires_grad])]
        finally:
            ours.unpatch()
        errors.append([(a.cpu().double() - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)])
    assert ours.status().served == {"with gradient": 1}
    for theirs, mine in zip(*errors, strict=True):
        assert mine <= 2 * theirs + 1e-6


@pytest.mark.parametrize("gradient", [False, True], ids=["scored", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trl_metrics_are_no_worse_than_trls_triton_class(dtype: torch.dtype, gradient: bool) -> None:
    """Token accuracy, mean logits and WPO's weights against fp64: at most twice TRL's error, no more wrong tokens."""
    pytest.importorskip("trl", reason="pip install 'grpo-ext[trl]'")
    import grpo_ext.integrations.trl as ours

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import utils
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3000, 128, generator=generator).to(dtype)
    weight = torch.randn(5003, 128, generator=generator).mul_(0.3).to(dtype)
    logits = hidden.double() @ weight.double().T / 0.8
    ids = logits.topk(3).indices[torch.arange(3000), torch.arange(3000) % 3]
    truth = [2 * logits.log_softmax(-1), logits.mean(-1), ids == logits.argmax(-1)]
    truth[0] = truth[0].logsumexp(-1)
    errors = []
    for patched in (False, True):
        if patched:
            ours.patch()
        try:
            leaves = [x.cuda().requires_grad_(gradient) for x in (hidden, weight)]
            outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
            _, _, *found = utils._ChunkedLogProbFunction.apply(*leaves, None, ids.cuda(), 0.8, 2048, None, 1.0, outputs)
        finally:
            ours.unpatch()
        errors.append([(a.cpu().double() - b.double()).norm() for a, b in zip(found, truth, strict=True)])
    assert list(ours.status().served) == ["with gradient" if gradient else "without gradient"]
    assert not ours.status().handed_back
    for theirs, mine in zip(*errors, strict=True):
        assert mine <= 2 * theirs + 1e-4
    assert errors[1][2] <= errors[0][2]
