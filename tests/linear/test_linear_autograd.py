"""Autograd's and the compiler's rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import batch, head, loss_of
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import LossConfig


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6, "logit_softcap": 3.0, "logit_scale": 1.4}, {"memory_budget": 8 * 3 * 128}],
)
def test_gradcheck_of_log_probabilities(trained: bool, options: dict[str, Any]) -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=trained)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=trained)
    ids, mask = torch.randint(0, 6, (2, 3)), torch.tensor([[1, 1, 1], [1, 0, 1]])
    for with_entropy in (False, True):
        torch.autograd.gradcheck(
            lambda h, w, b, e=with_entropy: grpo_ext.linear_selective_log_softmax(
                h, w, ids, bias=b, mask=mask, return_entropy=e, **options
            ),
            (hidden, weight, bias),
        )


@pytest.mark.parametrize("budget", [None, 8 * 5 * 128])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("trained", [False, True])
def test_gradcheck_of_the_loss(budget: int | None, level: Any, entropy_coef: float, trained: bool) -> None:
    config = LossConfig(
        loss_type="grpo", importance_sampling_level=level, beta=0.2, use_bias_correction_kl=True,
        entropy_coef=entropy_coef,
    )  # fmt: skip
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=trained)
    ids, mask = torch.randint(0, 5, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    old = reference.linear_selective_log_softmax(hidden.detach(), weight.detach(), ids) + 0.1 * torch.randn(2, 4)
    A = torch.tensor([1.3, -0.7], dtype=torch.float64)
    options = {"old_logps": old, "ref_logps": old + 0.3, "memory_budget": budget}
    torch.autograd.gradcheck(
        lambda h, w: grpo_ext.linear_grpo_loss(h, w, ids, A, mask, config, **options).loss, (hidden, weight)
    )


def test_backward_twice(device: torch.device) -> None:
    """The loss hands its gradient over once; log probabilities may be differentiated again."""
    weight, _ = head(device)
    data = batch(device)
    data["hidden"].requires_grad_()
    loss = loss_of(data, weight).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per backward"):
        loss.backward()
    for trained in (False, True):
        leaves = [data["hidden"].detach().requires_grad_(), weight.detach().requires_grad_(trained)]
        logp = grpo_ext.linear_selective_log_softmax(*leaves, data["ids"], mask=data["mask"])
        wanted = leaves[: 1 + trained]
        first = torch.autograd.grad(logp.sum(), wanted, retain_graph=True)
        again = torch.autograd.grad(logp.sum(), wanted)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_one_product(device: torch.device, products: dict[str, int], context: Any) -> None:
    weight, _ = head(device)
    data = batch(device)
    data["hidden"].requires_grad_()
    with_gradient = loss_of(data, weight)
    products.update(logits=0, back=0)
    with context():
        out = loss_of(data, weight)
        grpo_ext.linear_selective_log_softmax(data["hidden"], weight, data["ids"], mask=data["mask"])
    assert products == {"logits": 2 * int(data["mask"].sum()), "back": 0}
    assert not out.loss.requires_grad
    assert torch.equal(out.logps, with_gradient.logps)


def test_activation_checkpointing(device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    weight, _ = head(device)
    data = batch(device)
    leaf = data["hidden"].requires_grad_()
    loss = checkpoint(lambda h: loss_of(data | {"hidden": h * 2}, weight).loss, leaf, use_reentrant=False)
    loss.backward()
    twin = data["hidden"].detach().clone().requires_grad_()
    loss_of(data | {"hidden": twin * 2}, weight).loss.backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compile_fullgraph(device: torch.device, trained: bool, level: Any) -> None:
    torch._dynamo.reset()
    weight, _ = head(device)
    data = batch(device)
    config = LossConfig(importance_sampling_level=level)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = grpo_ext.linear_selective_log_softmax(hidden, weight, data["ids"], mask=data["mask"])
        assert isinstance(logp, Tensor)
        loss = grpo_ext.linear_grpo_loss(
            hidden * 2, weight, data["ids"], data["advantages"], data["mask"], config, old_logps=logp.detach()
        ).loss
        return loss + logp.mean()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [data["hidden"].clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(device: torch.device) -> None:
    weight, _ = head(device)
    data = batch(device, 2, 5)
    ops = torch.ops.grpo_ext
    numerics = ([1.0, 0.0, 1.0], torch.float32, torch.float32, None, None)
    which = (data["mask"], None, None, None, None, False)
    for derivative in (False, True):
        torch.library.opcheck(
            ops.linear_logps.default,
            (data["hidden"], weight, None, data["ids"], *numerics, *which, True, derivative, False, False, derivative),
        )
    logps, entropy, _, rows, _, _ = ops.linear_logps(
        data["hidden"], weight, None, data["ids"], *numerics, *which, True, False, False, False, False
    )
    torch.library.opcheck(
        ops.linear_gradient.default,
        (data["hidden"], weight, None, data["ids"], *numerics, *which, logps, entropy, rows, None,
         torch.ones_like(logps), None, True, True, False, None, False),
    )  # fmt: skip
