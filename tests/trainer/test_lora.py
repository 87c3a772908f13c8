"""Fused LoRA layers beside PEFT's own: same outputs, gradients and steps, and PEFT's forward wherever it is due."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from toys import FixedEngine, GradientCatcher, build_model

from grpo_ext.trainer import GRPOTrainer
from grpo_ext.trainer.lora import FusedLora, lora_layers
from grpo_ext.trainer.recompute import checkpointing_arguments

Make = Callable[..., GRPOTrainer]
BF16 = torch.bfloat16


class Net(nn.Module):
    """One linear layer, of 24 features to 20."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 20, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def net(*, bias: bool = False, weights: torch.dtype = torch.float32, autocast_adapter: bool = True, **lora: Any) -> Any:
    """With an adapter that does something."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["linear"], "init_lora_weights": False, **lora}
    model = get_peft_model(Net(bias).to(weights), LoraConfig(**options), autocast_adapter_dtype=autocast_adapter)
    return model.train()


def layer_of(model: Any) -> Any:
    return model.base_model.model.linear


def values(model: Any, x: Tensor, amp: bool = False) -> dict[str, Tensor]:
    """Output and gradients of a call, by the names of the parameters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=amp):
        y = model(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads} | ({} if x.grad is None else {"x": x.grad})


def both(model: Any, x: Tensor, amp: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """PEFT's and the fused layer's, and what served the second."""
    fused = FusedLora(model)
    want = values(model, x, amp)
    with fused.attached():
        got = values(model, x, amp)
        return want, got, fused.describe()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


INPUTS = {
    "vector": torch.randn(24, generator=torch.Generator().manual_seed(1)),
    "rows": torch.randn(5, 24, generator=torch.Generator().manual_seed(2)),
    "batch": torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3)),
    "strided": torch.randn(24, 3, 2, generator=torch.Generator().manual_seed(4)).permute(2, 1, 0),
    "no rows": torch.zeros(2, 0, 24),
}


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


class Kernels(TorchDispatchMode):
    """Counts what a device would be asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name != "aten::detach":
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


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


@contextmanager
def switched(model: Any, on: bool) -> Iterator[FusedLora]:
    fused = FusedLora(model, None if on else False)
    with fused.attached():
        yield fused


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
    "other adapter": ({}, "the active adapter leaves it alone"),
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
                assert fused.describe() == f"fused, 0 of 1 layers (1 left to PEFT: {reason})"
    assert_same(results[1], results[0], rtol=0, atol=0)


def test_fp64_under_autocast() -> None:
    """Autocast leaves fp64 alone, so it is not this module's to convert."""
    model = net().double()
    want, got, served = both(model, INPUTS["rows"].double(), amp=True)
    assert "1 left to PEFT: x in torch.float64" in served
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
            assert fused.describe() == "fused, 0 of 1 layers (1 left to PEFT: hooks on all modules)"
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
        assert "(1 left to PEFT: a part is no plain torch.nn.Linear but Conv1D)" in fused.describe()


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
        assert fused.describe() == "fused, 2 of 3 layers (1 left to PEFT: no plain lora.Linear)"
        fused.wanted = True
        with pytest.raises(RuntimeError, match=r"use_fused_lora=True, but of 3 LoRA layers 1 left .*; leave it None"):
            fused.describe()


def test_adapter_names_in_a_batch() -> None:
    model = net().eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    names = ["default", "second"]
    want = model(INPUTS["batch"], adapter_names=names)
    with switched(model, True) as fused:
        torch.testing.assert_close(model(INPUTS["batch"], adapter_names=names), want, rtol=0, atol=0)
        assert "arguments beside x" in fused.describe()
    assert not torch.equal(want, model(INPUTS["batch"]))


# ---- PEFT's methods at run time ----------------------------------------------------------------------------


def test_switching() -> None:
    """Everything that changes an adapter between two calls is seen in the next."""
    model = net()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    x = INPUTS["batch"]

    def walk() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield "default", values(model, x)
        model.set_adapter("second")
        yield "second", values(model, x)
        with model.disable_adapter():
            yield "disabled", values(model, x)
        yield "enabled", values(model, x)
        model.merge_adapter()
        yield "merged", values(model, x)
        model.unmerge_adapter()
        yield "unmerged", values(model, x)
        layer_of(model).scale_layer(3)
        yield "scaled", values(model, x)
        layer_of(model).unscale_layer(3)
        model.set_adapter("default")
        yield "default again", values(model, x)

    want = dict(walk())
    served = {}
    got = {}
    with switched(model, True) as fused:
        for step, value in walk():
            got[step] = value
            served[step] = "left to PEFT" not in fused.describe()
    assert [step for step, ours in served.items() if not ours] == ["disabled", "merged"]
    for step in want:
        assert_same(got[step], want[step], atol=1e-5)
    assert not torch.allclose(want["default"]["y"], want["second"]["y"])
    assert not torch.allclose(want["second"]["y"], want["scaled"]["y"])


def test_dropout_in_eval_mode() -> None:
    model = net(lora_dropout=0.5).eval()
    want, got, served = both(model, INPUTS["rows"])
    assert served == "fused, 1 of 1 layers"
    assert_same(got, want)


def test_save_load_merge(tmp_path: Path) -> None:
    x = INPUTS["rows"]
    model = net()
    keys = list(model.state_dict())
    with switched(model, True):
        want = model(x).detach()
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
        torch.testing.assert_close(loaded(x), want)
        whole = io.BytesIO()
        torch.save(model, whole)
        whole.seek(0)
        torch.testing.assert_close(torch.load(whole, weights_only=False)(x), want)
        merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.linear) is nn.Linear
    torch.testing.assert_close(merged(x), want, rtol=1e-5, atol=1e-5)


def test_a_copy_computes_with_its_own_weights() -> None:
    model = net()
    with switched(model, True):
        other = copy.deepcopy(model)
        layer_of(other).lora_B["default"].weight.data.zero_()
        torch.testing.assert_close(other(INPUTS["rows"]), layer_of(model).base_layer(INPUTS["rows"]))


def test_nothing_stays_behind() -> None:
    model = net()
    before = set(vars(layer_of(model)))
    with switched(model, True):
        model(INPUTS["rows"])
        assert set(vars(layer_of(model))) != before
    assert set(vars(layer_of(model))) == before
    with pytest.raises(RuntimeError, match="shape"), switched(model, True):
        model(INPUTS["rows"][:, 1:])
    assert set(vars(layer_of(model))) == before


def test_forward_that_somebody_replaced() -> None:
    """Neither taken over nor taken away."""
    model = net()
    layer_of(model).forward = lambda x: x + 1
    with switched(model, True) as fused:
        assert torch.equal(model(INPUTS["rows"]), INPUTS["rows"] + 1)
        assert fused.describe() == "fused, 0 of 1 layers (1 left to PEFT: no plain lora.Linear)"
    assert torch.equal(model(INPUTS["rows"]), INPUTS["rows"] + 1)


def test_no_layers() -> None:
    model = build_model()
    assert lora_layers(model) == []
    assert FusedLora(model).describe() == "PEFT's own, the model has no LoRA layers"
    with pytest.raises(ValueError, match="use_fused_lora=True, but the model has no LoRA layers: leave it None"):
        FusedLora(model, True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"use_fused_lora=True, but torch.compile fuses them itself: leave it None"):
        FusedLora(adapted, True, compiled=True)


# ---- around the layers -------------------------------------------------------------------------------------


def adapted(seed: int = 3, **lora: Any) -> Any:
    model = build_model()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **lora)).train()


def gradients(model: Any, call: Any = None) -> dict[str, Tensor]:
    ids = torch.arange(2, 14).view(2, 6)
    model.zero_grad()
    logits = (model if call is None else call)(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = adapted()
    want = gradients(model)
    arguments = checkpointing_arguments(model)  # makes the embeddings ask for a gradient, as reentrant needs it
    assert arguments is not None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={**arguments, "use_reentrant": reentrant})
    with switched(model, True) as fused:
        got = gradients(model)
        assert fused.describe() == "fused, 14 of 14 layers"
    assert_same(got, want, rtol=1e-4)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_wrapped(kind: str, checkpointing: bool) -> None:
    """DDP, and FSDP2, whose weights are whole and plain while a layer runs."""
    model = adapted()
    want = gradients(model)
    call: Any = model
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kind == "ddp":
        call = DistributedDataParallel(model)
    else:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with switched(model, True) as fused:
        got = gradients(model, call)
        assert fused.describe() == "fused, 14 of 14 layers"
    assert_same(got, want, rtol=1e-4)


@pytest.mark.usefixtures("one_process")
def test_sharded_weights() -> None:
    """Tensor parallel ones are PEFT's."""
    model = net()
    mesh = init_device_mesh("cpu", (1,))
    want = model(INPUTS["rows"])
    for part in (layer_of(model).base_layer, layer_of(model).lora_A["default"], layer_of(model).lora_B["default"]):
        weight = distribute_tensor(part.weight.detach(), mesh, [Replicate()])
        part.weight = nn.Parameter(weight, requires_grad=part.weight.requires_grad)
    with switched(model, True) as fused:
        got: Any = model(distribute_tensor(INPUTS["rows"], mesh, [Replicate()]))
        assert "a weight is no plain torch.nn.Parameter" in fused.describe()
    torch.testing.assert_close(got.full_tensor(), want)


# ---- the trainer -------------------------------------------------------------------------------------------


def run(make_trainer: Make, **changes: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """Gradients and log lines of two steps."""
    catcher = GradientCatcher()
    model = adapted()
    trainer = make_trainer(model=model, engine=FixedEngine(), callbacks=[catcher], optim="sgd", **changes)
    trainer.train()
    assert all("forward" not in vars(layer) for layer in lora_layers(model))
    return catcher.steps, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("changes", [{}, {"beta": 0.1}, {"gradient_checkpointing": True}], ids=str)
def test_trainer(make_trainer: Make, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]) -> None:
    """The same steps with and without; with beta the reference is the model without its adapter."""
    want, want_lines = run(make_trainer, use_fused_lora=False, **changes)
    assert "LoRA layers: PEFT's own, use_fused_lora=False\n" in capsys.readouterr().out
    got, got_lines = run(make_trainer, use_fused_lora=True, **changes)
    assert "LoRA layers: fused, 14 of 14 layers\n" in capsys.readouterr().out
    assert len(want) == len(want_lines) == len(got) == len(got_lines) == 2
    for want_line, got_line in zip(want_lines, got_lines, strict=True):
        for name in ("loss", "grad_norm", *(["kl"] if "beta" in changes else [])):
            assert got_line[name] == pytest.approx(want_line[name], rel=1e-4, abs=1e-6), name
    for want_grads, got_grads in zip(want, got, strict=True):
        assert_same(got_grads, want_grads, rtol=1e-4)


def test_trainer_in_bf16(make_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step's gradient is as near to that of fp32 as PEFT's."""
    exact, peft, ours = (
        torch.cat([grad.flatten() for grad in run(make_trainer, **changes)[0][0].values()])
        for changes in ({"use_fused_lora": False}, {"use_fused_lora": False, "bf16": True}, {"bf16": True})
    )
    assert "LoRA layers: fused, 14 of 14 layers\n" in capsys.readouterr().out
    assert 0 < (ours - exact).norm() <= 2 * (peft - exact).norm() < 0.5 * exact.norm()


def test_trainer_says_what_it_left(make_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(model=adapted(lora_dropout=0.1), engine=FixedEngine()).train()
    assert "LoRA layers: fused, 0 of 14 layers (14 left to PEFT: lora_dropout)\n" in capsys.readouterr().out
    make_trainer(engine=FixedEngine()).train()
    assert "LoRA layers" not in capsys.readouterr().out


def test_trainer_refuses(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="use_fused_lora=True, but the model has no LoRA layers"):
        make_trainer(use_fused_lora=True)
    trainer = make_trainer(model=adapted(lora_dropout=0.1), engine=FixedEngine(), use_fused_lora=True)
    with pytest.raises(RuntimeError, match="use_fused_lora=True, but of 14 LoRA layers 14 left to PEFT: lora_dropout"):
        trainer.train()
    assert trainer.state.global_step == 0
