"""Token losses on compacted rows: which coefficients are known when, and a chunk's policy arguments.

The row kernels know ``(B,T)`` batches. A chunk of compacted rows is no such batch, but every loss is linear in the
advantage up to its sign, and where the reduction weighs all tokens alike it is one divisor. So the chunk is presented
as a batch of its own whose advantages, or whose divisor, carry the reduction of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._checks import PolicyTensors
from grpo_ext.advantages import importance_weights
from grpo_ext.config import CLIPPED_LOSS_TYPES, IMPORTANCE_MODES, LOSS_TYPES, LossConfig
from grpo_ext.linear.head import Rows
from grpo_ext.losses import fits_one_pass

_PER_SEQUENCE_WEIGHT = ("grpo", "sapo")


def depends_on_own_row(config: LossConfig, tensors: PolicyTensors) -> bool:
    """Whether dLoss/dlogp of a token needs the log probability of no other token."""
    return fits_one_pass(config, tensors) and config.importance_sampling_level == "token"


def depends_on_own_sequence(config: LossConfig, tensors: PolicyTensors) -> bool:
    """Whether the log probabilities of its own completion suffice."""
    return config.top_entropy_quantile >= 1 or tensors.entropy_threshold is not None


def folds_into_rows(config: LossConfig, tensors: PolicyTensors) -> bool:
    """Whether `RowPolicy` can express the loss, so that one pass over a chunk's logits suffices."""
    if not fits_one_pass(config, tensors):
        return False
    if config.loss_type in _PER_SEQUENCE_WEIGHT and (config.beta != 0 or config.entropy_coef != 0):
        return False  # terms beside the advantage, with a weight of their own for each sequence
    if config.importance_sampling_level == "token":
        return True
    # On-policy the ratio of the sequence is 1, and so is that of each token: with one advantage and one weight for the
    # whole completion both levels have the same gradient.
    weights = tensors.importance_weights
    return tensors.advantages.dim() == 1 and (weights is None or weights.dim() == 1)


class RowPolicy:
    """The policy arguments of `grpo_ext::row_loss_` for any rows of a batch; see `folds_into_rows`."""

    def __init__(self, tensors: PolicyTensors, spec: list[float]) -> None:
        loss_type = LOSS_TYPES[int(spec[_LOSS_TYPE])]
        shape = tensors.mask.shape

        def per_token(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            # One sequence, expanded, would stay a view that steps over nothing: the kernels read dense memory.
            return (tensor if tensor.dim() == 2 else tensor.unsqueeze(1)).expand(shape).reshape(-1).contiguous()

        self.tensors = tensors
        #: sapo keeps its own reduction, a mean over sequences: rows become sequences of one token.
        self.as_column = loss_type == "sapo"
        dtype = tensors.advantages.dtype
        lengths = tensors.mask.sum(dim=1)
        tokens = lengths.sum().clamp(min=1).to(dtype)
        sequences = max(shape[0], 1)
        advantages = per_token(tensors.advantages)
        assert advantages is not None
        self.divisor: Tensor = tokens.new_ones(())
        if loss_type in _PER_SEQUENCE_WEIGHT:
            weight = 1.0 / (sequences * lengths.clamp(min=1).to(dtype))
            advantages = advantages * weight.unsqueeze(1).expand(shape).reshape(-1)
        elif loss_type == "bnpo":
            self.divisor = tokens
        elif loss_type == "dr_grpo":
            self.divisor = tokens.new_full((), sequences * spec[_MAX_COMPLETION_LENGTH])
        elif loss_type == "luspo":
            self.divisor = tokens.new_full((), float(sequences))
        elif tensors.num_items is not None:
            self.divisor = torch.where(tensors.num_items > 0, tensors.num_items, 1.0)
        else:
            self.divisor = tokens
        self.advantages = advantages
        others = (tensors.old_logps, tensors.ref_logps, tensors.sampling_logps, _weights_brought(tensors, spec))
        self.others = [per_token(t) for t in others]
        self.spec = list(spec)
        if loss_type in CLIPPED_LOSS_TYPES:
            # The clipped objective is the same for all of these; dapo is the one with a divisor.
            self.spec[_LOSS_TYPE] = LOSS_TYPES.index("dapo")
        self.spec[_LEVEL] = 0.0

    def rows(self, where: Rows, live: Tensor) -> tuple[Tensor | None, ...]:
        """(mask, advantages, old, ref, sampling, weights, num_items, entropy_threshold) of some rows."""

        def shaped(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.unsqueeze(1 if self.as_column else 0)

        advantages = self.advantages[where]
        if self.as_column:  # undo the mean over the chunk's rows
            advantages = advantages * live.numel()
        others = [None if t is None else shaped(t[where]) for t in self.others]
        return shaped(live), shaped(advantages), *others, self.divisor, self.tensors.entropy_threshold


def _weights_brought(tensors: PolicyTensors, spec: list[float]) -> Tensor | None:
    """Importance weights known before any logit that need a whole sequence: a chunk could not form them."""
    mode = int(spec[_IMPORTANCE_MODE]) - 1
    given = tensors.importance_weights
    if given is not None or mode < 0 or tensors.old_logps is None or tensors.sampling_logps is None:
        return given
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
