"""Layout whose rows all begin in the first column, so that causal attention needs no mask.

Left-padded prompts need a mask. With a mask torch cannot use FlashAttention: it materializes ``(B, 1, N, N)`` and
repeats grouped keys and values. If all padding follows a row's last token, a causal model cannot attend to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grpo_ext.update.layouts.layout import same_logits, scatter_tokens
from grpo_ext.update.micro_batch import MicroBatch, to_device

#: On a GPU, W is rounded up to a multiple of this: cuDNN builds a plan for every new shape of attention, which takes
#: longer than the attention itself.
GPU_WIDTHS = 64


class LeftAlignedLayout:
    """``(B, W)`` ids, prompt and completion concatenated; W is the length of the longest row without its last token.

    Attributes:
        logits_to_keep: number of trailing columns that include every position which predicts a completion token.
    """

    def __init__(self, batch: MicroBatch) -> None:
        prompts, completions = batch.lengths()
        width = max(p + c for p, c in zip(prompts, completions, strict=True)) - 1
        if batch.prompt_ids.is_cuda:
            width += -width % GPU_WIDTHS
        device = batch.prompt_ids.device
        both = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
        gap = [batch.prompt_ids.shape[1] - p for p in prompts]
        if any(gap):
            columns = torch.tensor(gap).unsqueeze(1) + torch.arange(width)
            self._ids = both.gather(1, to_device(columns.clamp_(max=both.shape[1] - 1), device))
        else:
            self._ids = pad(both[:, :width], (0, max(0, width - both.shape[1])))
        self.positions = self._ids.numel()
        self.logits_to_keep = width - (min(prompts) - 1)
        self._shape = batch.completion_ids.shape
        self._prompts = prompts
        self._gather_index: Tensor | None = None
        if len(set(prompts)) > 1:
            first = [row * self.logits_to_keep + p - min(prompts) for row, p in enumerate(prompts)]
            ranges = [torch.arange(f, f + c) for f, c in zip(first, completions, strict=True)]
            self._gather_index = to_device(torch.cat(ranges), device)
            ranges = [torch.arange(row * self._shape[1], row * self._shape[1] + c) for row, c in enumerate(completions)]
            self._scatter_index = to_device(torch.cat(ranges), device)

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self._ids, "logits_to_keep": self.logits_to_keep, "use_cache": False}

    def first_positions(self) -> Tensor:
        width = self._ids.shape[1]
        return to_device([row * width + p - 1 for row, p in enumerate(self._prompts)], self._ids.device)

    def completion_rows(self, outputs: Tensor) -> Tensor:
        """See `Layout`. Positions without a completion token hold arbitrary values."""
        outputs = outputs[:, -self.logits_to_keep :]
        if self._gather_index is None:
            return outputs[:, : self._shape[1]]
        found = outputs.reshape(-1, outputs.shape[-1]).index_select(0, self._gather_index)
        return scatter_tokens(found, self._scatter_index, self._shape)


def reason_for_mask(model: nn.Module, batch: MicroBatch) -> str | None:
    """Run one sequence with and without tokens after it; return why the model needs a mask, None if it needs none."""
    prompts, completions = batch.lengths()
    row = max(range(len(prompts)), key=lambda r: prompts[r] + completions[r])
    whole = torch.cat([batch.prompt_ids[row, -prompts[row] :], batch.completion_ids[row, : completions[row]]])
    ids = whole[-16:].unsqueeze(0)
    count = ids.shape[1]
    positions = torch.arange(count, device=ids.device).unsqueeze(0)
    expected = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False, logits_to_keep=1
    ).logits[0, -1]
    try:
        followed = torch.cat([ids, (ids == 0).to(ids.dtype)], dim=1)  # append tokens that differ from the sequence's
        got = model(input_ids=followed, use_cache=False, logits_to_keep=count + 1).logits[0, 0]
    except (RuntimeError, ValueError, TypeError) as error:
        return f"the model does not run without a mask ({type(error).__name__})"
    if same_logits(got, expected):
        return None
    return "the model attends to tokens behind the one it predicts from"
