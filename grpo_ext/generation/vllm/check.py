"""Does the engine hold the trainer's weights? A few hundred log probabilities of a fixed long prompt say so.

Eight prefixes of one prompt go to the engine, which reports its twenty most probable next tokens for each. The
trainer computes the same log probabilities. The prompt is longer than a block of vLLM's prefix cache (128 tokens on
the CPU, 16 on GPUs), so keys and values left over from older weights show too. Prompts are asked for one new token
each: the log probabilities that vLLM reports *of* a prompt bypass that cache.
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
from grpo_ext.modules.inspection import evaluating

#: Longest prefix in tokens, prefixes, and log probabilities of each.
LENGTH, PREFIXES, TOP = 160, 8, 20

#: Largest mean |engine - trainer| that is taken for rounding. Seen: 5e-7 to 5e-6 in fp32, 0.1 in bf16 (the
#: logits themselves are rounded to steps of 0.06 to 0.125 there).
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

#: Root mean square of a change of the trainer's own log probabilities that rounding alone does not make.
NOISE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 0.03}

Ask = Callable[[Sequence[Sequence[int]]], list[Answer]]


class WeightCheck:
    """Compares engine and trainer after each update, and remembers both from when they were last seen to move, so that
    it sees an engine standing still, however small the steps.

    Args:
        vocabulary: ids to build the prompt from.
        longest: tokens that the engine takes, the completion's one included.
        dtype: of the engine's weights; it decides the bound.
        bound: largest mean absolute difference in nats, None = by dtype; ``inf`` reports and never stops.
    """

    def __init__(self, vocabulary: Sequence[int], longest: int, dtype: torch.dtype, bound: float | None = None) -> None:
        length = min(LENGTH, longest - 1)
        if length < 1:
            raise ValueError(f"the engine takes {longest} tokens: a prompt and a completion need at least 2")
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
            ask: answers of the engine, with ``first`` filled in.

        Raises:
            WeightMismatchError: beyond the bound, or when the trainer's values changed and the engine's did not.
        """
        rows = self.trainer_rows(model)
        answers = ask([self.prompt[:n] for n in self.lengths])
        difference = _differences(answers, rows)
        figure = float(difference.abs().mean())
        moved, followed = self._changes(answers, rows)
        if self._rows is None or moved > self.noise or len(self._answers) != len(answers):
            self._rows, self._answers = rows, answers
        if math.isinf(self.bound):
            return figure
        if not figure <= self.bound:
            raise WeightMismatchError(
                f"vLLM's log probabilities of a fixed prompt differ from the trainer's by {figure:.3g} nats on average "
                f"(bound {self.bound:g}): the engine does not hold the trainer's weights. {REMEDY}"
            )
        if moved > self.noise and followed < 0.25 * moved:
            raise WeightMismatchError(
                f"updates moved the trainer's log probabilities of a fixed prompt by {moved:.3g} nats, and "
                f"vLLM's by {followed:.3g}: the engine still holds weights from before. {REMEDY}"
            )
        return figure

    @torch.no_grad()
    def trainer_rows(self, model: Any) -> Tensor:
        """``(prefixes, V)`` fp32 log probabilities of the token after each prefix, on the CPU."""
        device = next(model.parameters()).device
        ids = torch.tensor([self.prompt], device=device)
        rows = len(self.lengths)  # of the last tokens
        base = getattr(model, "get_base_model", lambda: model)()
        keep = {"logits_to_keep": rows} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits[0]
        return logits[-rows:].float().log_softmax(dim=-1).cpu()

    def _changes(self, answers: Sequence[Answer], rows: Tensor) -> tuple[float, float]:
        """Root mean square of what has changed since then in the trainer, and in the engine."""
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


REMEDY = (
    "Where it happens again after a restart, set vllm_lora_mode='merged' if an adapter was being hot-loaded, try "
    "another version of vLLM, or set use_vllm=False; a server must have been started on the same model and with "
    "--logprobs-mode processed_logprobs. "
    "vllm_weight_check_bound raises the bound where the difference is known to be rounding."
)


def _differences(answers: Sequence[Answer], rows: Tensor) -> Tensor:
    """Engine minus trainer for every reported token, ``(n,)`` fp32."""
    values = [
        value - float(rows[i, token]) for i, answer in enumerate(answers) for token, value in answer.first.items()
    ]
    return torch.tensor(values) if values else torch.tensor([math.nan])
