"""The loss from the hidden states equals the loss from the logits, whatever the architecture; or says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from toys import EOS, PAD, WORDS, FixedEngine, build_model

from grpo_ext import LossConfig
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.modules.inspection import causal_lm, output_layer
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.trainer import GRPOTrainer
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.loss import ModelPass
from grpo_ext.update.micro_batch import MicroBatch

Make = Callable[..., GRPOTrainer]

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "bos_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

#: Class prefix of transformers, fields beyond the sizes, and what its logits are: (scale, softcap).
ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[float, float | None]]] = {
    "Qwen2": ({}, (1.0, None)),
    "Qwen3": ({"tie_word_embeddings": True}, (1.0, None)),
    "Llama": ({}, (1.0, None)),
    "Mistral": ({"sliding_window": None}, (1.0, None)),
    "Gemma2": ({"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, (1.0, 2.0)),
    "Gemma3": ({"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "Cohere": ({"logit_scale": 0.25}, (0.25, None)),
    "Granite": ({"logits_scaling": 4.0}, (0.25, None)),
    "Qwen3Moe": (MOE, (1.0, None)),
    "Mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, (1.0, None)),
    "GPT2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}, (1.0, None)),  # other names for everything
}


def architecture(name: str) -> nn.Module:
    torch.manual_seed(0)
    fields = ARCHITECTURES[name][0]
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config = getattr(transformers, config_name)(**{**SIZES, **fields})
    return getattr(transformers, head)(config).eval()


def micro_batch() -> MicroBatch:
    """Two prompts of different length, one of them twice; one completion is not trained on."""
    rollout = Rollout(
        key=(0, 0),
        start=0,
        rows_per_slice=4,
        prompt_ids=[[5, 8, 6], [5, 8, 6], [5, 9, 9, 6], [5, 9, 9, 6]],
        completion_ids=[[9, 8, EOS], [9], [10, 11], [3, EOS]],
        in_loss=[True, True, False, True],
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        normaliser=7.0,
        tokens_seen=0,
        old_logps=[None],
        ref_logps=[None],
    )
    return rollout.micro_batch(0, PAD, "cpu")


def results(
    model: nn.Module, fused: bool, config: LossConfig, batch: MicroBatch, share: bool = True
) -> tuple[ModelPass, dict[str, torch.Tensor]]:
    """Loss, log probabilities (with and without gradient) and every gradient."""
    policy = ModelPass(LayoutChooser(model, share), FusedHead(model, fused or False), config)
    model.zero_grad()
    output = policy.loss(model, batch)
    output.loss.backward()
    values = {"loss": output.loss.detach(), "logps": output.logps, "entropy": output.entropy}
    values |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    values["kept logps"] = policy.logps(model, batch) * batch.completion_mask
    return policy, values


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        bound = 2e-5 * max(float(value.abs().max()), 1e-3)
        torch.testing.assert_close(got[name], value, rtol=2e-5, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_logits_path(name: str, share: bool) -> None:
    model, batch = architecture(name), micro_batch()
    config = LossConfig(temperature=0.7, beta=0.1, entropy_coef=0.01)
    generator = torch.Generator().manual_seed(1)
    batch.ref_logps = -3 + 0.3 * torch.randn(batch.completion_ids.shape, generator=generator)
    batch.old_logps = batch.ref_logps + 0.1
    policy, fused = results(model, True, config, batch, share)
    _, plain = results(model, False, config, batch, share)
    assert policy.head.describe() == "fused head"
    assert (policy.head.logit_scale, policy.head.logit_softcap) == ARCHITECTURES[name][1]
    assert_same(fused, plain)
    assert "forward" not in causal_lm(model).__dict__  # left as it was


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_frozen_head_under_lora(loss_type: str, level: str) -> None:
    model = get_peft_model(
        build_model(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level)  # type: ignore[arg-type]
    policy, fused = results(model, True, config, micro_batch())
    _, plain = results(model, False, config, micro_batch())
    assert policy.head.describe() == "fused head"
    assert all("lora" in n for n in fused if "." in n)
    assert_same(fused, plain)


def test_head_trained_beside_an_adapter() -> None:
    """modules_to_save: the copy in use is the head; with the adapter off it is the original."""
    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        output_layer(causal_lm(model)).weight.mul_(1.5)
    policy, fused = results(model, True, LossConfig(), micro_batch())
    _, plain = results(model, False, LossConfig(), micro_batch())
    assert policy.head.describe() == "fused head"
    assert any("modules_to_save" in n for n in fused)
    assert_same(fused, plain)
    with model.disable_adapter():
        off = policy.logps(model, micro_batch())
        want = ModelPass(LayoutChooser(model), FusedHead(model, False), LossConfig()).logps(model, micro_batch())
    torch.testing.assert_close(off, want)
    assert (off - fused["kept logps"]).abs().max() > 1e-2


def test_autocast_keeps_the_dtype_of_the_products() -> None:
    model, batch = build_model(), micro_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, fused = results(model, True, LossConfig(), batch)
        _, plain = results(model, False, LossConfig(), batch)
    for name, value in plain.items():  # both are rounded to 8 bits on the way, at different places
        assert (fused[name] - value).norm() <= 2e-2 * value.norm() + 1e-6, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.parametrize("trained", [False, True])
def test_on_a_gpu(trained: bool) -> None:
    """bf16, a vocabulary of ordinary size: the same loss and gradients to rounding, in less memory."""
    config = transformers.Qwen2Config(**{**SIZES, "vocab_size": 50257, "hidden_size": 64, "head_dim": 32})
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).to("cuda", torch.bfloat16)
    model.lm_head.requires_grad_(trained)
    ids = torch.randint(2, 50257, (32, 40)).tolist()
    rollout = Rollout(
        key=(0, 0), start=0, rows_per_slice=32, prompt_ids=[[5, 8, 6]] * 32, completion_ids=ids, in_loss=[True] * 32,
        advantages=torch.randn(32), normaliser=1280.0, tokens_seen=0, old_logps=[None], ref_logps=[None],
    )  # fmt: skip
    batch = rollout.micro_batch(0, PAD, "cuda")
    peaks, outcomes = [], []
    for fused in (True, False):
        results(model, fused, LossConfig(), batch)  # warm
        torch.cuda.reset_peak_memory_stats()
        outcomes.append(results(model, fused, LossConfig(), batch)[1])
        peaks.append(torch.cuda.max_memory_allocated())
    for name, value in outcomes[1].items():
        assert (outcomes[0][name] - value).float().norm() <= 3e-2 * value.float().norm() + 1e-6, name
    assert peaks[0] < peaks[1]


class Doubled(transformers.Qwen2ForCausalLM):
    """Changes its logits in a way that no config field names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class WithBias(Doubled):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = transformers.Qwen2ForCausalLM.forward(self, *args, **kwargs)
        output.logits = output.logits.view(-1, output.logits.shape[1], len(WORDS))[:4] + 1
        return output


class Elsewhere(Doubled):
    """Multiplies by the head's weight without calling the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        output = self.model(*args, **kwargs)
        output.logits = output.last_hidden_state @ self.lm_head.weight.t()
        return output


class NeedsTheBatch(Doubled):
    """Reads its logits row by row of the batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = transformers.Qwen2ForCausalLM.forward(self, *args, **kwargs)
        output.logits = torch.stack([output.logits[i] for i in range(4)])
        return output


def changed(kind: type[nn.Module]) -> nn.Module:
    model = build_model()
    model.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: changed(Doubled), "transforms its logits after the head in a way that its config does not state"),
        (lambda: changed(WithBias), "transforms its logits after the head"),
        (lambda: changed(Elsewhere), "called its output layer 0 times"),
        (lambda: changed(NeedsTheBatch), r"needs the logits themselves \(IndexError\)"),
        (
            lambda: get_peft_model(build_model(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"])),
            "the head has an adapter",
        ),
    ],
    ids=["doubled", "bias", "head-not-called", "needs-the-batch", "lora-on-the-head"],
)
def test_logits_path_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model, batch = make(), micro_batch()
    # No sharing: the strange models above take whole batches only.
    policy = ModelPass(LayoutChooser(model, False), FusedHead(model), LossConfig())
    loss = policy.loss(model, batch).loss
    assert policy.head.describe().startswith("logits: ")
    assert policy.head.reason is not None
    with pytest.raises((ValueError, RuntimeError), match=f"use_fused_head=True, but .*{reason}"):
        ModelPass(LayoutChooser(model, False), FusedHead(model, True), LossConfig()).loss(model, batch)
    want = ModelPass(LayoutChooser(model, False), FusedHead(model, False), LossConfig()).loss(model, batch).loss
    torch.testing.assert_close(loss, want)
    loss.backward()


class ScaledHead(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_heads_that_are_no_plain_linear() -> None:
    model = build_model()
    other = copy.deepcopy(model)
    other.lm_head.__class__ = ScaledHead
    assert FusedHead(other).describe() == "logits: the head is a ScaledHead, not a plain torch.nn.Linear"
    assert FusedHead(nn.Linear(2, 2)).describe() == "logits: the model has no get_output_embeddings()"
    assert FusedHead(model, compiled=True).reason == "torch.compile keeps the model's own head in its graph"
    assert FusedHead(model, False).describe() == "logits: use_fused_head=False"


def test_errors_of_later_calls_are_not_swallowed() -> None:
    model, batch = build_model(), micro_batch()
    policy = ModelPass(LayoutChooser(model), FusedHead(model), LossConfig())
    policy.loss(model, batch)
    advantages, batch.advantages = batch.advantages, batch.advantages[:2]
    with pytest.raises(ValueError, match="advantages must be"):
        policy.loss(model, batch)
    batch.advantages = advantages
    batch.completion_ids[0, 0] = len(WORDS)
    passes = policy.passes
    with pytest.raises(IndexError, match="out of range"):
        policy.loss(model, batch)
    assert policy.passes == passes  # no second try from logits
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert not model.lm_head._forward_hooks


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "fused head"),
        ({"use_fused_head": False}, "logits: use_fused_head=False"),
        ({"peft_config": LoraConfig(r=2, target_modules=["lm_head"])}, "logits: the head has an adapter"),
    ],
    ids=["automatic", "off", "lora-head"],
)
def test_trainer_says_which_path(
    make_trainer: Make, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], path: str
) -> None:
    trainer = make_trainer(engine=FixedEngine(), max_steps=2, **changes)
    trainer.train()
    assert capsys.readouterr().out.count("loss from ") == 1
    assert trainer.loss_path.startswith(path)
    assert [line["fused_head"] for line in trainer.state.log_history[:2]] == [float(path == "fused head")] * 2


def test_trainer_refuses_what_cannot_be(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"use_fused_head=True, but the head has an adapter .*leave it"):
        make_trainer(use_fused_head=True, peft_config=LoraConfig(r=2, target_modules=["lm_head"]))


def test_both_paths_train_alike(make_trainer: Make) -> None:
    """Three steps with a reference model and off-policy slices: the same weights to rounding."""
    weights = []
    for fused in (True, False):
        trainer = make_trainer(
            engine=FixedEngine(), use_fused_head=fused, beta=0.1, steps_per_generation=2, max_steps=3, optim="sgd"
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
