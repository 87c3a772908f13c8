"""Prompts and the completions that "generation" returns for them: the same for every trainer."""

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
    """One word per id: ``t7`` is 7. Ids 0 and 1 are padding and the end."""
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
    """Prompts, and for each the completions that "generation" returns: ids, log probabilities and rewards.

    Half of each group is rewarded, so every completion has a gradient and nobody may skip one.

    Args:
        vocabulary: of the ids.
        prompts, group: how many, and completions of each.
        tokens: longest completion.
        spread: lengths as reinforcement learning has them, log-normal with half of ``tokens`` as median and everything
            beyond ``tokens`` cut there, and prompts of 64 to 192 tokens; False: all completions of ``tokens``, all
            prompts of 128.
        seed: of all of it.
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
        """Completions."""
        return len(self.prompt_ids) * self.group

    @property
    def completion_tokens(self) -> int:
        return sum(len(ids) for row in self.completions for ids in row)

    @property
    def all_tokens(self) -> int:
        """Tokens of prompts and completions, the prompt once for each completion; no padding."""
        return self.completion_tokens + self.group * sum(map(len, self.prompt_ids))

    def dataset(self) -> list[dict[str, str]]:
        return [{"prompt": " ".join(f"t{i}" for i in ids)} for ids in self.prompt_ids]

    def reward(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """The reward function of both trainers."""
        return [self._rewards[self._key(ids)] for ids in completion_ids]

    def serve(self, prompt_ids: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and the engine's log probabilities, one completion for each prompt; equal prompts get the next one."""
        assert self.logps is not None, "attach_logps comes first"
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
        """Log probabilities as an engine in other arithmetic would report them: the model's own with some noise."""
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
