"""A toy tokenizer, tiny random models and a stand-in for generation: no network, seconds on one core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from grpo_ext.generation.engine import Completions, SamplingParams

WORDS = ["<eos>", "<pad>", "<unk>", "user:", "assistant:", "add", "=", *[str(i) for i in range(25)]]
EOS, PAD = 0, 1
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def build_tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(kind: str = "qwen2", seed: int = 0, **changes: Any) -> nn.Module:
    """About 10,000 parameters; the initial weights are large enough for logits that differ."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "bos_token_id": None,
        **changes,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


class FixedEngine:
    """Answers every prompt from a seeded generator, whatever the model's weights: gradients can be compared."""

    def __init__(self, seed: int = 0, longest: int = 5, vocabulary: int = len(WORDS), end_share: float = 0.7) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.longest, self.vocabulary, self.end_share = longest, vocabulary, end_share
        self.prompts: list[list[list[int]]] = []

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> Completions:
        self.prompts.append([list(p) for p in prompt_ids])
        ids, finished = [], []
        for _ in prompt_ids:
            n = int(torch.randint(1, self.longest + 1, (), generator=self.generator))
            row = torch.randint(2, self.vocabulary, (n,), generator=self.generator).tolist()
            done = bool(torch.rand((), generator=self.generator) < self.end_share)
            ids.append([*row[:-1], EOS] if done else row)
            finished.append(done)
        return Completions(ids, finished)


def reward_number(completions: list[Any], **_: Any) -> list[float]:
    """A reward that varies with the text: the sum of the characters, folded into [0, 1)."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(ord, text)) % 17 / 17 for text in texts]


class GradientCatcher(TrainerCallback):
    """Keeps the gradients of every optimizer step, as the optimizer is about to see them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
