"""One generation batch as this rank holds it, and the micro-batches cut from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_ext.generation.engine import Completions, Prompt
from grpo_ext.update.micro_batch import MicroBatch, left_pad, right_pad, unique_rows


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


def replies(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Any]:
    """Completions in the form of their prompts: text, or one assistant message."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
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
        order: the row at each position of the slices; None: as they come.
        sizes: rows of each slice; None: rows_per_slice.
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
    order: list[int] | None = None
    sizes: list[int] | None = None

    def rows_of(self, slice_index: int) -> list[int]:
        """Rows of one slice."""
        if self.sizes is None:
            positions = range(slice_index * self.rows_per_slice, (slice_index + 1) * self.rows_per_slice)
        else:
            first = sum(self.sizes[:slice_index])
            positions = range(first, first + self.sizes[slice_index])
        return list(positions) if self.order is None else [self.order[p] for p in positions]

    def padded_tokens(self, rows: int) -> int:
        """Positions of so many rows when each is padded to the longest prompt and completion of the whole batch."""
        return rows * (max(map(len, self.prompt_ids)) + max(map(len, self.completion_ids)))

    def micro_batch(
        self, slice_index: int, pad_id: int, device: torch.device | str, keep: Sequence[int] | None = None
    ) -> MicroBatch:
        """The tensors of one slice on ``device``, or of the rows at the positions ``keep`` of it, at least one."""
        rows = self.rows_of(slice_index)
        keep = range(len(rows)) if keep is None else keep
        rows = [rows[position] for position in keep]
        prompts = [self.prompt_ids[row] for row in rows]
        prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
        completion_ids, completion_mask = right_pad([self.completion_ids[row] for row in rows], pad_id, device)
        width = completion_ids.shape[1]
        first, which = unique_rows(prompts)
        trained = torch.tensor([self.trained[row] for row in rows], device=device).unsqueeze(1)

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)[list(keep), :width]

        return MicroBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            distinct_prompts=torch.tensor(first, device=device),
            prompt_index=torch.tensor(which, device=device),
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            loss_mask=completion_mask * trained,
            advantages=self.advantages[rows].to(device),
            old_logps=part(self.old_logps[slice_index]),
            ref_logps=part(self.ref_logps[slice_index]),
            sampling_logps=self._sampling(rows, width, device),
            normaliser=self.normaliser,
            known_lengths=([len(ids) for ids in prompts], [len(self.completion_ids[row]) for row in rows]),
        )

    def whole_slice(self, slice_index: int, keep: Sequence[int], values: Tensor) -> Tensor:
        """Log probabilities of a micro-batch of the positions ``keep`` as ``(B, T)`` of the whole slice, else 0."""
        rows = self.rows_of(slice_index)
        width = max(len(self.completion_ids[row]) for row in rows)
        whole = values.new_zeros((len(rows), width))
        whole[list(keep), : values.shape[1]] = values
        return whole

    def _sampling(self, rows: list[int], width: int, device: torch.device | str) -> Tensor | None:
        if self.sampling_logps is None:
            return None
        padded = [self.sampling_logps[row] + [0.0] * (width - len(self.sampling_logps[row])) for row in rows]
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
