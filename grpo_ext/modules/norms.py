"""RMSNorm layers in one kernel forward and one or two backward.

transformers computes ``y = w x / sqrt(mean(x^2) + eps)`` in eight operations. Each reads and writes a tensor of the
size of x, most of them in fp32. `torch.nn.functional.rms_norm` is one operation, with all arithmetic in fp32 and a
single rounding. A class name does not prove that a layer computes this, so a copy of each layer is tested.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from grpo_ext.modules.fused_layers import FALLBACK_REASON, FusedLayers

#: Attributes under which layers store eps.
EPSILONS = ("variance_epsilon", "eps", "epsilon")


class FusedNorms(FusedLayers):
    """Run a model with the forward of its RMSNorm layers replaced.

    Args:
        model: a model of any architecture.
        wanted: None fuses the layers that allow it, False none, True all.
        compiled: whether ``torch.compile`` will wrap the model.

    Raises:
        ValueError: ``wanted`` is True, and the model has no such layers or is compiled.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None, *, compiled: bool = False) -> None:
        layers = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
        # Test each layer, as layers of one class may differ (Gemma's have a weight or none). Cache the result, as
        # weights may be sharded after the first run.
        known: dict[nn.Module, bool] = {}

        def fits(layer: Any) -> bool:
            if layer not in known:
                known[layer] = is_rms_norm(layer)
            return known[layer]

        super().__init__(
            layers,
            forward,
            fits,
            "RMSNorm",
            kind="RMSNorm layers",
            owner="the model",
            option="use_fused_norm",
            wanted=wanted,
            compiled=compiled,
        )


def epsilon_of(layer: Any) -> float | None:
    """Return eps of a layer; None if it has none of the names in `EPSILONS`."""
    found = (layer.__dict__.get(name) for name in EPSILONS)
    return next((value for value in found if type(value) is float), None)


@torch.no_grad()
def is_rms_norm(layer: Any) -> bool:
    """Whether a layer computes ``w x / sqrt(mean(x^2) + eps)`` of its last dimension, for any w."""
    weight = layer._parameters.get("weight")
    if len(layer.state_dict()) != 1 or type(weight) is not nn.Parameter or weight.dim() != 1 or weight.is_meta:
        return False
    epsilon = epsilon_of(layer)
    if epsilon is None or len(weight) == 0 or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    probe = copy.deepcopy(layer).to("cpu", torch.float32)
    size = len(weight)
    probe.weight.copy_(torch.linspace(-1.5, 2.0, size))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, size, generator=generator) * torch.tensor([[1.0], [100.0], [epsilon**0.5]])
    try:
        found = probe.forward(x)
    except Exception:  # a layer that needs other arguments than x is no plain RMSNorm
        return False
    expected = rms_norm(x, (size,), probe.weight, epsilon)
    return isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, expected, 1e-4, 1e-5)


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replacement for the layer's forward."""
    weight = self._parameters.get("weight")
    if args or kwargs:
        self.__dict__[FALLBACK_REASON] = "arguments other than x"
    elif type(weight) is not nn.Parameter:  # a sharded weight is a subclass
        self.__dict__[FALLBACK_REASON] = "its weight is no plain torch.nn.Parameter"
    elif x.dtype != weight.dtype:  # the dtype of y then depends on the architecture
        self.__dict__[FALLBACK_REASON] = f"x in {x.dtype}, weight in {weight.dtype}"
    else:
        self.__dict__[FALLBACK_REASON] = None
        return _norm(x, weight, epsilon_of(self))
    found: Tensor = type(self).forward(self, x, *args, **kwargs)
    return found


def _norm(x: Tensor, weight: Tensor, epsilon: float | None) -> Tensor:
    """Compute the norm without autocast, which would return fp32; the kernel's sums are fp32 in any case."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return rms_norm(x, weight.shape, weight, epsilon)
    torch.set_autocast_enabled(device, False)
    try:
        return rms_norm(x, weight.shape, weight, epsilon)
    finally:
        torch.set_autocast_enabled(device, True)
