"""Workload of the training benchmarks: prompts with prepared completions, the same for every trainer."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import grpo_ext


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one word per id: ``t7`` is 7. Ids 0 and 1 are padding and end of text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<pad>": 0, "<end>": 1} | {f"t{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


class Workload:
    """Prompts with prepared completions: ids, log probabilities and rewards.

    Half of each group has reward 1, so every completion has a nonzero advantage and no trainer can skip one.

    Args:
        vocabulary: number of ids.
        prompts: number of prompts.
        group: completions per prompt.
        tokens: longest completion.
        spread: True draws completion lengths as in reinforcement learning, log-normal with median ``tokens / 2``,
            truncated at ``tokens``, and prompts of 64 to 192 tokens. False makes every completion ``tokens`` long and
            every prompt 128.
        seed: seed of lengths and ids.
    """

    def __init__(self, vocabulary: int, prompts: int, group: int, tokens: int, spread: bool, seed: int = 0) -> None:
        draw = random.Random(f"workload-{seed}")
        ids = torch.Generator().manual_seed(seed)

        def some(count: int) -> list[int]:
            return torch.randint(2, vocabulary, (count,), generator=ids).tolist()

        short = max(2, min(64, tokens // 8))
        self.group = group
        self.tokens = tokens
        self.prompt_ids = [some(draw.randint(short, 3 * short) if spread else 2 * short) for _ in range(prompts)]

        def length() -> int:
            return max(2, min(tokens, round(tokens / 2 * math.exp(draw.gauss(0, 0.6))))) if spread else tokens

        lengths = [[length() for _ in range(group)] for _ in range(prompts)]
        self.completions = [[some(count) for count in row] for row in lengths]
        self.logps: list[list[list[float]]] | None = None
        self._which = {tuple(ids): index for index, ids in enumerate(self.prompt_ids)}
        self._rewards = {
            self._key(completion): float(number % 2)
            for row in self.completions
            for number, completion in enumerate(row)
        }

    @staticmethod
    def _key(ids: Sequence[int]) -> tuple[int, ...]:
        return (len(ids), *ids[:16])

    @property
    def rows(self) -> int:
        """Number of completions."""
        return len(self.prompt_ids) * self.group

    @property
    def completion_tokens(self) -> int:
        return sum(len(ids) for row in self.completions for ids in row)

    @property
    def all_tokens(self) -> int:
        """Tokens of completions and prompts without padding; each completion counts its prompt again."""
        return self.completion_tokens + self.group * sum(map(len, self.prompt_ids))

    def dataset(self) -> list[dict[str, str]]:
        return [{"prompt": " ".join(f"t{i}" for i in ids)} for ids in self.prompt_ids]

    def reward(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Reward function of both trainers."""
        return [self._rewards[self._key(ids)] for ids in completion_ids]

    def serve(self, prompt_ids: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Return ids and engine log probabilities, one completion per prompt; repeated prompts get successive ones."""
        assert self.logps is not None, "call attach_logps first"
        seen: Counter[int] = Counter()
        ids, logps = [], []
        for prompt in prompt_ids:
            index = self._which[tuple(prompt)]
            number = seen[index] % self.group
            seen[index] += 1
            ids.append(list(self.completions[index][number]))
            logps.append(list(self.logps[index][number]))
        return ids, logps

    @torch.no_grad()
    def attach_logps(self, model: Any, device: torch.device, noise: float = 0.02) -> None:
        """Set the engine's log probabilities: those of the model plus noise, as if computed in other arithmetic."""
        generator = torch.Generator().manual_seed(1)
        self.logps = []
        for prompt, row in zip(self.prompt_ids, self.completions, strict=True):
            width = max(map(len, row))
            ids = torch.zeros(len(row), width, dtype=torch.int64)
            for number, completion in enumerate(row):
                ids[number, : len(completion)] = torch.tensor(completion)
            ids = ids.to(device)
            fed = torch.cat([torch.tensor(prompt, device=device).expand(len(row), -1), ids], dim=1)
            hidden = model.model(input_ids=fed, use_cache=False).last_hidden_state[:, len(prompt) - 1 : -1]
            found: Any = grpo_ext.linear_selective_log_softmax(hidden, model.get_output_embeddings().weight, ids)
            noisy = found.float().cpu() + noise * torch.randn(found.shape, generator=generator)
            self.logps.append([noisy[number, : len(c)].tolist() for number, c in enumerate(row)])
