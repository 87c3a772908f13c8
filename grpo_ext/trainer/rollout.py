"""One generation batch as this rank holds it, and the micro-batches cut from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from grpo_ext.trainer.generation import Completions, Prompt, left_pad, right_pad, unique_rows


@dataclasses.dataclass
class MicroBatch:
    """Tensors of one micro-batch of B rows, trimmed to its own longest prompt P and longest completion T.

    Attributes:
        prompt_ids, prompt_mask: ``(B, P)`` int64, left-padded.
        prompt_first: ``(u,)`` int64, a row of each distinct prompt.
        prompt_of_row: ``(B,)`` int64, the distinct prompt of each row.
        completion_ids, completion_mask: ``(B, T)`` int64, right-padded; the mask says which tokens exist.
        loss_mask: ``(B, T)`` int64, the tokens that are trained on.
        advantages: ``(B,)`` fp32.
        old_logps, ref_logps, sampling_logps: ``(B, T)`` fp32 or None.
        normaliser: divisor of the token-normalised losses.
        new_logps: ``(B, T)`` fp32, set by the forward pass of the update.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompt_first: Tensor
    prompt_of_row: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor
    advantages: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    normaliser: float | None = None
    new_logps: Tensor | None = None


@dataclasses.dataclass
class Sample:
    """n rows of a dataset with the completions made for them, before they are scored.

    Attributes:
        prompts: text or chat messages.
        columns: the dataset's other columns.
        prompt_ids: token ids of each prompt.
        completions: what the engine returned.
        texts: the completions as text, without special tokens.
    """

    prompts: list[Prompt]
    columns: dict[str, list[Any]]
    prompt_ids: list[list[int]]
    completions: Completions
    texts: list[str]

    def replies(self) -> list[Any]:
        """The completions in the form of their prompts: text, or one assistant message."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]


@dataclasses.dataclass
class Rollout:
    """This rank's rows of one generation batch, slice after slice. Plain values, so a checkpoint can hold it.

    Attributes:
        key: ``(epoch, generation)``.
        start: micro-steps of the run before it was made.
        rows_per_slice: rows of a micro-batch.
        prompt_ids, completion_ids: one list of token ids per row.
        trained: whether a row takes part in the loss (a masked truncated completion does not).
        advantages: ``(n,)`` fp32 on the CPU.
        normaliser: divisor of the token-normalised losses.
        tokens_seen: tokens of its prompts and completions over all ranks.
        old_logps, ref_logps: per slice ``(B, T)`` or None; filled in when known.
        sampling_logps: per row one log probability per token, None where the engine reports none.
    """

    key: tuple[int, int]
    start: int
    rows_per_slice: int
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    trained: list[bool]
    advantages: Tensor
    normaliser: float
    tokens_seen: int
    old_logps: list[Tensor | None]
    ref_logps: list[Tensor | None]
    sampling_logps: list[list[float]] | None = None

    def micro_batch(self, slice_index: int, pad_id: int, device: torch.device | str) -> MicroBatch:
        """The tensors of one slice on ``device``."""
        rows = slice(slice_index * self.rows_per_slice, (slice_index + 1) * self.rows_per_slice)
        prompts = self.prompt_ids[rows]
        prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
        completion_ids, completion_mask = right_pad(self.completion_ids[rows], pad_id, device)
        first, which = unique_rows(prompts)
        trained = torch.tensor(self.trained[rows], device=device).unsqueeze(1)
        return MicroBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            prompt_first=torch.tensor(first, device=device),
            prompt_of_row=torch.tensor(which, device=device),
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            loss_mask=completion_mask * trained,
            advantages=self.advantages[rows].to(device),
            old_logps=_to(self.old_logps[slice_index], device),
            ref_logps=_to(self.ref_logps[slice_index], device),
            sampling_logps=self._sampling(rows, completion_ids.shape[1], device),
            normaliser=self.normaliser,
        )

    def _sampling(self, rows: slice, width: int, device: torch.device | str) -> Tensor | None:
        if self.sampling_logps is None:
            return None
        padded = [row + [0.0] * (width - len(row)) for row in self.sampling_logps[rows]]
        return torch.tensor(padded, dtype=torch.float32, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for ``torch.save``."""
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("old_logps", "ref_logps"):
            state[name] = [None if value is None else value.cpu() for value in state[name]]
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Rollout:
        """The inverse of `state_dict`."""
        return cls(**{**state, "key": tuple(state["key"])})


def _to(value: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if value is None else value.to(device)
