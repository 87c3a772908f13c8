"""Weights that lie in pieces on several processes: FSDP2's and DeepSpeed ZeRO-3's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a piece of the tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def acts_jointly(model: nn.Module) -> bool:
    """Whether every pass of a model is a joint act of several processes: all must make as many, of equal depth."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        several
        and torch.distributed.get_world_size() > 1
        and any(is_sharded(parameter) for parameter in model.parameters())
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards, detached; a collective call where it is sharded."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]
    if hasattr(tensor, "ds_id"):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@contextlib.contextmanager
def made_whole(model: nn.Module) -> Iterator[None]:
    """A model that DeepSpeed ZeRO-3 has spread while loading it, whole on every process for the time being."""
    pieces = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not pieces:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces):
        yield
