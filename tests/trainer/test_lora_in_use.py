"""Fused LoRA layers in whole models: PEFT's methods at run time, wrappers, and the trainer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_layer_cases import INPUTS, Net, adapted, assert_same, both, gradients, layer_of, net, switched, values
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from toys import FixedEngine, GradientCatcher, build_model

from grpo_ext.modules.checkpointing import checkpointing_arguments
from grpo_ext.modules.lora import FusedLora, lora_layers
from grpo_ext.trainer import GRPOTrainer

Make = Callable[..., GRPOTrainer]


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
            served[step] = "run by PEFT" not in fused.describe()
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
        assert fused.describe() == "fused, 0 of 1 layers (1 run by PEFT: no plain lora.Linear)"
    assert torch.equal(model(INPUTS["rows"]), INPUTS["rows"] + 1)


def test_no_layers() -> None:
    model = build_model()
    assert lora_layers(model) == []
    assert FusedLora(model).describe() == "PEFT's forward, the model has no LoRA layers"
    with pytest.raises(ValueError, match="use_fused_lora=True, but the model has no LoRA layers: leave it None"):
        FusedLora(model, True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"use_fused_lora=True, but torch.compile fuses them itself: leave it None"):
        FusedLora(adapted, True, compiled=True)


# ---- around the layers -------------------------------------------------------------------------------------


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
    assert "LoRA layers: PEFT's forward, use_fused_lora=False\n" in capsys.readouterr().out
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
    assert "LoRA layers: fused, 0 of 14 layers (14 run by PEFT: lora_dropout)\n" in capsys.readouterr().out
    make_trainer(engine=FixedEngine()).train()
    assert "LoRA layers" not in capsys.readouterr().out


def test_trainer_refuses(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="use_fused_lora=True, but the model has no LoRA layers"):
        make_trainer(use_fused_lora=True)
    trainer = make_trainer(model=adapted(lora_dropout=0.1), engine=FixedEngine(), use_fused_lora=True)
    with pytest.raises(RuntimeError, match="use_fused_lora=True, but of 14 LoRA layers 14 run by PEFT: lora_dropout"):
        trainer.train()
    assert trainer.state.global_step == 0
