"""Liger's drop-ins against the reference in fp64, and against Liger itself if it can be imported."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from liger_cases import CLIPPED, batch, cases, cases_of_liger, name_of
from torch import Tensor

from grpo_ext import LossConfig, reference
from grpo_ext.integrations.liger import LigerFusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss


def by_reference(t: dict[str, Tensor], case: dict[str, Any], temperature: float = 0.9) -> tuple[Any, Tensor]:
    """The reference's output on fp64 logits (B, L+1, V), and the gradient of its loss."""
    case = dict(case)
    old = None if case.pop("on_policy", False) else t["old"].double()
    case.pop("weights", None)
    items = case.pop("num_items_in_batch", None)
    config = LossConfig(
        epsilon=case.pop("eps_low", 0.2), epsilon_high=case.pop("eps_high", 0.4), temperature=temperature,
        max_completion_length=t["ids"].shape[1], **case,
    )  # fmt: skip
    logits = t["logits"].detach().double().requires_grad_()
    weights = t.get("weights")
    if weights is not None and weights.dim() == 1:
        weights = weights.unsqueeze(1)
    out = reference.grpo_loss(
        logits[:, :-1], t["ids"], t["advantages"].double(), t["mask"], config, old_logps=old,
        ref_logps=t["ref"].double() if config.beta else None,
        importance_weights=None if weights is None else weights.double(), num_items_in_batch=items,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return out, gradient


def call(t: dict[str, Tensor], case: dict[str, Any], logits: Tensor, reduce: bool, **more: Any) -> Any:
    case = {k: v for k, v in case.items() if k != "weights"}
    old = None if case.pop("on_policy", False) else t["old"]
    ref = t["ref"] if case["beta"] else None
    return triton_grpo_loss(
        logits, old, ref, t["ids"], t["advantages"], t["mask"], reduce=reduce, vllm_is_ratio=t.get("weights"),
        **case, **more,
    )  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_reduced_loss_equals_the_reference(case: dict[str, Any], inplace: bool) -> None:
    t = batch(weights=case.get("weights", "none"))
    truth, gradient = by_reference(t, case)
    loss, metrics = call(t, case, t["logits"] * 1, True, inplace=inplace)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), truth.loss.detach(), rtol=1e-5, atol=1e-6)
    found = t["logits"].grad
    assert found is not None
    assert (found.double() - gradient).norm() <= 1e-5 * gradient.norm()
    assert len(metrics) == 1 + (case["beta"] != 0)
    if case["beta"]:
        torch.testing.assert_close(metrics[0].double(), truth.metrics["kl"], rtol=1e-5, atol=1e-6)
    if case["importance_sampling_level"] == "token":
        torch.testing.assert_close(metrics[-1].double(), truth.metrics["clip_ratio/region_mean"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_token_losses_add_up_to_the_reference(case: dict[str, Any]) -> None:
    t = batch(weights=case.get("weights", "none"))
    truth, gradient = by_reference(t, case)
    losses, kl, flags = call(t, case, t["logits"], False)
    mask = t["mask"]
    config = LossConfig(
        loss_type=case["loss_type"], max_completion_length=mask.shape[1], epsilon_high=case.get("eps_high")
    )
    loss = reference.reduce_loss(losses, mask, config, case.get("num_items_in_batch"))
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), truth.loss.detach(), rtol=1e-5, atol=1e-6)
    found = t["logits"].grad
    assert found is not None
    assert (found.double() - gradient).norm() <= 1e-5 * gradient.norm()
    for values in (losses, kl, flags):
        assert values is None or (values[mask == 0] == 0).all()
    assert (kl is None) == (case["beta"] == 0)
    if kl is not None:
        torch.testing.assert_close(kl.double(), truth.kl, rtol=1e-5, atol=1e-6)
    if case["loss_type"] in CLIPPED and "on_policy" not in case:
        assert 0 < flags.sum() < mask.sum()


@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_fused_linear_loss_equals_the_reference(case: dict[str, Any]) -> None:
    t = batch(weights=case.get("weights", "none"))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 9, 16, generator=generator).requires_grad_()
    weight = torch.randn(131, 16, generator=generator).requires_grad_()
    bias = torch.randn(131, generator=generator).requires_grad_()
    leaves = [hidden, weight, bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = torch.nn.functional.linear(*exact)
    padded = torch.cat([logits, logits[:, :1]], dim=1)
    truth, of_logits = by_reference({**t, "logits": padded}, case, temperature=1.0)
    gradients = torch.autograd.grad(logits, exact, of_logits[:, :-1])
    options = {k: v for k, v in case.items() if k not in ("weights", "on_policy", "num_items_in_batch")}
    high = options.pop("eps_high", 0.4)
    module = LigerFusedLinearGRPOLoss(epsilon_high=high, max_completion_length=9, **options)
    loss, metrics = module(
        hidden, weight, t["ids"], t["mask"], t["advantages"], bias=bias, ref_per_token_logps=t["ref"],
        old_per_token_logps=None if "on_policy" in case else t["old"], vllm_is_ratio=t.get("weights"),
        num_items_in_batch=case.get("num_items_in_batch"),
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), truth.loss.detach(), rtol=1e-5, atol=1e-6)
    for leaf, wanted in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        assert (leaf.grad.double() - wanted).norm() <= 2e-5 * wanted.norm()
    assert isinstance(metrics, tuple)
    assert len(metrics) == 1 + (case["beta"] != 0)
    if case["beta"]:
        torch.testing.assert_close(metrics[0].double(), truth.metrics["kl"], rtol=1e-5, atol=1e-6)


def test_reference_model_from_its_hidden_states() -> None:
    t = batch()
    hidden, weight = torch.randn(4, 9, 16), torch.randn(131, 16)
    other, other_weight = torch.randn(4, 9, 16), torch.randn(131, 16)
    logps = reference.linear_selective_log_softmax(other, other_weight, t["ids"])
    module = LigerFusedLinearGRPOLoss()
    arguments = (hidden, weight, t["ids"], t["mask"], t["advantages"])
    loss, (kl, _) = module(*arguments, ref_input=other, ref_weight=other_weight)
    wanted, (wanted_kl, _) = module(*arguments, ref_per_token_logps=logps)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl, wanted_kl, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs ref_per_token_logps, or ref_input"):
        module(*arguments)
    without, (zero, _) = LigerFusedLinearGRPOLoss(use_ref_model=False)(*arguments)
    assert zero == 0
    torch.testing.assert_close(without, LigerFusedLinearGRPOLoss(beta=0.0)(*arguments)[0], rtol=0, atol=0)


def test_given_log_probabilities_precede_the_reference_model() -> None:
    t = batch()
    arguments = (torch.randn(4, 9, 16), torch.randn(131, 16), t["ids"], t["mask"], t["advantages"])
    module = LigerFusedLinearGRPOLoss()
    wanted, _ = module(*arguments, ref_per_token_logps=t["ref"])
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        loss, _ = module(*arguments, ref_per_token_logps=t["ref"], ref_input=arguments[0], ref_weight=arguments[1])
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0)


def test_selective_log_softmax() -> None:
    t = batch()
    longer = torch.cat([torch.zeros(4, 3, dtype=torch.int64), t["ids"]], dim=1)
    mask = torch.cat([torch.ones(4, 3, dtype=torch.int64), t["mask"]], dim=1)
    found = fused_selective_log_softmax(t["logits"], longer, temperature=0.7, mask=mask)
    wanted = reference.selective_log_softmax(t["logits"].double()[:, :-1], t["ids"], temperature=0.7)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), torch.where(t["mask"] != 0, wanted, 0.0), rtol=1e-5, atol=1e-5)
    everywhere = fused_selective_log_softmax(t["logits"], t["ids"], temperature=0.7)
    torch.testing.assert_close(everywhere.double(), wanted, rtol=1e-5, atol=1e-5)


def test_in_place_is_seen_by_autograd() -> None:
    """The gradient takes the memory of the logits, and whoever needs them afterwards is told."""
    t = batch()
    logits = t["logits"] * 1
    square = (logits**2).sum()  # needs the logits in its backward
    loss, _ = triton_grpo_loss(logits, None, None, t["ids"], t["advantages"], t["mask"], beta=0.0, reduce=True)
    before = logits.detach().clone()
    loss.backward()
    assert not torch.equal(logits.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_leaves_are_not_overwritten() -> None:
    t = batch()
    before = t["logits"].detach().clone()
    loss, _ = triton_grpo_loss(t["logits"], None, None, t["ids"], t["advantages"], beta=0.0, reduce=True)
    loss.backward()
    assert torch.equal(t["logits"].detach(), before)
    assert t["logits"].grad is not None
    assert (t["logits"].grad[:, -1] == 0).all()


def test_masked_positions_hold_anything() -> None:
    t = batch()
    loss, _ = triton_grpo_loss(t["logits"], t["old"], t["ref"], t["ids"], t["advantages"], t["mask"], reduce=True)
    off = t["mask"] == 0
    ids, old, ref = t["ids"].masked_fill(off, -100), t["old"].masked_fill(off, torch.nan), t["ref"].clone()
    ref[off] = torch.inf
    logits = t["logits"].detach().clone()
    logits[:, :-1][off] = torch.nan
    logits.requires_grad_()
    for reduce in (True, False):
        again, *_ = triton_grpo_loss(logits, old, ref, ids, t["advantages"], t["mask"], reduce=reduce)
        again = again if reduce else again.sum() / t["mask"].sum()
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(again, logits)
        assert gradient.isfinite().all()
        assert (gradient[:, :-1][off] == 0).all()


def test_more_positions_than_a_launch_grid_has() -> None:
    t = batch(B=1, L=65_537, V=5, full=True)
    loss, _ = triton_grpo_loss(t["logits"], t["old"], None, t["ids"], t["advantages"], t["mask"], beta=0.0, reduce=True)
    loss.backward()
    truth, gradient = by_reference(t, {"loss_type": "dapo", "beta": 0.0})
    torch.testing.assert_close(loss.detach().double(), truth.loss.detach(), rtol=1e-5, atol=1e-6)
    assert t["logits"].grad is not None
    assert (t["logits"].grad.double() - gradient).norm() <= 1e-5 * gradient.norm()


def test_errors_name_argument_and_remedy() -> None:
    t = batch()
    arguments = (None, None, t["ids"], t["advantages"], t["mask"])
    with pytest.raises(ValueError, match=r"delta=1\.5 bounds the ratio of a clipped loss"):
        triton_grpo_loss(t["logits"], *arguments, beta=0.0, loss_type="sapo", delta=1.5)
    with pytest.raises(ValueError, match="needs ref_logp"):
        triton_grpo_loss(t["logits"], *arguments)
    with pytest.raises(ValueError, match=r"logits must be \(B, L\+1, V\)"):
        triton_grpo_loss(t["logits"][0], *arguments, beta=0.0)
    with pytest.raises(ValueError, match="vllm_is_ratio has shape"):
        triton_grpo_loss(t["logits"], *arguments, beta=0.0, vllm_is_ratio=torch.ones(3))


@pytest.fixture(scope="module")
def liger() -> Any:
    """Liger-Kernel imports Triton, which torch's CPU build does not bring along."""
    pytest.importorskip("triton", reason="Liger-Kernel imports Triton: pip install 'grpo-ext[liger]'")
    pytest.importorskip("liger_kernel.chunked_loss", reason="pip install 'grpo-ext[liger]'")
    import liger_kernel.chunked_loss
    import liger_kernel.transformers.grpo_loss

    return liger_kernel


def test_signatures_are_ligers(liger: Any) -> None:
    theirs = liger.transformers.grpo_loss
    for name, mine in (
        ("triton_grpo_loss", triton_grpo_loss),
        ("fused_selective_log_softmax", fused_selective_log_softmax),
    ):
        function = inspect.unwrap(getattr(theirs, name))
        wanted = [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
        assert [(p.name, p.default) for p in inspect.signature(mine).parameters.values()] == wanted
    module = liger.chunked_loss.LigerFusedLinearGRPOLoss
    for method in ("__init__", "forward"):
        theirs_, ours_ = (
            [(p.name, p.default) for p in inspect.signature(getattr(c, method)).parameters.values()]
            for c in (module, LigerFusedLinearGRPOLoss)
        )
        assert ours_ == theirs_


@pytest.mark.parametrize("case", cases_of_liger(), ids=name_of)
def test_fused_linear_loss_equals_liger(case: dict[str, Any], liger: Any) -> None:
    t = batch(weights=case.get("weights", "none"))
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((4, 9, 16), (131, 16)))
    options = {k: v for k, v in case.items() if k not in ("weights", "on_policy", "num_items_in_batch")}
    options["epsilon_high"] = options.pop("eps_high", 0.4)
    results = []
    for kind, more in (
        (liger.chunked_loss.LigerFusedLinearGRPOLoss, {"compiled": False}),
        (LigerFusedLinearGRPOLoss, {}),
    ):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, metrics = kind(max_completion_length=9, **options, **more)(
            *leaves, t["ids"], t["mask"], t["advantages"], ref_per_token_logps=t["ref"],
            old_per_token_logps=None if "on_policy" in case else t["old"], vllm_is_ratio=t.get("weights"),
            num_items_in_batch=case.get("num_items_in_batch"),
        )  # fmt: skip
        loss.backward()
        results.append([loss.detach(), *metrics, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
