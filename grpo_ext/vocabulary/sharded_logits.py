"""`selective_log_softmax` of logits whose vocabulary is split over ranks: each rank holds some columns of every row.

The exchange is that of `shards`, one all-gather of four numbers per row in the forward. In backward every rank forms
the gradient of its own columns. Shards may differ in size, so both passes first gather the sizes, one number per rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._ops import statistics_dtype
from grpo_ext.vocabulary.shards import VocabularyShard, check_id_range, group_name, resolve_group, shard_sizes
from grpo_ext.vocabulary.statistics import Statistics, kernels

library = torch.library.Library("grpo_ext", "FRAGMENT")
library.define(
    "sharded_logps(Tensor logits, Tensor ids, float[] transform, str group) "
    "-> (Tensor logps, Tensor entropy, Tensor lse)"
)
library.define(
    "sharded_gradient(Tensor logits, Tensor ids, Tensor logps, Tensor entropy, Tensor lse, Tensor coef, "
    "Tensor? entropy_coef, float[] transform, str group) -> Tensor"
)


def _shard(logits: Tensor, transform: list[float], group: str, ids: Tensor | None = None) -> VocabularyShard:
    """Build this rank's shard, with its offset on the device; check the range of ids if they are given."""
    process_group = resolve_group(group)
    sizes = shard_sizes(logits.shape[-1], process_group, logits.device)
    if ids is not None and not logits.is_cuda:
        remedy = "all ranks together; ids are those of the whole vocabulary, not of the shard"
        check_id_range(ids, int(sizes.sum()), None, remedy)
    offset = sizes[: dist.get_rank(process_group)].sum()
    return VocabularyShard(transform, logits.shape[-1], process_group, offset)


@torch.library.impl(library, "sharded_logps", "CompositeExplicitAutograd")
def _sharded_logps(logits: Tensor, ids: Tensor, transform: list[float], group: str) -> tuple[Tensor, Tensor, Tensor]:
    shard = _shard(logits, transform, group, ids)
    own_ids, here = shard.localize(ids)
    part = Statistics(*(t.flatten() for t in kernels.row_stats(logits, own_ids, None, transform, True)))
    own_logit = logits.gather(2, own_ids.unsqueeze(2)).flatten()
    logps, entropy, lse = shard.join(part, own_logit, here.flatten(), None)
    assert entropy is not None
    assert lse is not None
    return logps.view(ids.shape), entropy.view(ids.shape), lse.view(ids.shape)


@torch.library.register_fake("grpo_ext::sharded_logps", lib=library)
def _sharded_logps_fake(
    logits: Tensor, ids: Tensor, transform: list[float], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    logps = ids.new_empty(ids.shape, dtype=statistics_dtype(logits.dtype))
    return logps, torch.empty_like(logps), torch.empty_like(logps)


@torch.library.impl(library, "sharded_gradient", "CompositeExplicitAutograd")
def _sharded_gradient(
    logits: Tensor, ids: Tensor, logps: Tensor, entropy: Tensor, lse: Tensor, coef: Tensor,
    entropy_coef: Tensor | None, transform: list[float], group: str,
) -> Tensor:  # fmt: skip
    shard = _shard(logits, transform, group)
    own_ids, here = shard.localize(ids)
    stats = Statistics(logps.flatten(), entropy.flatten(), lse.flatten())
    of_entropy = None if entropy_coef is None else entropy_coef.flatten()
    column = own_ids.unsqueeze(2)
    ordinary = shard.foreign_gradient(logits.gather(2, column).flatten(), stats, coef.flatten(), of_entropy)
    gradient: Tensor = kernels.row_gradient(logits, own_ids, None, logps, entropy, lse, coef, entropy_coef, transform)
    wrong = ordinary.view(column.shape).to(gradient.dtype)
    return gradient.scatter_(2, column, torch.where(here.unsqueeze(2), gradient.gather(2, column), wrong))


@torch.library.register_fake("grpo_ext::sharded_gradient", lib=library)
def _sharded_gradient_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


class _ShardedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, transform: list[float], group: str, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logps, entropy, lse = kernels.sharded_logps(logits, ids, transform, group)
        ctx.save_for_backward(logits, ids, logps, entropy, lse)
        ctx.transform, ctx.group, ctx.with_entropy = transform, group, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @first_order("selective_log_softmax(process_group=...)", "gather the logits and use grpo_ext.reference")
    def backward(ctx: Any, grad_logps: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, logps, entropy, lse = ctx.saved_tensors
        entropy_coef = grad_entropy.to(lse.dtype).contiguous() if ctx.with_entropy else None
        grad = kernels.sharded_gradient(
            logits, ids, logps, entropy, lse, grad_logps.to(lse.dtype).contiguous(), entropy_coef, ctx.transform,
            ctx.group,
        )  # fmt: skip
        return grad, None, None, None, None


def sharded_log_softmax(
    logits: Tensor, ids: Tensor, transform: list[float], process_group: Any, with_entropy: bool
) -> tuple[Tensor, Tensor] | None:
    """Return (logps, entropy), ``(B,T)`` each, of ``(B,T,V/world)`` logits; None if the group has one rank."""
    group = group_name(process_group)
    if group is None:
        return None
    result: tuple[Tensor, Tensor] = _ShardedLogSoftmax.apply(logits, ids, transform, group, with_entropy)
    return result
