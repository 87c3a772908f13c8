"""RMSNorm layers in one kernel forward and one or two backward.

transformers writes ``y = w x / sqrt(mean(x^2) + eps)`` as eight operations, each of which reads and writes a tensor of
the size of x, most of them in fp32; `torch.nn.functional.rms_norm` is the same in one, with all of the arithmetic in
fp32 and a single rounding. Whether a layer means just that is not read from its class's name: it is copied, given
other weights and compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from grpo_ext.modules.fused_layers import LATEST, FusedLayers

#: Where layers keep the number under the root.
EPSILONS = ("variance_epsilon", "eps", "epsilon")


class FusedNorms(FusedLayers):
    """Runs a model with the forward of its RMSNorm layers replaced.

    Args:
        model: of any architecture.
        wanted: None takes the fused layers where it is possible, False never, True always.
        compiled: whether the model is going to be wrapped by ``torch.compile``.

    Raises:
        ValueError: ``wanted`` is True and the model has no such layers, or is compiled.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None, *, compiled: bool = False) -> None:
        layers = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
        # Once, since a run may leave weights sharded; of each layer, since a class may have several kinds of them, as
        # Gemma's with and without a weight.
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
    """The number under the root; None where it has no name that is known."""
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
    except Exception:  # whatever it wants beside x, it is another layer
        return False
    expected = rms_norm(x, (size,), probe.weight, epsilon)
    return isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, expected, 1e-4, 1e-5)


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the layer's own."""
    weight = self._parameters.get("weight")
    if args or kwargs:
        self.__dict__[LATEST] = "arguments beside x"
    elif type(weight) is not nn.Parameter:  # a sharded one is a subclass
        self.__dict__[LATEST] = "its weight is no plain torch.nn.Parameter"
    elif x.dtype != weight.dtype:  # which of them y has, each architecture decides for itself
        self.__dict__[LATEST] = f"x in {x.dtype}, weight in {weight.dtype}"
    else:
        self.__dict__[LATEST] = None
        return _norm(x, weight, epsilon_of(self))
    found: Tensor = type(self).forward(self, x, *args, **kwargs)
    return found


def _norm(x: Tensor, weight: Tensor, epsilon: float | None) -> Tensor:
    """Autocast would have the result in fp32; the sums are in fp32 all the same."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return rms_norm(x, weight.shape, weight, epsilon)
    torch.set_autocast_enabled(device, False)
    try:
        return rms_norm(x, weight.shape, weight, epsilon)
    finally:
        torch.set_autocast_enabled(device, True)
