"""Second derivatives raise an error and never silently give 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import grpo_ext
from grpo_ext.config import LossConfig
from grpo_ext.integrations.row_logps import row_logps

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGES = torch.tensor([1.0, -0.5])
WEIGHT = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))


def of_logits(z: Tensor) -> Tensor:
    return grpo_ext.grpo_loss(z, IDS, ADVANTAGES, MASK, LossConfig()).loss


def of_log_probabilities(z: Tensor) -> Tensor:
    return grpo_ext.policy_loss(z[..., 0], ADVANTAGES, MASK, LossConfig()).loss


def of_hidden(h: Tensor) -> Tensor:
    return grpo_ext.linear_grpo_loss(h, WEIGHT[:, : h.shape[-1]], IDS, ADVANTAGES, MASK, LossConfig(beta=0.0)).loss


def linear_logps(h: Tensor) -> Tensor:
    logps = grpo_ext.linear_selective_log_softmax(h, WEIGHT[:, : h.shape[-1]], IDS)
    assert isinstance(logps, Tensor)
    return logps.sum()


def linear_with_entropy(h: Tensor) -> Tensor:
    logps, entropy = grpo_ext.linear_selective_log_softmax(h, WEIGHT[:, : h.shape[-1]], IDS, return_entropy=True)
    return (logps + entropy).sum()


#: By the name that the error has to mention.
FUNCTIONS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("grpo_loss", of_logits),
    ("grpo_loss", lambda z: grpo_ext.grpo_loss(z * 1, IDS, ADVANTAGES, MASK, LossConfig(), inplace=True).loss),
    ("grpo_loss", lambda z: grpo_ext.grpo_loss(z, IDS, ADVANTAGES, MASK, LossConfig(loss_type="vespo")).loss),
    ("policy_loss", of_log_probabilities),
    ("selective_log_softmax", lambda z: grpo_ext.selective_log_softmax(z, IDS).sum()),
    ("the log probability of a drop-in", lambda z: row_logps(z, IDS, MASK, overwrite=False).sum()),
    ("linear_grpo_loss", of_hidden),
    ("linear_selective_log_softmax", linear_logps),
    ("linear_selective_log_softmax", linear_with_entropy),
]


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "upstream"])
@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_differentiating_twice_raises(name: str, function: Callable[[Tensor], Tensor], constant: bool) -> None:
    leaf = torch.randn(2, 3, 8, requires_grad=True)
    up = torch.tensor(1.5, requires_grad=not constant)
    (want,) = torch.autograd.grad(function(leaf), leaf, up)
    (got,) = torch.autograd.grad(function(leaf), leaf, up, create_graph=True)
    assert torch.equal(got.detach(), want)
    assert want.any()
    with pytest.raises(RuntimeError, match=f"^{name} has no second derivative.*: differentiate grpo_ext.reference"):
        torch.autograd.grad(got.square().sum(), leaf)


@pytest.mark.filterwarnings("ignore:Using backward")  # of the cycle that it leaves
@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_create_graph_alone_changes_nothing(name: str, function: Callable[[Tensor], Tensor]) -> None:
    leaf, twin = (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    function(leaf).backward()
    function(twin).backward(create_graph=True)
    assert leaf.grad is not None
    assert twin.grad is not None
    assert torch.equal(leaf.grad, twin.grad.detach()), name


def test_the_reference_can_be_differentiated_twice() -> None:
    """The remedy that the errors name."""
    leaf = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    given = IDS, ADVANTAGES.double(), MASK, LossConfig(beta=0.1)
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda z: grpo_ext.reference.grpo_loss(z, *given, old_logps=old, ref_logps=old - 0.1).loss, leaf
    )
    assert torch.autograd.gradgradcheck(lambda z: grpo_ext.reference.selective_log_softmax(z, IDS), leaf)
