"""Choose the layout of a micro-batch: the one with the fewest positions among those that work with the model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from grpo_ext.modules.inspection import eval_mode
from grpo_ext.update.layouts.layout import Layout
from grpo_ext.update.layouts.left_aligned import LeftAlignedLayout, reason_for_mask
from grpo_ext.update.layouts.packed import PackedLayout, reason_against_packing
from grpo_ext.update.layouts.padded import PaddedLayout
from grpo_ext.update.layouts.shared_prompt import (
    SharedPromptLayout,
    UnsharableStateError,
    least_saving_on_gpu,
    saved_positions,
    shared_positions,
)
from grpo_ext.update.micro_batch import MicroBatch

#: Parameters that a model's forward must have for any layout but `PaddedLayout`.
NEEDED = frozenset({"position_ids", "use_cache", "logits_to_keep"})


class LayoutChooser:
    """Choose a layout for each micro-batch of one model.

    The first micro-batch tests packing and left alignment once each, in eval mode and without gradients. A model whose
    logits change under the test keeps its padding or its mask.

    Args:
        model: the causal language model, unwrapped; its forward signature determines the inputs.
        share_prompts: allow the shared-prompt layout. Pass False under gradient checkpointing, which drops the cache,
            and with several processes, whose wrappers expect one forward per backward. On a GPU the layout is used only
            if it saves more time than its extra pass costs, see `least_saving_on_gpu`.
        padding_free: allow the packed layout.

    Attributes:
        positions: token positions that went through the model so far.
        padded_because: why ``padding_free`` is not in effect; None if it is, or before the first micro-batch.
        masked_because: why rows keep an attention mask; None if they do not, or before the first micro-batch.
    """

    def __init__(self, model: nn.Module, share_prompts: bool = True, padding_free: bool = False) -> None:
        base: Any = getattr(model, "get_base_model", lambda: model)()
        self._parameters = frozenset(inspect.signature(base.forward).parameters)
        complete = self._parameters >= NEEDED
        missing = None if complete else "the model's forward takes no position_ids, use_cache and logits_to_keep"
        self.share_prompts = share_prompts and complete
        self._least_saving = {"cuda": least_saving_on_gpu(base)}  # by device type
        self.positions = 0
        self.padding_free = padding_free
        self.padded_because: str | None = None
        self.masked_because = missing
        self._packing_proven = self._alignment_proven = False
        if padding_free and missing is not None:
            self.stop_packing(missing)

    def stop_packing(self, reason: str) -> None:
        """Pad all later micro-batches."""
        self.padding_free, self.padded_because = False, reason

    def choose(self, model: nn.Module, batch: MicroBatch, *, for_logits: bool = False) -> Layout:
        """Choose and build the layout of ``batch``.

        May run the model, for the tests and for the prompts of the shared-prompt layout.

        Args:
            model: the model that will run, wrapped or not.
            for_logits: the model returns logits, so only layouts whose `completion_rows` is a view are allowed.
        """
        layout: Layout | None = None
        if not for_logits:
            layout = self._packed(model, batch) or self._left_aligned(model, batch)
        if layout is None:
            layout = self._shared(model, batch) or PaddedLayout(batch, self._parameters)
        self.positions += layout.positions
        return layout

    def _packed(self, model: nn.Module, batch: MicroBatch) -> PackedLayout | None:
        if not self.padding_free:
            return None
        if not self._packing_proven:
            with torch.no_grad(), eval_mode(model):
                reason = reason_against_packing(model, batch)
            if reason is not None:
                self.stop_packing(reason)
                return None
            self._packing_proven = True
        packed = PackedLayout(batch)
        return None if self._sharing_pays(batch) and shared_positions(batch) < packed.positions else packed

    def _left_aligned(self, model: nn.Module, batch: MicroBatch) -> LeftAlignedLayout | None:
        if self.masked_because is not None or self._sharing_pays(batch):
            return None
        if not self._alignment_proven:
            with torch.no_grad(), eval_mode(model):
                self.masked_because = reason_for_mask(model, batch)
            self._alignment_proven = True
        return None if self.masked_because is not None else LeftAlignedLayout(batch)

    def _shared(self, model: nn.Module, batch: MicroBatch) -> SharedPromptLayout | None:
        if not self._sharing_pays(batch):
            return None
        try:
            return SharedPromptLayout(model, batch)
        except UnsharableStateError:
            self.share_prompts = False
            return None

    def _sharing_pays(self, batch: MicroBatch) -> bool:
        saved = saved_positions(batch)
        return self.share_prompts and saved > 0 and saved >= self._least_saving.get(batch.prompt_ids.device.type, 0)
