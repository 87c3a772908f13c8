"""Fused RMSNorm layers beside the architectures' own: which are taken, same outputs, gradients and steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from fused_layer_cases import BF16, Kernels, adapted, assert_same, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toys import FixedEngine, GradientCatcher, build_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from grpo_ext.modules.checkpointing import checkpointing_arguments
from grpo_ext.modules.norms import FusedNorms, is_rms_norm
from grpo_ext.trainer import GRPOTrainer

Make = Callable[..., GRPOTrainer]


class HalvedRMSNorm(LlamaRMSNorm):
    """Another function under a name that promises the same."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / 2


class GroupRMSNorm(LlamaRMSNorm):
    """Normalises each half by itself."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        halves = hidden_states.unflatten(-1, (2, -1))
        normalised = halves * torch.rsqrt(halves.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normalised.flatten(-2)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states) * gate


class RMSNormWithBias(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


def named(layer: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def hooked() -> nn.Module:
    layer = LlamaRMSNorm(8)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, LlamaRMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_taken(kind: Any, epsilon: float) -> None:
    assert is_rms_norm(kind(16, eps=epsilon))


def test_left_alone() -> None:
    """Ones whose weight is offset by 1, other functions, more arguments or parameters, an unknown number."""
    for layer in (
        Gemma3RMSNorm(16),
        HalvedRMSNorm(16),
        GroupRMSNorm(16),
        GatedRMSNorm(16),
        RMSNormWithBias(16),
        named(LlamaRMSNorm(16), variance_epsilon=None),
        hooked(),
        LlamaRMSNorm(16).to("meta"),
    ):
        assert not is_rms_norm(layer), layer


def test_the_layer_is_not_touched() -> None:
    layer = LlamaRMSNorm(16)
    before = copy.deepcopy(layer.state_dict())
    random = torch.get_rng_state()
    is_rms_norm(layer)
    assert torch.equal(layer.weight, before["weight"])
    assert set(vars(layer)) == set(vars(LlamaRMSNorm(16)))
    assert torch.equal(torch.get_rng_state(), random)


class Net(nn.Module):
    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(size, eps=1e-5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-1, 2, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def values(model: nn.Module, x: Tensor, amp: bool = False) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=amp):
        y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    assert x.grad is not None
    weight: Any = model.norm.weight
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad}


def both(model: nn.Module, x: Tensor, amp: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    fused = FusedNorms(model)
    want = values(model, x, amp)
    with fused.attached():
        got = values(model, x, amp)
        return want, got, fused.describe()


INPUTS = {
    "vector": torch.randn(24, generator=torch.Generator().manual_seed(1)),
    "batch": torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3)),
    "heads": torch.randn(2, 5, 3, 24, generator=torch.Generator().manual_seed(3)).transpose(1, 2),
    "no rows": torch.zeros(2, 0, 24),
    "zeros": torch.zeros(2, 24),
    "tiny": torch.full((2, 24), 1e-20),
    "huge": torch.full((2, 24), 1e15),
}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_fp32(name: str, amp: bool) -> None:
    """Autocast changes nothing: the arithmetic is in fp32 anyway, and the result has the type of x."""
    want, got, served = both(Net(), INPUTS[name], amp)
    assert served == "fused, 1 of 1 layers"
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("amp", [False, True])
def test_halves(dtype: torch.dtype, amp: bool) -> None:
    """At most twice the own error against fp64; in the same type."""
    model = Net().to(dtype)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    want, got, served = both(model, x, amp)
    assert served == "fused, 1 of 1 layers"
    exact = copy.deepcopy(model).double()
    x64 = x.double().requires_grad_()
    weight: Any = exact.norm.weight
    y64 = weight * x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + 1e-5)
    y64.backward(torch.randn(y64.shape, generator=torch.Generator().manual_seed(5)).to(dtype).double())
    assert x64.grad is not None
    for key, value in {"y": y64.detach(), "x": x64.grad, "weight": weight.grad}.items():
        assert got[key].dtype == want[key].dtype == dtype
        error, allowed = ((v[key].double() - value).norm() / value.norm() for v in (got, want))
        assert 0 < error <= 2 * allowed < 0.02, (key, float(error), float(allowed))


@pytest.mark.parametrize(("weights", "inputs"), [(torch.float32, BF16), (BF16, torch.float32)], ids=str)
def test_two_types_are_the_models(weights: torch.dtype, inputs: torch.dtype) -> None:
    want, got, served = both(Net().to(weights), INPUTS["batch"].to(inputs))
    assert served == f"fused, 0 of 1 layers (1 run by the model: x in {inputs}, weight in {weights})"
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0)


def test_autocast_is_as_before() -> None:
    model = Net().to(BF16)
    with FusedNorms(model).attached(), torch.autocast("cpu", BF16):
        model(INPUTS["batch"].to(BF16))
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 7, dtype=BF16))
        assert torch.is_autocast_enabled("cpu")


def test_other_calls_are_the_models() -> None:
    class OwnRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor, factor: float = 1.0) -> Tensor:
            return super().forward(hidden_states) * factor

    model = Net()
    model.norm = OwnRMSNorm(24)
    x = INPUTS["batch"]
    fused = FusedNorms(model)
    with fused.attached():
        torch.testing.assert_close(model.norm(x, 2.0), 2 * OwnRMSNorm(24)(x))
        assert fused.describe() == "fused, 0 of 1 layers (1 run by the model: arguments other than x)"
        model.norm(x)
        assert str(fused) == "RMSNorm layers: fused, 1 of 1 layers"


@pytest.mark.parametrize("order", ["first", "last"])
def test_layers_of_a_class_may_differ(order: str) -> None:
    """Gemma 3n has norms of one class with a weight and without."""
    without, weighted = Gemma3nRMSNorm(24, with_scale=False), Gemma3nRMSNorm(24)
    model = nn.Sequential(*((without, weighted) if order == "first" else (weighted, without)))
    want = model(INPUTS["batch"])
    fused = FusedNorms(model)
    with fused.attached():
        torch.testing.assert_close(model(INPUTS["batch"]), want)
        assert fused.describe() == "fused, 1 of 2 layers (1 run by the model: no plain RMSNorm)"


def test_layers_that_no_call_reaches() -> None:
    """They are no reason to refuse: nobody else has computed them."""
    model = Net()
    model.tower = Net()
    fused = FusedNorms(model, True)
    with fused.attached():
        model(INPUTS["batch"])
        assert fused.describe() == "fused, 1 of 2 layers (1 never called)"


def test_nothing_stays_behind() -> None:
    model = Net()
    before = set(vars(model.norm))
    with FusedNorms(model).attached():
        model(INPUTS["batch"])
        assert "forward" in vars(model.norm)
    assert set(vars(model.norm)) == before


def test_wanted() -> None:
    model = nn.Linear(2, 2)
    assert FusedNorms(model).describe() == "the model's forward, the model has no RMSNorm layers"
    with pytest.raises(ValueError, match="use_fused_norm=True, but the model has no RMSNorm layers: leave it None"):
        FusedNorms(model, True)
    with pytest.raises(ValueError, match=r"use_fused_norm=True, but torch.compile fuses them itself"):
        FusedNorms(Net(), True, compiled=True)
    odd = Net()
    odd.norm = HalvedRMSNorm(24)
    fused = FusedNorms(odd, True)
    with fused.attached():
        odd(INPUTS["batch"])
        with pytest.raises(RuntimeError, match="of 1 RMSNorm layers 1 run by the model: no plain RMSNorm; leave it"):
            fused.describe()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [build_model, adapted], ids=["full", "lora"])
def test_checkpointing(build: Callable[[], Any], reentrant: bool) -> None:
    model = build().train()
    want = gradients(model)
    arguments = checkpointing_arguments(model)
    assert arguments is not None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={**arguments, "use_reentrant": reentrant})
    fused = FusedNorms(model)
    with fused.attached():
        got = gradients(model)
        assert fused.describe() == "fused, 5 of 5 layers"
    assert_same(got, want, rtol=1e-4)


@pytest.mark.usefixtures("one_process")
def test_fsdp2() -> None:
    """Weights are whole and plain while a layer runs."""
    model: Any = build_model().train()
    want = gradients(model)
    fused = FusedNorms(model)
    with fused.attached():  # as the trainer: before the model is sharded
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        got = gradients(model)
        assert fused.describe() == "fused, 5 of 5 layers"
    assert_same(got, want, rtol=1e-4)


def test_qwen3() -> None:
    """Norms of queries and keys, too; the logits are the model's own to rounding."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).train()
    want = gradients(model)
    fused = FusedNorms(model)
    with fused.attached():
        got = gradients(model)
        assert fused.describe() == "fused, 9 of 9 layers"
    assert_same(got, want, rtol=1e-4)


# ---- the trainer -------------------------------------------------------------------------------------------


def run(make_trainer: Make, **changes: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """Gradients and log lines of two steps."""
    catcher = GradientCatcher()
    model = build_model()
    trainer = make_trainer(model=model, engine=FixedEngine(), callbacks=[catcher], optim="sgd", **changes)
    trainer.train()
    assert all("forward" not in vars(module) for module in model.modules())
    return catcher.steps, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1}, {"gradient_checkpointing": True}], ids=str)
def test_trainer(make_trainer: Make, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    want, want_lines = run(make_trainer, use_fused_norm=False, **changes)
    assert "RMSNorm layers: the model's forward, use_fused_norm=False\n" in capsys.readouterr().out
    got, got_lines = run(make_trainer, use_fused_norm=True, **changes)
    assert "RMSNorm layers: fused, 5 of 5 layers\n" in capsys.readouterr().out
    assert len(want) == len(want_lines) == len(got) == len(got_lines) == 2
    for want_line, got_line in zip(want_lines, got_lines, strict=True):
        for name in ("loss", "grad_norm"):
            assert got_line[name] == pytest.approx(want_line[name], rel=1e-4, abs=1e-6), name
    for want_grads, got_grads in zip(want, got, strict=True):
        assert_same(got_grads, want_grads, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.parametrize("size", [24, 128, 1024, 4096])
@pytest.mark.parametrize("amp", [False, True])
def test_on_a_gpu(size: int, amp: bool) -> None:
    """bf16: at most twice the own error against fp64, the same bits again, one kernel forward."""
    model = Net(size).to("cuda", BF16)
    x = torch.randn(64, size, generator=torch.Generator().manual_seed(2)).to("cuda", BF16)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to("cuda", BF16)

    def measured() -> dict[str, Tensor]:
        rows = x.detach().requires_grad_()
        model.zero_grad()
        with torch.autocast("cuda", BF16, enabled=amp):
            y = model(rows)
        y.backward(grad)
        weight: Any = model.norm.weight
        assert rows.grad is not None
        return {"y": y.detach(), "x": rows.grad, "weight": weight.grad}

    want = measured()
    with FusedNorms(model, True).attached():
        got, again = measured(), measured()
        with Kernels() as kernels:
            model(x.detach())
    assert kernels.counts == {"_fused_rms_norm": 1}
    exact: Any = copy.deepcopy(model.norm).double()
    x64 = x.double().requires_grad_()
    y64 = exact.weight * x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + 1e-5)
    y64.backward(grad.double())
    assert x64.grad is not None
    for key, value in {"y": y64.detach(), "x": x64.grad, "weight": exact.weight.grad}.items():
        assert torch.equal(got[key], again[key])
        error, allowed = (float((v[key].double() - value).norm() / value.norm()) for v in (got, want))
        assert 0 < error <= 2 * allowed < 0.02, (key, error, allowed)
