"""The one-pass loss kernel on a chunk of compacted rows.

The kernel takes ``(B,T)`` batches, and a chunk is none. But a positive factor on the advantage scales the loss, and a
reduction that weighs all tokens alike is one divisor. So a chunk becomes a batch of its own, whose advantages or
divisor carry the reduction of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.packing import given
from grpo_ext.advantages import importance_weights
from grpo_ext.config import CLIPPED_LOSS_TYPES, IMPORTANCE_MODES, LOSS_TYPES, LossConfig
from grpo_ext.linear.rows import Rows
from grpo_ext.losses import fits_one_pass
from grpo_ext.vocabulary.statistics import Statistics, kernels

_PER_SEQUENCE_WEIGHT = ("grpo", "sapo")


def fits_row_loss(config: LossConfig, tensors: PolicyTensors) -> bool:
    """Whether `RowLoss` can express the loss, so that one pass over a chunk's logits suffices."""
    if not fits_one_pass(config, tensors):
        return False
    if config.loss_type in _PER_SEQUENCE_WEIGHT and (config.beta != 0 or config.entropy_coef != 0):
        return False  # the advantage cannot carry the per-sequence weight of the KL term and the bonus
    if config.importance_sampling_level == "token":
        return True
    # On-policy the ratio of the sequence is 1, and so is that of each token: with one advantage and one weight for the
    # whole completion both levels have the same gradient.
    weights = tensors.importance_weights
    return tensors.advantages.dim() == 1 and (weights is None or weights.dim() == 1)


class RowLoss:
    """`grpo_ext::row_loss_` for any rows of a batch whose loss `fits_row_loss`."""

    def __init__(self, tensors: PolicyTensors, spec: list[float], transform: list[float]) -> None:
        loss_type = LOSS_TYPES[int(spec[_LOSS_TYPE])]
        shape = tensors.mask.shape

        def per_token(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            # The kernels read dense memory: reshape returns one expanded sequence as a view of stride 0.
            return (tensor if tensor.dim() == 2 else tensor.unsqueeze(1)).expand(shape).reshape(-1).contiguous()

        #: sapo keeps its own reduction, a mean over sequences: rows become sequences of one token.
        self._axis = 1 if loss_type == "sapo" else 0
        self._transform = transform
        dtype = tensors.advantages.dtype
        lengths = tensors.mask.sum(dim=1)
        tokens = lengths.sum().clamp(min=1).to(dtype)
        sequences = max(shape[0], 1)
        advantages = per_token(tensors.advantages)
        assert advantages is not None
        divisor: Tensor = tokens.new_ones(())
        if loss_type in _PER_SEQUENCE_WEIGHT:
            weight = 1.0 / (sequences * lengths.clamp(min=1).to(dtype))
            advantages = advantages * weight.unsqueeze(1).expand(shape).reshape(-1)
        elif loss_type == "bnpo":
            divisor = tokens
        elif loss_type == "dr_grpo":
            divisor = tokens.new_full((), sequences * spec[_MAX_COMPLETION_LENGTH])
        elif loss_type == "luspo":
            divisor = tokens.new_full((), float(sequences))
        elif tensors.num_items is not None:
            divisor = torch.where(tensors.num_items > 0, tensors.num_items, 1.0)
        else:
            divisor = tokens
        weights = _weights_of_sequences(tensors, spec)
        companions = (tensors.old_logps, tensors.ref_logps, tensors.sampling_logps, weights)
        self._advantages, self._companions = advantages, [per_token(t) for t in companions]
        self._divisor, self._entropy_threshold = divisor, tensors.entropy_threshold
        self._spec = list(spec)
        if loss_type in CLIPPED_LOSS_TYPES:
            # The clipped objective is the same for all of these; dapo is the one with a divisor.
            self._spec[_LOSS_TYPE] = LOSS_TYPES.index("dapo")
        self._spec[_LEVEL] = 0.0

    def overwrite(
        self, Z: Tensor, ids: Tensor, unmasked: Tensor | None, rows: Rows
    ) -> tuple[Statistics, Tensor | None]:
        """Overwrite logits ``Z (rows,V)`` with their gradient; return statistics and, on the CPU, which rows are not 0.

        Args:
            unmasked: (rows,) bool; None: all of them are.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if unmasked is None else unmasked

        def batch(tensor: Tensor) -> Tensor:
            return tensor.unsqueeze(self._axis)

        advantages = self._advantages[rows]
        if self._axis == 1:  # undo the mean over the chunk's rows
            advantages = advantages * mask.numel()
        companions = [None if t is None else batch(t[rows]) for t in self._companions]
        policy = batch(mask), batch(advantages), *companions, self._divisor, self._entropy_threshold, self._spec
        _, logps, entropy, _, _ = kernels.row_loss_(batch(Z), batch(ids), *policy, self._transform)
        nonzero = None
        if not Z.is_cuda:
            _, coef, entropy_coef, _, _ = kernels.policy_loss(logps, entropy, *policy)
            nonzero = coef.flatten() != 0 if given(entropy_coef) is None else None
        return Statistics(logps.flatten(), entropy.flatten(), None), nonzero


def _weights_of_sequences(tensors: PolicyTensors, spec: list[float]) -> Tensor | None:
    """The importance weights given, or those of whole sequences, which a chunk of rows cannot form."""
    mode = int(spec[_IMPORTANCE_MODE]) - 1
    weights = tensors.importance_weights
    if weights is not None or mode < 0 or tensors.old_logps is None or tensors.sampling_logps is None:
        return weights
    if not IMPORTANCE_MODES[mode].startswith("sequence"):
        return None
    return importance_weights(
        tensors.old_logps,
        tensors.sampling_logps,
        tensors.mask,
        mode=IMPORTANCE_MODES[mode],
        cap=spec[_IMPORTANCE_CAP],
        min=spec[_IMPORTANCE_MIN],
    )


_LOSS_TYPE = _C.LOSS_SPEC_FIELDS.index("loss_type")
_MAX_COMPLETION_LENGTH = _C.LOSS_SPEC_FIELDS.index("max_completion_length")
_IMPORTANCE_MODE = _C.LOSS_SPEC_FIELDS.index("importance_mode")
_IMPORTANCE_CAP = _C.LOSS_SPEC_FIELDS.index("importance_cap")
_IMPORTANCE_MIN = _C.LOSS_SPEC_FIELDS.index("importance_min")
_LEVEL = _C.LOSS_SPEC_FIELDS.index("level")
