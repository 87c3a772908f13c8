"""The one-pass loss kernel on a chunk of rows.

The kernel reduces the loss of a ``(B,T)`` batch, but a chunk holds arbitrary rows of that batch. `RowLoss` therefore
passes each chunk as a small batch, with the divisor and advantages that reduce the loss as in the whole batch. If all
tokens have equal weight, the reduction is a divisor. A weight per sequence is multiplied into the advantages: a
positive factor scales the policy term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.packing import none_if_empty
from grpo_ext.advantages import importance_weights
from grpo_ext.config import CLIPPED_LOSS_TYPES, IMPORTANCE_MODES, LEVELS, LOSS_TYPES, LossConfig
from grpo_ext.linear.rows import Rows
from grpo_ext.losses import fits_one_pass
from grpo_ext.vocabulary.statistics import Statistics, kernels

#: Loss types whose reduction weighs the tokens of a sequence by its length.
_PER_SEQUENCE_WEIGHT = ("grpo", "sapo")

#: Position of each constant in ``spec``.
_FIELD = {name: position for position, name in enumerate(_C.LOSS_SPEC_FIELDS)}


def fits_row_loss(config: LossConfig, tensors: PolicyTensors) -> bool:
    """Whether `RowLoss` can express the loss, so that one pass over a chunk's logits suffices."""
    if not fits_one_pass(config, tensors):
        return False
    if config.loss_type in _PER_SEQUENCE_WEIGHT and (config.beta != 0 or config.entropy_coef != 0):
        return False  # the advantage cannot carry the per-sequence weight of the KL term and the bonus
    if config.importance_sampling_level == "token":
        return True
    # On-policy the ratios of a sequence and of its tokens are 1. With one advantage and one weight for the whole
    # completion, token level and sequence level have the same gradient.
    weights = tensors.importance_weights
    return tensors.advantages.dim() == 1 and (weights is None or weights.dim() == 1)


class RowLoss:
    """`grpo_ext::row_loss_` for any rows of a batch whose loss `fits_row_loss`.

    Args:
        spec, transform: see `grpo_ext._ops.loss_spec` and `grpo_ext._ops.logit_transform`.
    """

    def __init__(self, tensors: PolicyTensors, spec: list[float], transform: list[float]) -> None:
        loss_type = LOSS_TYPES[int(spec[_FIELD["loss_type"]])]
        shape = tensors.mask.shape

        def per_token(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            # The kernels read dense memory, and the reshape of one expanded sequence is a view of stride 0.
            return (tensor if tensor.dim() == 2 else tensor.unsqueeze(1)).expand(shape).reshape(-1).contiguous()

        #: Dimension of length 1 in a chunk's batch. The kernel averages sapo over sequences: (rows, 1), else (1, rows).
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
            divisor = tokens.new_full((), sequences * spec[_FIELD["max_completion_length"]])
        elif loss_type == "luspo":
            divisor = tokens.new_full((), float(sequences))
        elif tensors.num_items is not None:
            divisor = torch.where(tensors.num_items > 0, tensors.num_items, 1.0)
        else:
            divisor = tokens
        weights = _weights_of_sequences(tensors, spec)
        optional = (tensors.old_logps, tensors.ref_logps, tensors.sampling_logps, weights)
        self._advantages, self._optional_inputs = advantages, [per_token(t) for t in optional]
        self._divisor, self._entropy_threshold = divisor, tensors.entropy_threshold
        self._spec = list(spec)
        if loss_type in CLIPPED_LOSS_TYPES:
            # These types differ in the reduction only; for dapo the kernel divides by a given number.
            self._spec[_FIELD["loss_type"]] = LOSS_TYPES.index("dapo")
        self._spec[_FIELD["level"]] = LEVELS.index("token")

    def overwrite(
        self, Z: Tensor, ids: Tensor, unmasked: Tensor | None, rows: Rows
    ) -> tuple[Statistics, Tensor | None]:
        """Overwrite logits ``Z (rows,V)`` with their gradient.

        Args:
            unmasked: (rows,) bool; None: all rows are unmasked.

        Returns:
            The rows' statistics, and (rows,) bool: rows whose gradient is not 0. None on a GPU, where it would cost a
            kernel, and with an entropy bonus.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if unmasked is None else unmasked

        def batch(tensor: Tensor) -> Tensor:
            return tensor.unsqueeze(self._axis)

        advantages = self._advantages[rows]
        if self._axis == 1:  # undo the mean over the chunk's rows
            advantages = advantages * mask.numel()
        optional = [None if t is None else batch(t[rows]) for t in self._optional_inputs]
        policy = batch(mask), batch(advantages), *optional, self._divisor, self._entropy_threshold, self._spec
        _, logps, entropy, _, _ = kernels.row_loss_(batch(Z), batch(ids), *policy, self._transform)
        nonzero = None
        if not Z.is_cuda:
            _, coef, entropy_coef, _, _ = kernels.policy_loss(logps, entropy, *policy)
            nonzero = coef.flatten() != 0 if none_if_empty(entropy_coef) is None else None
        return Statistics(logps.flatten(), entropy.flatten(), None), nonzero


def _weights_of_sequences(tensors: PolicyTensors, spec: list[float]) -> Tensor | None:
    """Return the given importance weights, or compute those at sequence level, which need whole sequences.

    None: the kernel computes them for each token, or there are none.
    """
    mode = int(spec[_FIELD["importance_mode"]]) - 1
    weights = tensors.importance_weights
    if weights is not None or mode < 0 or tensors.old_logps is None or tensors.sampling_logps is None:
        return weights
    if not IMPORTANCE_MODES[mode].startswith("sequence"):
        return None
    cap, least = spec[_FIELD["importance_cap"]], spec[_FIELD["importance_min"]]
    old, sampling = tensors.old_logps, tensors.sampling_logps
    return importance_weights(old, sampling, tensors.mask, mode=IMPORTANCE_MODES[mode], cap=cap, min=least)
