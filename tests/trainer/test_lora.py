"""Fused LoRA layers beside PEFT's own: same outputs, gradients and steps, and PEFT's forward wherever it is due."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_layer_cases import BF16, INPUTS, Kernels, assert_same, both, layer_of, net, switched, values
from peft import LoraConfig, get_peft_model
from torch import nn
from toys import build_model

from grpo_ext.modules.lora import FusedLora

# ---- arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_fp32(kind: str, bias: bool) -> None:
    want, got, served = both(net(bias=bias), INPUTS[kind])
    assert served == "fused, 1 of 1 layers"
    assert len(want) == 4
    assert_same(got, want)


@pytest.mark.parametrize(
    ("weights", "inputs", "autocast_adapter", "amp"),
    [
        (BF16, BF16, True, True),
        (BF16, BF16, False, True),
        (torch.float32, torch.float32, True, True),
        (torch.float32, BF16, True, True),
        (BF16, torch.float32, True, True),
        (BF16, BF16, False, False),
    ],
    ids=["bf16, adapter fp32", "bf16", "fp32", "fp32, inputs bf16", "inputs fp32", "bf16 without autocast"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_halves(weights: torch.dtype, inputs: torch.dtype, autocast_adapter: bool, amp: bool, bias: bool) -> None:
    """At most twice PEFT's error against fp64, in the same types."""
    model = net(bias=bias, weights=weights, autocast_adapter=autocast_adapter)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(2)).to(inputs)
    want, got, served = both(model, x, amp)
    assert served == "fused, 1 of 1 layers"
    # What the weights are to both: rounded to the type that they are multiplied in.
    exact = copy.deepcopy(model).to(BF16).double()
    truth = values(exact, x.to(BF16).double())
    assert got.keys() == want.keys() == truth.keys()
    for name, value in truth.items():
        assert got[name].dtype == want[name].dtype
        assert got[name].shape == want[name].shape
        error, allowed = ((v[name].double() - value).norm() / value.norm() for v in (got, want))
        assert 0 < error <= 2 * allowed < 0.02, (name, float(error), float(allowed))


def test_kernels() -> None:
    """Forward three products, and casts of A and B; backward five, and casts of the gradients of A and B."""
    model = net(weights=BF16)
    x = INPUTS["batch"].to(BF16).requires_grad_()
    with FusedLora(model).attached():
        with Kernels() as forward, torch.autocast("cpu", BF16):
            y = model(x)
        with Kernels() as backward:
            torch.autograd.grad(y, [x, *(p for p in model.parameters() if p.requires_grad)], torch.ones_like(y))
    backward.counts.pop("ones_like", None)
    assert forward.counts == {"mm": 2, "addmm_": 1, "_to_copy": 2}
    assert backward.counts == {"mm": 2, "addmm_": 1, "addmm": 2, "_to_copy": 2}


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "adapter", "all"])
def test_gradients_that_nobody_needs(frozen: str) -> None:
    model = net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and frozen not in ("adapter", "all") and frozen not in name)
    x = INPUTS["batch"].clone().requires_grad_(frozen not in ("x", "all"))
    results = []
    for attached in (False, True):
        model.zero_grad()
        x.grad = None
        with switched(model, attached):
            y = model(x)
        assert y.requires_grad == (frozen != "all")
        if y.requires_grad:
            y.square().sum().backward()
        tensors = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
        results.append({name: value for name, value in tensors.items() if value is not None})
    assert len(results[0]) == {"x": 3, "lora_A": 3, "lora_B": 3, "adapter": 2, "all": 1}[frozen]
    assert_same(results[1], results[0])


def test_backward_under_autocast() -> None:
    model = net()
    x = INPUTS["rows"].clone().requires_grad_()
    with switched(model, True):
        y = model(x)
    with torch.autocast("cpu", BF16):
        y.square().sum().backward()
    got = x.grad
    x.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_second_derivative_is_refused() -> None:
    model = net()
    x = INPUTS["rows"].clone().requires_grad_()
    with switched(model, True), pytest.raises(RuntimeError, match="no second derivative: set use_fused_lora=False"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


# ---- PEFT's own, where it is due ---------------------------------------------------------------------------


class Other(nn.Linear):
    """As a quantised layer is one."""


class Packed(nn.Parameter):
    """As a quantised weight is one."""


def change(model: Any, case: str) -> None:
    """Makes the layer one that is not ours to compute."""
    layer = layer_of(model)
    base = layer.base_layer
    if case == "several":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    elif case == "other adapter":
        layer._active_adapter = ["elsewhere"]
    elif case == "merged":
        model.merge_adapter()
    elif case == "disabled":
        model.base_model.disable_adapter_layers()
    elif case == "subclass":
        base.__class__ = Other
    elif case == "weight":
        base.weight = Packed(base.weight.detach(), requires_grad=False)
    elif case == "wrapped forward":
        original = base.forward
        base.forward = lambda x: original(x) * 2
    elif case == "hook on base":
        base.register_forward_hook(lambda module, inputs, output: output * 2)
    elif case == "hook before A":
        layer.lora_A["default"].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    elif case == "backward hook":
        layer.lora_B["default"].register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))
    elif case == "trained base":
        base.weight.requires_grad_()
    elif case == "trained bias":
        base.bias.requires_grad_()
    elif case == "scaling":
        layer.scaling["default"] = torch.tensor(0.5)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"lora_dropout": 0.5}, "lora_dropout"),
    "dora": ({"use_dora": True}, "DoraLinearVariant"),
    "lora_bias": ({"bias": True, "lora_bias": True}, "lora_bias"),
    "several": ({}, "2 adapters are active"),
    "other adapter": ({}, "the active adapter does not cover it"),
    "merged": ({}, "an adapter is merged"),
    "disabled": ({}, "the adapter is disabled"),
    "subclass": ({}, "a part is no plain torch.nn.Linear but Other"),
    "weight": ({}, "a weight is no plain torch.nn.Parameter"),
    "wrapped forward": ({}, "a part is no plain torch.nn.Linear but Linear"),
    "hook on base": ({}, "hooks on its parts"),
    "hook before A": ({}, "hooks on its parts"),
    "backward hook": ({}, "hooks on its parts"),
    "trained base": ({}, "its base layer is trained, too"),
    "trained bias": ({"bias": True}, "its base layer is trained, too"),
    "scaling": ({}, "its scaling is no number"),
    "mixed types": (
        {"weights": BF16},
        "x in torch.bfloat16, weight in torch.bfloat16, adapter in torch.float32, and no autocast to one type",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_left_to_peft(case: str) -> None:
    """Bit for bit what PEFT computes, and the reason is given."""
    options, reason = CASES[case]
    model = net(**options)
    change(model, case)
    results = []
    x = INPUTS["batch"].to(BF16 if case == "mixed types" else torch.float32)
    for attached in (False, True):
        torch.manual_seed(7)
        with switched(model, attached) as fused:
            results.append(values(model, x))
            if attached:
                assert fused.describe() == f"fused, 0 of 1 layers (1 run by PEFT: {reason})"
    assert_same(results[1], results[0], rtol=0, atol=0)


def test_fp64_under_autocast() -> None:
    """Autocast leaves fp64 alone, so it is not this module's to convert."""
    model = net().double()
    want, got, served = both(model, INPUTS["rows"].double(), amp=True)
    assert "1 run by PEFT: x in torch.float64" in served
    assert_same(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weights", "inputs", "amp"), [(BF16, torch.float32, False), (torch.float32, torch.float64, True)], ids=str
)
def test_types_that_do_not_go_together(weights: torch.dtype, inputs: torch.dtype, amp: bool) -> None:
    """PEFT's error, and no silent conversion."""
    model = net(weights=weights)
    with switched(model, True), torch.autocast("cpu", BF16, enabled=amp), pytest.raises(RuntimeError, match="dtype"):
        model(INPUTS["rows"].to(inputs))


def test_hook_on_all_modules() -> None:
    model = net()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with switched(model, True) as fused:
            model(INPUTS["rows"])
            assert fused.describe() == "fused, 0 of 1 layers (1 run by PEFT: hooks on all modules)"
    finally:
        handle.remove()
    assert layer_of(model).base_layer in seen


def test_conv1d_base() -> None:
    """GPT-2's layers hold their weight the other way round."""
    model = build_gpt2()
    x = torch.arange(2, 10).view(1, 8)
    want = model(input_ids=x).logits
    with switched(model, True) as fused:
        torch.testing.assert_close(model(input_ids=x).logits, want, rtol=0, atol=0)
        assert "(1 run by PEFT: a part is no plain torch.nn.Linear but Conv1D)" in fused.describe()


def build_gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(transformers.GPT2LMHeadModel(config), lora).eval()


def test_layers_of_other_kinds() -> None:
    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with switched(model, True) as fused:
        model(input_ids=torch.tensor([[5, 6]]))
        assert fused.describe() == "fused, 2 of 3 layers (1 run by PEFT: no plain lora.Linear)"
        fused.wanted = True
        with pytest.raises(RuntimeError, match=r"use_fused_lora=True, but of 3 LoRA layers 1 run .*; leave it None"):
            fused.describe()


def test_adapter_names_in_a_batch() -> None:
    model = net().eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    names = ["default", "second"]
    want = model(INPUTS["batch"], adapter_names=names)
    with switched(model, True) as fused:
        torch.testing.assert_close(model(INPUTS["batch"], adapter_names=names), want, rtol=0, atol=0)
        assert "arguments other than x" in fused.describe()
    assert not torch.equal(want, model(INPUTS["batch"]))
