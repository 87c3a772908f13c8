"""`modules.attach`: layers, checkpointing and head in one call for a loop of one's own; `detach` removes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fused_layer_cases import BF16, Kernels, adapted
from peft import LoraConfig, get_peft_model
from torch import Tensor
from toys import build_model

import grpo_ext
from grpo_ext import modules
from grpo_ext.modules.lora import CASTS, lora_layers

IDS = torch.randint(7, 30, (2, 6), generator=torch.Generator().manual_seed(0))


def mean_logp(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = grpo_ext.linear_selective_log_softmax(hidden[:, :-1], weight, IDS[:, 1:], bias=bias)
    assert isinstance(found, Tensor)
    return found.mean()


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def trained_in_bf16() -> Any:
    """bf16 weights with an fp32 adapter, as PEFT makes them, whose second factor is not zero."""
    model = adapted().to(BF16).train()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    return model


def test_the_models_own_gradient() -> None:
    model = adapted().train()
    model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).mean().backward()
    want = gradients(model)
    faster = modules.attach(model, checkpointing=True)
    faster.run({"input_ids": IDS, "use_cache": False}, mean_logp).backward()
    got = gradients(model)
    assert len(got) == len(want) > 0
    torch.testing.assert_close(got, want)
    assert [line.split(":")[0] for line in faster.report()] == ["LoRA layers", "RMSNorm layers", "head"]
    faster.detach()


@pytest.mark.parametrize("asked", [True, False])
def test_checkpointing_while_attached(asked: bool) -> None:
    model: Any = build_model()
    with modules.attached(model, checkpointing=asked):
        assert model.is_gradient_checkpointing is asked
    assert not model.is_gradient_checkpointing


def test_casts_serve_forward_and_backward() -> None:
    """One cast of the adapter for a call, used again by the recomputation in backward, and dropped at its end."""
    model = trained_in_bf16()
    faster = modules.attach(model, checkpointing=True)
    with Kernels() as kernels:
        with torch.autocast("cpu", BF16):
            loss = faster.run({"input_ids": IDS, "use_cache": False}, mean_logp)
        assert all(CASTS in vars(layer) for layer in lora_layers(model))
        loss.backward()
    assert kernels.counts["_foreach_copy_"] == 1
    assert all(CASTS not in vars(layer) for layer in lora_layers(model))
    got = gradients(model)
    with no_casts(faster), torch.autocast("cpu", BF16):
        faster.run({"input_ids": IDS, "use_cache": False}, mean_logp).backward()
    torch.testing.assert_close(got, gradients(model), rtol=0, atol=0)


@contextmanager
def no_casts(faster: modules.FasterLayers) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        real = faster.lora.precast_weights
        patch.setattr(faster.lora, "precast_weights", lambda dtype: real(None))
        yield


def test_casts_without_gradient_are_dropped() -> None:
    model = trained_in_bf16()
    faster = modules.attach(model)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        faster.run({"input_ids": IDS}, mean_logp)
    assert all(CASTS not in vars(layer) for layer in lora_layers(model))


def test_a_head_that_cannot_be_replaced() -> None:
    model = get_peft_model(build_model(), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    faster = modules.attach(model)
    with pytest.raises(RuntimeError, match=r"the head has an adapter.*model\(\*\*inputs\)\.logits"):
        faster.run({"input_ids": IDS}, mean_logp)
