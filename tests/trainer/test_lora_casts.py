"""Adapters' weights rounded once for a micro-batch: the same bits, and never those of another weight."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_layer_cases import BF16, INPUTS, Kernels, adapted, assert_same, layer_of, net, values
from peft import LoraConfig
from torch import Tensor, nn
from toys import FixedEngine

from grpo_ext.modules import lora
from grpo_ext.modules.lora import FusedLora, lora_layers
from grpo_ext.trainer import GRPOTrainer

Make = Callable[..., GRPOTrainer]


def test_cast_once() -> None:
    """The same bits; the layer's own casts are gone, those of the gradients stay."""
    model = net(weights=BF16)
    x = INPUTS["batch"].to(BF16)
    fused = FusedLora(model)
    with fused.attached():
        want = values(model, x, amp=True)
        with fused.precast_weights(BF16):
            assert_same(values(model, x, amp=True), want, rtol=0, atol=0)
            with Kernels() as kernels, torch.autocast("cpu", BF16):
                model(x)
        assert kernels.counts == {"mm": 2, "addmm_": 1}
        assert "_lora_casts" not in vars(layer_of(model))
        with Kernels() as kernels, torch.autocast("cpu", BF16):
            model(x)
    assert kernels.counts == {"mm": 2, "addmm_": 1, "_to_copy": 2}


def test_one_cast_for_all_layers() -> None:
    model = adapted().to(BF16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    fused = FusedLora(model)
    with fused.attached(), Kernels() as kernels, fused.precast_weights(BF16):
        assert all("_lora_casts" in vars(layer) for layer in lora_layers(model))
    assert kernels.counts == {"empty": 1, "_foreach_copy_": 1}


def test_a_model_on_two_devices() -> None:
    model = adapted()
    lora_layers(model)[3].to("meta")
    fused = FusedLora(model)
    with fused.attached(), fused.precast_weights(BF16):
        for layer in lora_layers(model):
            for cast in vars(layer)["_lora_casts"]:
                assert cast.rounded.device == cast.weight.device
    assert all("_lora_casts" not in vars(layer) for layer in lora_layers(model))


@pytest.mark.parametrize("active", [[], ["default", "second"]], ids=str)
def test_no_adapter_or_several(active: list[str]) -> None:
    """PEFT's to compute: an adapter may have been deleted from a layer that no other one has."""
    model = net(weights=BF16)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    layer_of(model).set_adapter(active)
    x = INPUTS["batch"].to(BF16)
    with torch.autocast("cpu", BF16):
        want = model.base_model(x)
        fused = FusedLora(model)
        with fused.attached(), fused.precast_weights(BF16):
            assert torch.equal(model.base_model(x), want)
            assert f"{len(active)} adapters are active" in fused.describe()


def in_place(model: Any) -> None:
    with torch.no_grad():
        layer_of(model).lora_A["default"].weight.mul_(2)


def new_data(model: Any) -> None:
    weight = layer_of(model).lora_B["default"].weight
    weight.data = weight.data * 2


def new_parameter(model: Any) -> None:
    layer = layer_of(model).lora_B["default"]
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def other_adapter(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    model.set_adapter("second")


@pytest.mark.parametrize("change", [in_place, new_data, new_parameter, other_adapter])
def test_a_weight_that_changes_in_between(change: Callable[[Any], None]) -> None:
    model = net(weights=BF16)
    x = INPUTS["batch"].to(BF16)
    fused = FusedLora(model)
    with fused.attached(), fused.precast_weights(BF16):
        before = values(model, x, amp=True)
        torch.manual_seed(1)
        change(model)
        got = values(model, x, amp=True)
    with fused.attached():
        want = values(model, x, amp=True)
    assert_same(got, want, rtol=0, atol=0)
    assert not torch.equal(before["y"], want["y"])


def test_another_autocast_than_expected() -> None:
    model = net()
    fused = FusedLora(model)
    with fused.attached():
        want = values(model, INPUTS["batch"], amp=True)
        with fused.precast_weights(torch.float16):
            assert_same(values(model, INPUTS["batch"], amp=True), want, rtol=0, atol=0)
        with fused.precast_weights(None):
            assert_same(values(model, INPUTS["batch"], amp=True), want, rtol=0, atol=0)


def test_graphs_outlive_their_casts() -> None:
    """A backward after the next micro-batch has begun."""
    model = net(weights=BF16)
    x = INPUTS["batch"].to(BF16)
    fused = FusedLora(model)
    with fused.attached():
        want = values(model, x, amp=True)
        model.zero_grad()
        with fused.precast_weights(BF16), torch.autocast("cpu", BF16):
            y = model(x)
        with fused.precast_weights(BF16):
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == want.keys() - {"x", "y"}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.parametrize("inputs", [BF16, torch.float32])
def test_on_a_gpu(inputs: torch.dtype) -> None:
    """Gradients of fp32 adapters are fp32 sums that nobody has rounded: nearer to fp64 than PEFT's."""
    model = net(weights=BF16).cuda()
    x = torch.randn(512, 24, generator=torch.Generator().manual_seed(2)).to(inputs).cuda()

    def measured(model: Any, x: Tensor, amp: bool) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        model.zero_grad()
        with torch.autocast("cuda", BF16, enabled=amp):
            y = model(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(BF16).to(y))
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert x.grad is not None
        return {"y": y.detach(), "x": x.grad, **grads}

    want = measured(model, x, True)
    fused = FusedLora(model)
    with fused.attached(), fused.precast_weights(BF16):
        got = measured(model, x, True)
        again = measured(model, x, True)
        assert fused.describe() == "fused, 1 of 1 layers"
    truth = measured(copy.deepcopy(model).to(BF16).double(), x.to(BF16).double(), False)
    for name, value in truth.items():
        assert torch.equal(got[name], again[name])
        assert got[name].dtype == want[name].dtype
        error, allowed = (float((v[name].double() - value).norm() / value.norm()) for v in (got, want))
        assert 0 < error <= 2 * allowed < 0.02, (name, error, allowed)
        if "lora_B" in name:
            assert error < allowed, (error, allowed)


def test_trainer(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each micro-batch, with autocast's type; and every pass over a layer finds what it needs."""
    seen: list[Any] = []
    served: Counter[bool] = Counter()
    cast_together, of = lora._cast_together, lora.Cast.of

    def cast(layers: list[Any], dtype: torch.dtype) -> None:
        seen.append((len(layers), dtype))
        cast_together(layers, dtype)

    def found(self: Any, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        result = of(self, weight, dtype)
        served[result is not None] += 1
        return result

    monkeypatch.setattr(lora, "_cast_together", cast)
    monkeypatch.setattr(lora.Cast, "of", found)
    for bf16, expected in ((True, [(14, BF16)] * 4), (False, [])):
        seen.clear()
        served.clear()
        make_trainer(model=adapted(), engine=FixedEngine(), bf16=bf16, gradient_accumulation_steps=2).train()
        assert seen == expected
        assert set(served) == ({True} if bf16 else set())
