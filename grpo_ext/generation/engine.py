"""Encode prompts, generate completions with transformers, and cut them after the first end token.

An engine is any object with the ``generate`` method of `GenerationEngine`. Its interface uses lists of token ids, so an
engine may run in another process or on another machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_ext.generation.errors import PromptLengthError
from grpo_ext.modules.inspection import eval_mode
from grpo_ext.modules.prompt_cache import shared_prompt_cache
from grpo_ext.modules.sharding import forward_is_collective
from grpo_ext.update.micro_batch import left_pad, unique_rows

Prompt = str | list[dict[str, Any]]

#: Fields of ``transformers.GenerationConfig``, which accepts unknown fields silently.
KNOWN = frozenset(vars(GenerationConfig()))

#: Callback for a finished completion: index of the prompt, token ids of the completion.
Done = Callable[[int, list[int]], None]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. ``temperature`` 0 is greedy decoding.

    Attributes:
        max_new_tokens: maximum length of a completion.
        temperature, top_p, top_k, min_p, repetition_penalty: as in `GRPOConfig`.
        extra: further fields of ``transformers.GenerationConfig``.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Completions:
    """The completions of n prompts.

    Attributes:
        ids: n lists of at least one token id, the end token included.
        finished: whether each completion ends with an end token.
        sampling_logps: the engine's log probability of each token; None if the engine reports none.
    """

    ids: list[list[int]]
    finished: list[bool]
    sampling_logps: list[list[float]] | None = None


class GenerationEngine(Protocol):
    """Interface between the trainer and a generation backend."""

    def generate(
        self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams, done: Done | None = None
    ) -> Completions:
        """Generate one completion per prompt, in order; equal prompts may share their prefill.

        Args:
            model: unwrapped.
            prompt_ids: token ids of each prompt.
            sampling: sampling parameters.
            done: called once per completion, in any order, as soon as it is finished.
        """
        ...


class PromptEncoder:
    """Encode prompts (text or chat messages) to token ids, and decode ids to text.

    Args:
        tokenizer: with a chat template if prompts are chat messages.
        max_prompt_length: longer prompts keep only this many last tokens; None = no limit.
        context_length: the model's, in tokens; a prompt and ``max_completion_length`` together must fit.
        max_completion_length: maximum length of a completion, in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int | None = None,
        context_length: int | None = None,
        max_completion_length: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.context_length = context_length
        self.max_completion_length = max_completion_length

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode each prompt to token ids; equal prompts are encoded once.

        Raises:
            TypeError: a prompt is neither text nor chat messages.
            ValueError: a prompt has no tokens.
            PromptLengthError: a prompt does not fit the model's context.
        """
        known: dict[str, list[int]] = {}
        encoded = []
        for index, prompt in enumerate(prompts):
            key = repr(prompt)
            if key not in known:
                known[key] = self._encode_one(prompt, index)
            encoded.append(known[key])
        return encoded

    def _encode_one(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
            answering = prompt[-1]["role"] != "assistant"
            ids = self.tokenizer.apply_chat_template(
                prompt,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=answering,
                continue_final_message=not answering,
            )["input_ids"]
            ids = list(ids[0]) if ids and isinstance(ids[0], (list, tuple)) else list(ids)
        else:
            raise TypeError(
                f"prompt {index} is {type(prompt).__name__}: pass text, or a list of chat messages "
                "{'role': ..., 'content': ...}"
            )
        if not ids:
            raise ValueError(f"prompt {index} has no tokens: a model needs at least one to continue from")
        if self.max_prompt_length is not None:
            ids = ids[-self.max_prompt_length :]
        if self.context_length is not None and len(ids) + self.max_completion_length > self.context_length:
            raise PromptLengthError(
                f"prompt {index} has {len(ids)} tokens; with max_completion_length="
                f"{self.max_completion_length} that exceeds the model's context of {self.context_length}: "
                "shorten the prompt, set max_prompt_length="
                f"{max(self.context_length - self.max_completion_length, 0)} (keeps the last tokens) or "
                "lower max_completion_length"
            )
        return ids

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Decode each list of ids to text, without special tokens."""
        return self.tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all end tokens, from the model's generation config and the tokenizer.

    Raises:
        ValueError: neither defines an end token.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError("neither the tokenizer nor the model's generation_config has an eos_token_id: set one")
    return sorted(set(ids))


def cut_after_end(tokens: Tensor, end_ids: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
    """Cut each row after its first end token. The rest is padding, even if pad and end token are the same id.

    Args:
        tokens: ``(n, T)`` int64.
        end_ids: ids that end a completion.

    Returns:
        n lists of ids, and whether each contains an end token.
    """
    is_end = torch.isin(tokens, torch.tensor(list(end_ids), device=tokens.device))
    finished = is_end.any(dim=1)
    lengths = torch.where(finished, is_end.int().argmax(dim=1) + 1, tokens.shape[1])
    return [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)], finished.tolist()


class TransformersEngine:
    """Generate with ``model.generate`` in this process, in eval mode, without gradients.

    Args:
        end_ids: ids that end a completion.
        pad_id: id that pads finished rows; may be one of ``end_ids``.
        share_prompts: prefill each distinct prompt once for all its completions.
    """

    def __init__(self, end_ids: Sequence[int], pad_id: int, share_prompts: bool = True) -> None:
        self.end_ids = list(end_ids)
        self.pad_id = pad_id
        self.share_prompts = share_prompts

    def generate(
        self, model: Any, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams, done: Done | None = None
    ) -> Completions:
        """See `GenerationEngine.generate`."""
        device = next(model.parameters()).device
        first, which = unique_rows(prompt_ids)
        ids, mask = left_pad(prompt_ids, self.pad_id, device)
        width = ids.shape[1]
        config, cuts = self._config(sampling)
        ends: Any = config.eos_token_id  # generation_kwargs may override end_ids
        end_ids = [ends] if isinstance(ends, int) else list(ends or ())
        # Forward passes of a sharded model are collectives: all ranks must run the same number of decoding steps, and
        # none may run an extra prefill for prompts that repeat on that rank only.
        jointly = forward_is_collective(model)
        with torch.no_grad(), eval_mode(model), _replaced_generation_config(model, config):
            cache = None
            if self.share_prompts and not jointly and len(first) < len(which) and width > 1:
                rows = torch.tensor(first, device=device)
                cache = shared_prompt_cache(model, ids[rows], mask[rows], torch.tensor(which, device=device))
                self.share_prompts = cache is not None
            kwargs: dict[str, Any] = {"logits_processor": cuts} | ({} if cache is None else {"past_key_values": cache})
            observer = None if done is None else _CompletionObserver(len(prompt_ids), width, end_ids, done)
            if observer is not None:
                kwargs["stopping_criteria"] = [observer]
            tokens = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=jointly, **kwargs
            )
        completions, finished = cut_after_end(tokens[:, width:], end_ids)
        if observer is not None:
            observer.report_unfinished(completions)
        return Completions(completions, finished)

    def _config(self, sampling: SamplingParams) -> tuple[GenerationConfig, LogitsProcessorList]:
        """Arguments of ``model.generate``: its config, and logits processors if the order of the cuts must change."""
        fields: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "eos_token_id": self.end_ids,
            "pad_token_id": self.pad_id,
            "use_cache": True,
            "repetition_penalty": sampling.repetition_penalty,
        }
        if sampling.temperature > 0:
            fields |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or 0,
            }
            if sampling.min_p:
                fields["min_p"] = sampling.min_p
        unknown = [name for name in sampling.extra if name not in KNOWN]
        if unknown:
            raise ValueError(
                f"generation_kwargs has {unknown[0]!r}, which transformers' GenerationConfig does not have: remove it"
            )
        fields |= sampling.extra
        cuts = LogitsProcessorList()
        min_p, top_k, top_p = fields.get("min_p"), fields.get("top_k"), fields.get("top_p", 1.0)
        # Cut in vLLM's order, min_p first. transformers applies min_p last, which keeps other tokens.
        if fields["do_sample"] and min_p and (top_k or top_p < 1):
            cuts += [TemperatureLogitsWarper(float(fields["temperature"])), MinPLogitsWarper(min_p)]
            if top_k:
                cuts.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                cuts.append(TopPLogitsWarper(top_p))
            fields |= {"temperature": 1.0, "min_p": None, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(**fields), cuts


class _CompletionObserver(StoppingCriteria):
    """Report each row that has just generated an end token. Never stops generation.

    Args:
        rows: rows of the batch.
        width: tokens of the padded prompts.
        end_ids: ids that end a completion.
        done: see `GenerationEngine.generate`.
    """

    def __init__(self, rows: int, width: int, end_ids: Sequence[int], done: Done) -> None:
        self.open = set(range(rows))
        self.width = width
        self.end_ids = frozenset(end_ids)
        self.done = done

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        for row in [row for row in sorted(self.open) if last[row] in self.end_ids]:
            self.open.remove(row)
            self.done(row, input_ids[row, self.width :].tolist())
        return torch.zeros(len(last), dtype=torch.bool, device=input_ids.device)

    def report_unfinished(self, completions: Sequence[list[int]]) -> None:
        """Report the rows without an end token."""
        for row in sorted(self.open):
            self.done(row, completions[row])


@contextlib.contextmanager
def _replaced_generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config, whose defaults (such as top_p = 0.8) would fill unset fields."""
    holders = [m for m in model.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)]
    saved = [m.generation_config for m in holders]
    for module in holders:
        module.generation_config = config
    try:
        yield
    finally:
        for module, previous in zip(holders, saved, strict=True):
            module.generation_config = previous
