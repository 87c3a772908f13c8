"""The vocabulary split over ranks: each holds consecutive rows of the head (or columns of the logits), and all see the
same tokens.

Ranks exchange four numbers per row, once: the logsumexp and entropy of their shard, the target's processed logit and
whether it is theirs. From then on each forms the gradient of its own logits; the gradients of the hidden states are
summed over the ranks in one reduction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ext.vocabulary.statistics import Statistics, WholeVocabulary


def group_name(process_group: Any | None) -> str | None:
    """The name by which operators find the group; None without a group and for one of a single rank."""
    if process_group is None or dist.get_world_size(process_group) == 1:
        return None
    if dist.get_rank(process_group) < 0:
        raise ValueError("process_group: this process is not a member of the group that it passes")
    return str(process_group.group_name)


def resolve_group(name: str | None) -> Any | None:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return None if name is None else _resolve_process_group(name)  # type: ignore[arg-type]


def shard_sizes(local_vocab: int, group: Any, device: torch.device) -> Tensor:
    """(world,) int64 on the device: tokens of each rank's shard."""
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    _all_gather(sizes, torch.full((1,), local_vocab, dtype=torch.int64, device=device), group)
    return sizes


def total_vocabulary(local_vocab: int, name: str | None, device: torch.device) -> int:
    """Tokens of all shards of a head together.

    Shards must have the same size: it decides how many rows a chunk has, and the ranks exchange rows chunk by chunk.

    Raises:
        ValueError: on all ranks, for shards of different sizes. On a GPU a device assert fails instead, because the
            host does not wait for the sizes.
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


def _all_gather(out: Tensor, own: Tensor, group: Any) -> None:
    # The newer name of the same; the older one warns where both exist.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, own, group=group)


def from_all_ranks(record: Tensor, group: Any) -> Tensor:
    """(world, n) of every rank's (n,)."""
    out = record.new_empty((dist.get_world_size(group), record.numel()))
    _all_gather(out.view(-1), record, group)
    return out


def sum_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """In fp32 (fp64 for fp64), in the dtype of the tensor."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    dist.all_reduce(wide, group=group)
    return wide.to(tensor.dtype)


class VocabularyShard:
    """A range of consecutive tokens is on this rank; the ranges follow one another in the order of the ranks.

    Args:
        offset: 0-d, the first token of this rank; None: all ranges are as long as this one.
    """

    def __init__(self, transform: list[float], local_vocab: int, group: Any, offset: Tensor | None = None) -> None:
        self.transform = transform
        self.local_vocab = local_vocab
        self.group = group
        self.world = dist.get_world_size(group)
        #: The first token here.
        self.offset: int | Tensor = dist.get_rank(group) * local_vocab if offset is None else offset
        self.local = WholeVocabulary(transform)

    def localize(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(ids within the shard, 0 for foreign ones; whether the id is here)."""
        here = (ids >= self.offset) & (ids < self.offset + self.local_vocab)
        return torch.where(here, ids - self.offset, 0), here

    def _processed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(x, dx/dz) of raw logits, in the statistics' dtype."""
        scale, softcap, temperature = self.transform
        u = scale * (z if z.dtype == torch.float64 else z.float())
        if not softcap:
            return u / temperature, torch.full_like(u, scale / temperature)
        capped = torch.tanh(u / softcap)
        return softcap * capped / temperature, (1 - capped) * (1 + capped) * (scale / temperature)

    def statistics(self, Z: Tensor, ids: Tensor, mask: Tensor | None, with_entropy: bool) -> Statistics:
        own_ids, here = self.localize(ids)
        part = self.local.statistics(Z, own_ids, mask, True)
        return self.join(part, Z.gather(1, own_ids.unsqueeze(1)).squeeze(1), here, mask)

    def join(self, part: Statistics, own_logit: Tensor, here: Tensor, mask: Tensor | None) -> Statistics:
        """Statistics of the whole vocabulary from those of each rank's part; one all-gather of four numbers per row.

        own_logit: (rows,) raw logits of the targets that are `here`, anything else elsewhere.
        """
        assert part.entropy is not None
        assert part.lse is not None
        target, _ = self._processed(own_logit)
        record = torch.stack([part.lse, part.entropy, torch.where(here, target, 0.0), here.to(target.dtype)], dim=1)
        gathered = record.new_empty((self.world * record.shape[0], 4))
        _all_gather(gathered, record.contiguous(), self.group)
        lses, entropies, targets, owned = gathered.view(self.world, -1, 4).unbind(2)
        lse = lses.logsumexp(dim=0)
        share = torch.exp(lses - lse)  # of the probability, on each rank
        # The entropy of a mixture of disjoint parts; a part without any finite logit has none.
        entropy = torch.where(share == 0, 0.0, share * (entropies + (lse - lses))).sum(dim=0)
        # A target that nobody owns or that is -inf has probability 0.
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
        """(rows,) gradient of a logit that is not its row's target.

        The kernels take the column of `localize` for the target; where the target is elsewhere, that element is an
        ordinary one and is put right with this.
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
