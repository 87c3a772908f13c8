"""This rank's part of a generation batch, and its micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_ext.generation.engine import Completions, Prompt
from grpo_ext.update.micro_batch import MicroBatch, left_pad, right_pad, to_device, unique_rows


@dataclasses.dataclass
class Sample:
    """n rows of a dataset with their completions, not yet scored.

    Attributes:
        prompts: text or chat messages.
        columns: the dataset's other columns.
        prompt_ids: token ids of each prompt.
        completions: the engine's result.
        texts: the completions decoded without special tokens.
    """

    prompts: list[Prompt]
    columns: dict[str, list[Any]]
    prompt_ids: list[list[int]]
    completions: Completions
    texts: list[str]


def replies(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Any]:
    """Completions in the format of their prompts: text, or one assistant message."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


@dataclasses.dataclass
class Rollout:
    """This rank's rows of one generation batch, slice after slice. Checkpoints store the plain values.

    Attributes:
        key: ``(epoch, generation)``.
        start: micro-steps of the run before this generation.
        rows_per_slice: rows of a micro-batch.
        prompt_ids, completion_ids: one list of token ids per row.
        in_loss: whether a row enters the loss; False for a masked truncated completion.
        advantages: ``(n,)`` fp32 on the CPU.
        normaliser: divisor of the token-normalised losses.
        tokens_seen: prompt and completion tokens over all ranks.
        old_logps, ref_logps: per slice ``(B, T)``, or None before they are computed.
        sampling_logps: one log probability per token of each row; None if the engine reports none.
        order: the row at each position of the slices; None = rows in their own order.
        slice_sizes: rows of each slice; None = ``rows_per_slice`` each.
    """

    key: tuple[int, int]
    start: int
    rows_per_slice: int
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    in_loss: list[bool]
    advantages: Tensor
    normaliser: float
    tokens_seen: int
    old_logps: list[Tensor | None]
    ref_logps: list[Tensor | None]
    sampling_logps: list[list[float]] | None = None
    order: list[int] | None = None
    slice_sizes: list[int] | None = None

    def rows_of(self, slice_index: int) -> list[int]:
        """Rows of one slice."""
        if self.slice_sizes is None:
            positions = range(slice_index * self.rows_per_slice, (slice_index + 1) * self.rows_per_slice)
        else:
            first = sum(self.slice_sizes[:slice_index])
            positions = range(first, first + self.slice_sizes[slice_index])
        return list(positions) if self.order is None else [self.order[p] for p in positions]

    def padded_tokens(self, rows: int) -> int:
        """Tokens of ``rows`` rows, each padded to the longest prompt and completion of this batch."""
        return rows * (max(map(len, self.prompt_ids)) + max(map(len, self.completion_ids)))

    def micro_batch(
        self, slice_index: int, pad_id: int, device: torch.device | str, kept: Sequence[int] | None = None
    ) -> MicroBatch:
        """Build the tensors of one slice on ``device``; ``kept``, not empty, selects positions of the slice."""
        rows = self.rows_of(slice_index)
        kept = range(len(rows)) if kept is None else kept
        rows = [rows[position] for position in kept]
        prompts = [self.prompt_ids[row] for row in rows]
        prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
        completion_ids, completion_mask = right_pad([self.completion_ids[row] for row in rows], pad_id, device)
        width = completion_ids.shape[1]
        first, which = unique_rows(prompts)
        in_loss = to_device([self.in_loss[row] for row in rows], device).unsqueeze(1)

        positions = to_device(list(kept), device)

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else to_device(values, device).index_select(0, positions)[:, :width]

        return MicroBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            first_row_of_prompt=to_device(first, device),
            prompt_index=to_device(which, device),
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            loss_mask=completion_mask * in_loss,
            advantages=to_device(self.advantages[rows], device),
            old_logps=part(self.old_logps[slice_index]),
            ref_logps=part(self.ref_logps[slice_index]),
            sampling_logps=self._sampling(rows, width, device),
            normaliser=self.normaliser,
            known_lengths=([len(ids) for ids in prompts], [len(self.completion_ids[row]) for row in rows]),
        )

    def expand_to_slice(self, slice_index: int, kept: Sequence[int], values: Tensor) -> Tensor:
        """Expand values of the positions ``kept`` to the ``(B, T)`` of the slice, with 0 at the other positions."""
        rows = self.rows_of(slice_index)
        width = max(len(self.completion_ids[row]) for row in rows)
        whole = values.new_zeros((len(rows), width))
        whole[list(kept), : values.shape[1]] = values
        return whole

    def _sampling(self, rows: list[int], width: int, device: torch.device | str) -> Tensor | None:
        if self.sampling_logps is None:
            return None
        padded = [self.sampling_logps[row] + [0.0] * (width - len(self.sampling_logps[row])) for row in rows]
        return to_device(torch.tensor(padded, dtype=torch.float32), device)

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
