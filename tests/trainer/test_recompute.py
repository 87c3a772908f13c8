"""Checkpointing without a graph in the forward: the gradients of no checkpointing, wherever it is chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftType, get_peft_model
from torch import nn
from toys import EOS, PAD, FixedEngine, GradientCatcher, build_model, build_tokenizer, reward_number
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_ext.modules.checkpointing import LAYER_BY_LAYER, checkpointing_arguments
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

Make = Callable[..., GRPOTrainer]


def model_of(model_type: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3, eos_token_id=EOS,
        pad_token_id=PAD, bos_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).train()


def gradients(model: Any, arguments: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    if arguments is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    ids = torch.arange(2, 14).view(2, 6)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ways_of(model: Any) -> list[dict[str, Any]]:
    """How each layer is checkpointed, of those that are."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    return [m._gradient_checkpointing_func.keywords for m in layers if isinstance(m, GradientCheckpointingLayer)]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", sorted(LAYER_BY_LAYER))
def test_same_gradients(model_type: str, adapter: bool) -> None:
    model = model_of(model_type)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    want = gradients(copy.deepcopy(model), None)
    arguments = checkpointing_arguments(model)
    assert arguments == {"use_reentrant": True, "preserve_rng_state": False}
    layers: list[bool] = []
    for name, module in model.named_modules():
        if name.endswith("layers.0"):
            module.register_forward_hook(lambda *_: layers.append(torch.is_grad_enabled()))
    got = gradients(model, arguments)
    assert layers == [False, True]  # without a graph, then once more with it
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("frozen", ["lora", "first layer"])
def test_trainer(make_trainer: Make, frozen: str) -> None:
    """Whole steps, with an adapter of the user's own making or a partly frozen model: no gradient gets lost."""
    steps = []
    for checkpointing in (False, True):
        model: nn.Module = build_model()
        if frozen == "lora":
            torch.manual_seed(3)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        else:
            model.model.embed_tokens.requires_grad_(False)
            model.model.layers[0].requires_grad_(False)
        catcher = GradientCatcher()
        trainer = make_trainer(
            model=model, engine=FixedEngine(), callbacks=[catcher], gradient_checkpointing=checkpointing,
            share_prompts=False,
        )  # fmt: skip
        trainer.train()
        used = [way["use_reentrant"] for way in ways_of(trainer.model)]
        assert used == ([True] * 2 if checkpointing else [])
        assert trainer.args.gradient_checkpointing_kwargs is None
        steps.append(catcher.steps)
    for plain, checkpointed in zip(*steps, strict=True):
        assert plain.keys() == checkpointed.keys()
        for name, value in plain.items():
            torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_left_alone(make_trainer: Make) -> None:
    gpt2 = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    assert checkpointing_arguments(transformers.GPT2LMHeadModel(gpt2)) is None
    trainer = make_trainer(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, engine=FixedEngine()
    )
    trainer.train()
    assert ways_of(trainer.model) == [{"use_reentrant": False}] * 2


def test_other_code_under_a_known_name() -> None:
    class Own(type(build_model())):  # type: ignore[misc]
        """As a checkpoint brings it along: its layers may share what it likes."""

    class Layer(type(build_model().model.layers[0])):  # type: ignore[misc]
        """Likewise."""

    for place, kind in (("", Own), ("model.layers.1", Layer)):
        model = build_model()
        assert checkpointing_arguments(model) is not None
        model.get_submodule(place).__class__ = kind
        assert checkpointing_arguments(model) is None


def test_adapter_with_a_router_of_its_own() -> None:
    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules="all-linear"))
    assert checkpointing_arguments(model) is not None
    model.peft_config["default"].peft_type = PeftType.XLORA
    assert checkpointing_arguments(model) is None


def test_arguments_of_two_trainers(make_config: Callable[..., GRPOConfig]) -> None:
    """What is chosen for one model does not reach another through the arguments that both were given."""
    args = make_config(gradient_checkpointing=True)
    rows = [{"prompt": f"add {i}"} for i in range(20)]
    gpt2 = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=EOS)
    trainers = [
        GRPOTrainer(model, reward_number, args, rows, processing_class=build_tokenizer())
        for model in (build_model(), transformers.GPT2LMHeadModel(gpt2))
    ]
    for trainer in trainers:
        trainer.rollouts.engine = FixedEngine()  # type: ignore[assignment]
        trainer.train()
    assert [ways_of(trainer.model)[0]["use_reentrant"] for trainer in trainers] == [True, False]


def test_dropout_is_drawn_again() -> None:
    assert checkpointing_arguments(build_model(attention_dropout=0.5)) == {
        "use_reentrant": True,
        "preserve_rng_state": True,
    }
