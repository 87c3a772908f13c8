"""A model small enough to train in a second, saved as a folder like any other."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer model and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("toy_model")
    words = [
        "<unk>",
        "<end>",
        "<user>",
        "<assistant>",
        *string.digits,
        *string.ascii_letters,
        *" \n.,:*+-=()'?!/",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_settings(toy_model: Path) -> dict[str, Any]:
    """A run of two steps on the toy model."""
    return {
        "model": str(toy_model),
        "dtype": "float32",
        "dataset": {"task": "products", "heldout": 4},
        "reward_funcs": ["number"],
        "lora": {"r": 2, "target_modules": "all-linear"},
        "heldout_samples": 2,
        "seed": 3,
        "max_steps": 2,
        "learning_rate": "1e-3",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "skip_zero_gradient_sequences": False,  # a random model earns nothing: all would be skipped
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture
def write_yaml(tmp_path: Path) -> Any:
    """Write a mapping to a YAML file and return its path."""

    def write(values: Any, name: str = "toy.yaml") -> str:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write
