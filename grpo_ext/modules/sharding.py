"""Weights that FSDP2 or DeepSpeed ZeRO-3 shards over several processes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a shard of the tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def forward_is_collective(model: nn.Module) -> bool:
    """Whether a model's forward is a collective: all processes must run equally many, through equally many layers."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        several
        and torch.distributed.get_world_size() > 1
        and any(is_sharded(parameter) for parameter in model.parameters())
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, detached; a collective if the tensor is sharded."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]
    if hasattr(tensor, "ds_id"):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@contextlib.contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Gather all parameters that DeepSpeed ZeRO-3 sharded, on every process, for the ``with`` block."""
    shards = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not shards:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shards):
        yield


#: Names under which wrappers (activation checkpointing, torch.compile) hold the layer that they wrap.
WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")


def set_backward_prefetch(model: nn.Module) -> None:
    """Let the backward of each FSDP2 layer prefetch the weights of the layer before it, and no other weights.

    FSDP2's default prefetches in the reverse order of all forwards since the last backward. These include passes
    without gradient and frozen embeddings, whose prefetched weights no backward uses. FSDP2 frees the memory of such an
    unused all-gather at the end of the backward, possibly while the all-gather still runs: it waits with
    `torch.Stream.wait_event`, which is a no-op for a `torch.cuda.Event` (torch 2.11 and 2.13). The next forward gathers
    into the freed memory and may then read a few weights of another module.

    Layers are the members of a `torch.nn.ModuleList`, assumed to run in its order. If they run in another order, unused
    all-gathers remain, and `wait_for_all_gathers` protects their memory. The last layer's weights are not prefetched.

    Args:
        model: the model prepared for training. A no-op for a model without FSDP2 modules.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    lists = [[_bare(layer) for layer in module] for module in model.modules() if isinstance(module, nn.ModuleList)]
    before = {layer: previous for layers in lists for previous, layer in itertools.pairwise(layers)}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            target = before.get(module)
            # A module without trained parameters may have no backward, so its prefetched weights might stay unused.
            if not isinstance(target, FSDPModule) or not any(p.requires_grad for p in target.parameters()):
                target = module  # already gathered, so a no-op; an empty list would restore FSDP2's default order
            module.set_modules_to_backward_prefetch([target])


def wait_for_all_gathers(model: nn.Module) -> bool:
    """Prevent later FSDP2 all-gathers from reusing the memory of running ones; call after each backward.

    The reason is in `set_backward_prefetch`. A no-op for a model without FSDP2.

    Returns:
        Whether the model has FSDP2 streams, which exist after its first forward.
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
