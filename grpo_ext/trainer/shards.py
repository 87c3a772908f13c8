"""Weights that lie in pieces on several processes: FSDP2's and DeepSpeed ZeRO-3's."""

from __future__ import annotations

import contextlib
import itertools
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


def prefetch_in_order(model: nn.Module) -> None:
    """FSDP2: the backward of a layer fetches the weights of the layer before it, and nobody fetches any others.

    By itself FSDP2 goes back through all that has run forward since the last backward. Passes without gradient and
    frozen embeddings are among it, and whatever is fetched for those nobody takes. Of an all-gather that is still under
    way when the backward ends FSDP2 gives the memory away: it lets the stream of the computation wait, but by
    `torch.Stream.wait_event`, which passes over a `torch.cuda.Event` (torch 2.11 and 2.13). The next forward then
    gathers into the same memory, and may read weights of which a few are others'.

    Args:
        model: prepared for training; nothing happens to one without modules of FSDP2.
    """
    from torch.distributed.fsdp import FSDPModule

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    before = {layer: previous for layers in lists for previous, layer in itertools.pairwise(layers)}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            target = before.get(module)
            # Only what is trained is sure to have a backward. The module itself is there by then: nothing to fetch.
            if not isinstance(target, FSDPModule) or not any(p.requires_grad for p in target.parameters()):
                target = module
            module.set_modules_to_backward_prefetch([target])
