"""Verify that the engine holds the trainer's weights, by log probabilities of a fixed prompt.

The engine reports the 20 most probable next tokens after each of 8 prefixes of one prompt. The trainer computes the
same 160 log probabilities. The prompt is longer than a block of vLLM's prefix cache (128 tokens on the CPU, 16 on
GPUs), so the check also detects stale keys and values. Each prefix requests one new token, because vLLM's
log probabilities of prompt tokens bypass the cache.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.generation.errors import WeightMismatchError
from grpo_ext.generation.vllm.client import Answer
from grpo_ext.generation.vllm.weights import base_of
from grpo_ext.modules.inspection import eval_mode

#: Tokens of the longest prefix, number of prefixes, and log probabilities per prefix.
LENGTH, PREFIXES, TOP = 160, 8, 20

#: Largest mean |engine - trainer|, in nats, that rounding explains. Measured: 5e-7 to 5e-6 in fp32 and 0.1 in bf16,
#: which rounds the logits to steps of 0.06 to 0.125.
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

#: Root mean square change of the trainer's log probabilities, in nats, above which rounding cannot explain it.
NOISE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 0.03}

Ask = Callable[[Sequence[Sequence[int]]], list[Answer]]


class WeightCheck:
    """Compare the log probabilities of engine and trainer after each update.

    The check keeps the values of both as a baseline until the trainer's move by more than rounding. It thus detects an
    engine with stale weights however small the steps.

    Args:
        vocabulary: token ids for the prompt.
        longest: maximum tokens of the engine, prompt and completion together.
        dtype: of the engine's weights; determines the default bound.
        bound: largest mean absolute difference in nats; None = by dtype, ``inf`` = report without raising.
    """

    def __init__(self, vocabulary: Sequence[int], longest: int, dtype: torch.dtype, bound: float | None = None) -> None:
        length = min(LENGTH, longest - 1)
        if length < 1:
            raise ValueError(
                f"the engine accepts {longest} tokens, and a prompt and a completion need at least 2: "
                "raise vllm_max_model_length"
            )
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(vocabulary), (length,), generator=generator).tolist()
        self.prompt = [vocabulary[i] for i in picks]
        self.lengths = list(range(max(1, length - PREFIXES + 1), length + 1))
        self.bound = BOUNDS.get(dtype, 0.5) if bound is None else bound
        self.noise = NOISE.get(dtype, 0.03)
        self._rows: Tensor | None = None
        self._answers: list[Answer] = []

    def __call__(self, model: nn.Module, ask: Ask) -> float:
        """Mean absolute difference of the log probabilities, in nats.

        Args:
            model: the trainer's, unwrapped.
            ask: requests the engine's answers, with their ``first``.

        Raises:
            WeightMismatchError: the difference exceeds the bound, or only the trainer's values changed.
        """
        rows = self.trainer_rows(model)
        answers = ask([self.prompt[:n] for n in self.lengths])
        difference = _differences(answers, rows)
        figure = float(difference.abs().mean())
        trainer_change, engine_change = self._changes(answers, rows)
        if self._rows is None or trainer_change > self.noise or len(self._answers) != len(answers):
            self._rows, self._answers = rows, answers
        if math.isinf(self.bound):
            return figure
        if not figure <= self.bound:
            raise WeightMismatchError(
                f"vLLM's log probabilities of a fixed prompt differ from the trainer's by {figure:.3g} nats on average "
                f"(bound {self.bound:g}): the engine does not hold the trainer's weights. {REMEDY}"
            )
        if trainer_change > self.noise and engine_change < 0.25 * trainer_change:
            raise WeightMismatchError(
                f"updates changed the trainer's log probabilities of a fixed prompt by {trainer_change:.3g} nats, and "
                f"vLLM's by {engine_change:.3g}: the engine still holds older weights. {REMEDY}"
            )
        return figure

    @torch.no_grad()
    def trainer_rows(self, model: Any) -> Tensor:
        """``(prefixes, V)`` fp32 log probabilities of the token after each prefix, on the CPU."""
        device = next(model.parameters()).device
        ids = torch.tensor([self.prompt], device=device)
        rows = len(self.lengths)
        base = getattr(model, "get_base_model", lambda: model)()
        keep = {"logits_to_keep": rows} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
        with eval_mode(model):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits[0]
        return logits[-rows:].float().log_softmax(dim=-1).cpu()

    def _changes(self, answers: Sequence[Answer], rows: Tensor) -> tuple[float, float]:
        """Root mean square change since the baseline, of the trainer and of the engine."""
        if self._rows is None or len(self._answers) != len(answers):
            return 0.0, 0.0
        mine, theirs = [], []
        for i, (now, then) in enumerate(zip(answers, self._answers, strict=True)):
            for token in now.first.keys() & then.first.keys():
                mine.append(float(rows[i, token] - self._rows[i, token]))
                theirs.append(now.first[token] - then.first[token])
        if not mine:
            return 0.0, 0.0
        return (float(torch.tensor(v).square().mean().sqrt()) for v in (mine, theirs))  # type: ignore[return-value]


def ordinary_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return the token ids that model and tokenizer share, without special tokens."""
    embeddings = base_of(model).get_input_embeddings()
    special = set(tokenizer.all_special_ids)
    return [i for i in range(min(len(tokenizer), embeddings.num_embeddings)) if i not in special]


REMEDY = (
    "If it happens again after a restart: set vllm_lora_mode='merged' if an adapter was hot-loaded, try another "
    "version of vLLM, or set use_vllm=False. A server must serve the same model, with "
    "--logprobs-mode processed_logprobs. If the difference is known to be rounding, raise vllm_weight_check_bound."
)


def _differences(answers: Sequence[Answer], rows: Tensor) -> Tensor:
    """Engine minus trainer for every reported token, ``(n,)`` fp32; NaN if there are none."""
    values = [
        value - float(rows[i, token]) for i, answer in enumerate(answers) for token, value in answer.first.items()
    ]
    return torch.tensor(values) if values else torch.tensor([math.nan])
