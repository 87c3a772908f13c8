"""A vocabulary split over ranks: every rank holds one shard, and all ranks have the same tokens.

A shard is a range of consecutive rows of the head, or of columns of the logits. One all-gather exchanges four numbers
per row: logsumexp and entropy of the shard, the target's processed logit, and whether the shard holds the target.
Then each rank forms the gradient of its own logits. One reduction sums the gradients of the hidden states.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ext._ops import statistics_dtype
from grpo_ext.vocabulary.statistics import Statistics, WholeVocabulary


def group_name(process_group: Any | None) -> str | None:
    """Return the name by which operators find the group; None without a group or for a group of one rank."""
    if process_group is None or dist.get_world_size(process_group) == 1:
        return None
    if dist.get_rank(process_group) < 0:
        raise ValueError("process_group: this process is not a member of the group that it passes")
    return str(process_group.group_name)


def resolve_group(name: str | None) -> Any | None:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return None if name is None else _resolve_process_group(name)  # type: ignore[arg-type]


def shard_sizes(local_vocab: int, group: Any, device: torch.device) -> Tensor:
    """Gather the size of each rank's shard: (world,) int64 on the device."""
    return all_gather(torch.full((), local_vocab, dtype=torch.int64, device=device), group)


def total_vocabulary(local_vocab: int, name: str | None, device: torch.device) -> int:
    """Return the size of the whole vocabulary, of which this rank's head holds ``local_vocab`` tokens.

    Shards must have equal sizes: the size determines the rows of a chunk, and ranks exchange results chunk by chunk.

    Raises:
        ValueError: on all ranks, for shards of different sizes. On a GPU a device assert fails instead, without a host
            sync.
    """
    if name is None:
        return local_vocab
    sizes = shard_sizes(local_vocab, resolve_group(name), device)
    if device.type != "cpu":
        torch._assert_async((sizes == local_vocab).all(), "process_group: the shards of the head differ in size")
    elif sizes.min() != sizes.max():
        raise ValueError(
            f"process_group: the ranks' shards of weight have {sizes.tolist()} rows; they must be equal: pad the last "
            "one, with a bias of -inf for the rows that are no tokens"
        )
    return local_vocab * len(sizes)


def check_id_range(ids: Tensor, vocab: int, mask: Tensor | None, remedy: str) -> None:
    """Raise IndexError for an unmasked id outside [0, vocab). On the CPU only: on a GPU it would be a host sync.

    Args:
        remedy: what the vocabulary belongs to, and how to avoid the error.
    """
    if ids.is_cuda:
        return
    wrong = (ids < 0) | (ids >= vocab)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        position = tuple(int(i) for i in wrong.nonzero()[0])
        index = ", ".join(map(str, position))
        raise IndexError(f"ids[{index}] = {int(ids[position])} is outside [0, {vocab}), the vocabulary of {remedy}")


def all_gather(tensor: Tensor, group: Any) -> Tensor:
    """Concatenate the equal-shaped tensors of all ranks as (world, ...)."""
    # torch's newer name; the older function warns if both exist.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    out = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    gather(out.view(-1), tensor.reshape(-1), group=group)
    return out


def sum_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """Sum over ranks in fp32 (fp64 for fp64) and return the sum in the tensor's dtype."""
    total = tensor.to(statistics_dtype(tensor.dtype))
    dist.all_reduce(total, group=group)
    return total.to(tensor.dtype)


class VocabularyShard:
    """`Vocabulary` of which this rank holds a range of consecutive tokens; ranges are in the order of the ranks.

    Args:
        transform: from raw to processed logits, see `grpo_ext._ops.logit_transform`.
        offset: 0-d, the first token of this rank; None: all ranges have the length `local_vocab`.
    """

    def __init__(self, transform: list[float], local_vocab: int, group: Any, offset: Tensor | None = None) -> None:
        self.transform = transform
        self.local_vocab = local_vocab
        self.group = group
        self.offset: int | Tensor = dist.get_rank(group) * local_vocab if offset is None else offset
        self.local = WholeVocabulary(transform)

    def localize(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return each id's column in this shard (0 if another rank holds the id), and whether this rank holds it."""
        here = (ids >= self.offset) & (ids < self.offset + self.local_vocab)
        return torch.where(here, ids - self.offset, 0), here

    def _processed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return processed logits x and dx/dz of raw logits z, in the statistics' dtype."""
        scale, softcap, temperature = self.transform
        u = scale * z.to(statistics_dtype(z.dtype))
        if not softcap:
            return u / temperature, torch.full_like(u, scale / temperature)
        capped = torch.tanh(u / softcap)
        return softcap * capped / temperature, (1 - capped) * (1 + capped) * (scale / temperature)

    def statistics(self, Z: Tensor, ids: Tensor, mask: Tensor | None, with_entropy: bool) -> Statistics:
        own_ids, here = self.localize(ids)
        part = self.local.statistics(Z, own_ids, mask, True)
        return self.join(part, Z.gather(1, own_ids.unsqueeze(1)).squeeze(1), here, mask)

    def join(self, part: Statistics, own_logit: Tensor, here: Tensor, mask: Tensor | None) -> Statistics:
        """Combine the statistics of all shards, with one all-gather of four numbers per row.

        Args:
            part: statistics of this shard.
            own_logit: (rows,) raw logit of the target if it is `here`; arbitrary values elsewhere.
            here: (rows,) bool: whether this shard holds the target.
        """
        assert part.entropy is not None
        assert part.lse is not None
        target, _ = self._processed(own_logit)
        record = torch.stack([part.lse, part.entropy, torch.where(here, target, 0.0), here.to(target.dtype)], dim=1)
        lses, entropies, targets, owned = all_gather(record, self.group).unbind(2)
        lse = lses.logsumexp(dim=0)
        share = torch.exp(lses - lse)  # probability of each shard's tokens together
        # Entropy of a mixture of disjoint parts; a part whose logits are all -inf contributes 0.
        entropy = torch.where(share == 0, 0.0, share * (entropies + (lse - lses))).sum(dim=0)
        # A target outside every shard has probability 0, like one whose logit is -inf.
        target = torch.where(owned.any(dim=0), torch.where(owned > 0, targets, 0.0).sum(dim=0), -math.inf)
        logps = target - lse
        if mask is not None:
            logps, entropy, lse = (torch.where(mask, t, 0.0) for t in (logps, entropy, lse))
        return Statistics(logps, entropy, lse)

    def derivative_(self, Z: Tensor, ids: Tensor, mask: Tensor | None) -> Statistics:
        stats = self.statistics(Z, ids, mask, True)
        self.gradient_(Z, ids, mask, stats, torch.ones_like(stats.logps), None)
        return stats

    def foreign_gradient(
        self, own_logit: Tensor, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> Tensor:
        """Return the (rows,) gradient of one logit per row that is not the row's target.

        The kernels treat the column of `localize` as the target. If another rank holds the target, this value replaces
        that element of the kernels' gradient.
        """
        assert stats.lse is not None
        x, slope = self._processed(own_logit)
        logp = x - stats.lse
        factor = -coef
        if entropy_coef is not None:
            assert stats.entropy is not None
            factor = factor - torch.where(entropy_coef == 0, 0.0, entropy_coef * (logp + stats.entropy))
        return torch.where((factor == 0) | (x == -math.inf), 0.0, logp.exp() * factor * slope)

    def gradient_(
        self, Z: Tensor, ids: Tensor, mask: Tensor | None, stats: Statistics, coef: Tensor, entropy_coef: Tensor | None
    ) -> None:
        own_ids, here = self.localize(ids)
        column = own_ids.unsqueeze(1)
        ordinary = self.foreign_gradient(Z.gather(1, column).squeeze(1), stats, coef, entropy_coef)
        self.local.gradient_(Z, own_ids, mask, stats, coef, entropy_coef)
        if mask is not None:
            here = here | ~mask
        Z.scatter_(1, column, torch.where(here.unsqueeze(1), Z.gather(1, column), ordinary.unsqueeze(1).to(Z.dtype)))
