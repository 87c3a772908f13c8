"""Weights that lie in pieces on several processes: FSDP2's and DeepSpeed ZeRO-3's."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

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


#: Modules that wrap a layer in a list of layers, by what they call it.
WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")


def prefetch_in_order(model: nn.Module) -> None:
    """FSDP2: the backward of a layer fetches the weights of the layer before it, and nothing else is fetched ahead.

    By itself FSDP2 goes back through all that has run forward since the last backward, passes without gradient and
    frozen embeddings included, and what is fetched for those nobody takes. The memory of such an all-gather is given
    away at the end of the backward, too early where it is still under way: FSDP2 waits for it by
    `torch.Stream.wait_event`, which does nothing for a `torch.cuda.Event` (torch 2.11 and 2.13). The next forward
    gathers into the same memory and may read a few weights of another module.

    Layers are those in a `torch.nn.ModuleList`, taken to run in its order; in another one, all-gathers are for nobody
    again, and `wait_for_gathers` keeps their memory. The last layer's weights are not fetched ahead.

    Args:
        model: prepared for training; nothing happens to one without modules of FSDP2.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    lists = [[_bare(layer) for layer in module] for module in model.modules() if isinstance(module, nn.ModuleList)]
    before = {layer: previous for layers in lists for previous, layer in itertools.pairwise(layers)}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            target = before.get(module)
            # Only what is trained is sure to have a backward.
            if not isinstance(target, FSDPModule) or not any(p.requires_grad for p in target.parameters()):
                target = module  # there by then, so nothing to fetch; an empty list would bring back torch's own order
            module.set_modules_to_backward_prefetch([target])


def wait_for_gathers(model: nn.Module) -> bool:
    """FSDP2, after a backward: memory of all-gathers is used again only when they are over, see `prefetch_in_order`.

    Returns:
        Whether there was something to do: the streams of a model of FSDP2 that has run.
    """
    state_of: Any = getattr(model, "_get_fsdp_state", None)
    streams = None if state_of is None else state_of()._comm_ctx
    copy_in, gather = (getattr(streams, f"all_gather_{name}stream", None) for name in ("copy_in_", ""))
    if copy_in is None or gather is None:
        return False
    copy_in.wait_stream(gather)
    return True


def _bare(layer: nn.Module) -> nn.Module:
    while (inner := next((layer._modules[name] for name in WRAPPED if name in layer._modules), None)) is not None:
        layer = inner
    return layer
