"""bf16 steps with sizes that are no multiples of 32, in memory full of NaN."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from fused_layer_cases import BF16, net
from operands_in_reach import Products
from poisoned_memory import poisoned
from test_fused_head import micro_batch
from torch import Tensor, nn
from toys import FixedEngine, build_model

from grpo_ext import LossConfig
from grpo_ext.modules import lora
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.modules.lora import FusedLora
from grpo_ext.trainer import GRPOTrainer
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.loss import ModelPass

VOCAB, SIZE = 500, 33


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def model_of_odd_sizes() -> nn.Module:
    return build_model("llama", vocab_size=VOCAB, hidden_size=SIZE, num_attention_heads=1, head_dim=8)


def gradients(model: nn.Module, fused: bool) -> Tensor:
    model.zero_grad()
    policy = ModelPass(LayoutChooser(model), FusedHead(model, fused), LossConfig())
    policy.loss(model, micro_batch()).loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def test_the_gradients_of_the_fused_head_against_fp64() -> None:
    """A read of unwritten padding gives NaN on a processor with AMX."""
    model = model_of_odd_sizes()
    exact = gradients(copy.deepcopy(model).double(), False)
    model.to(BF16)
    ours, plain = gradients(model, True), gradients(model, False)
    assert ours.isfinite().all()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("fused", [False, True])
def test_bf16_steps_stay_finite(make_trainer: Callable[..., GRPOTrainer], fused: bool) -> None:
    trainer = make_trainer(
        model=model_of_odd_sizes(), engine=FixedEngine(vocabulary=VOCAB), bf16=True, max_steps=3, use_fused_head=fused
    )
    trainer.train()
    assert trainer.loss_path.startswith("fused head" if fused else "logits")
    steps = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(steps) == 3
    assert all(line["nonfinite_steps"] == 0 for line in steps)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("amp", [False, True])
def test_lora_reaches_no_bytes_of_another_tensor(amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """x and the upstream gradient are slices of tensors whose other columns are NaN."""
    model = net(weights=BF16, autocast_adapter=amp)
    x, up = (torch.full((40, columns + 8), torch.nan, dtype=BF16)[:, :columns] for columns in (24, 20))
    x.copy_(torch.randn(40, 24))
    up.copy_(torch.randn(40, 20))
    products = Products(monkeypatch, apart=False)
    monkeypatch.setattr(lora, "linear", nn.functional.linear)
    with FusedLora(model).attached(), torch.autocast("cpu", BF16, enabled=amp):
        y = model(x.requires_grad_())
    y.backward(up)
    assert sorted(products.names) == ["addmm", "addmm", "addmm_", "addmm_", "linear", "linear", "mm", "mm"]
