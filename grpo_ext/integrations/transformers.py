"""Cross entropy for transformers models: ``model.loss_function = causal_lm_loss``.

The loss is the negative log probability of each label, computed by this package's row kernels. They read the logits
twice, in their own dtype, and copy nothing. transformers converts the logits to fp32 and saves a log-softmax of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._checks import Number
from grpo_ext.integrations.row_logps import row_logps


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Number | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    inplace: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Drop-in for ``transformers.loss.loss_utils.ForCausalLMLoss``.

    Args:
        logits: ``(..., T, V)``, fp32, bf16 or fp16.
        labels: ``(..., T)``; row t of the logits predicts label t + 1. Ignored if ``shift_labels`` are given.
        vocab_size: V.
        num_items_in_batch: divisor of the sum; None: the number of labels other than ``ignore_index``.
        ignore_index: label of masked positions.
        shift_labels: ``(..., T)`` or flat; row t predicts label t.
        inplace: backward writes the gradient over the logits, so that the model's output holds the gradient instead of
            logits. ``functools.partial(causal_lm_loss, inplace=False)`` keeps the logits.
        kwargs: further arguments from the model; ignored, as in transformers.

    Returns:
        0-d fp32. If every label is ``ignore_index``, the loss is 0; transformers gives NaN.

    Raises:
        ValueError: if V is not ``vocab_size``, or the labels have another shape. IndexError: for a label outside
        [0, V), on the CPU.
    """
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"logits {tuple(logits.shape)} do not end in vocab_size={vocab_size}: pass those of the head")
    if shift_labels is None:
        if labels is None:
            raise ValueError("pass labels (..., T), or shift_labels")
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels must have the leading shape of the logits {tuple(logits.shape[:-1])}, got "
                f"{tuple(labels.shape)}"
            )
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = logits if logits.dim() == 3 else logits.reshape(1, -1, vocab_size)
    if shift_labels.numel() != rows.shape[0] * rows.shape[1]:
        raise ValueError(
            f"shift_labels must have one label per row of the logits {tuple(logits.shape[:-1])}, got "
            f"{tuple(shift_labels.shape)}"
        )
    ids = shift_labels.to(logits.device).reshape(rows.shape[:-1])
    mask = ids != ignore_index
    total = -row_logps(rows, ids, mask, overwrite=inplace).sum()
    if num_items_in_batch is None:
        return total / mask.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
