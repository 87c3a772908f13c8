"""Routes: whether a chunk's product with the head is stored as logits or as unnormalised probabilities.

`choose_route` returns the class of a call's route. The loops of `grpo_ext.linear.chunks` know only its base class
`base.Route`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes.logits import LogitsRoute
from grpo_ext.linear.routes.probabilities import ProbabilityRoute

#: Bounds of |scale / temperature|. A token with bias -inf gets the logit -1e30 / |scale / temperature|, which is finite
#: within them.
SLOPE_RANGE = (1e-8, 1e8)

_ROUTES = ("auto", "logits", "probabilities")
_selected = "auto"


def select_route(name: str) -> None:
    """Select a route for all calls, in tests and benchmarks.

    Args:
        name: ``"auto"``: probabilities unless `reason_for_logits` returns a reason. ``"logits"``: always logits.
            ``"probabilities"``: as ``"auto"``, but on CPUs too, in plain torch.

    Raises:
        ValueError: another name.
    """
    global _selected
    if name not in _ROUTES:
        raise ValueError(f"route must be one of {_ROUTES}, got {name!r}")
    _selected = name


def choose_route(
    weight: Tensor, numerics: Numerics, *, needs_entropy_gradient: bool = False
) -> type[LogitsRoute] | type[ProbabilityRoute]:
    """Choose the route of a call with this head.

    Args:
        needs_entropy_gradient: backward will need the gradient of an entropy.
    """
    if _selected == "logits" or (_selected == "auto" and not weight.is_cuda):
        return LogitsRoute
    copied = weight.dtype != numerics.compute_dtype
    reason = reason_for_logits(
        compute_dtype=numerics.compute_dtype,
        hidden_size=weight.shape[1],
        transform=numerics.transform,
        needs_entropy_gradient=needs_entropy_gradient,
        aligned=copied or (weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.data_ptr() % 16 == 0),
        built=_C.CUDA_HOPPER_PRODUCTS,
        capability=torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None,
    )
    return ProbabilityRoute if reason is None else LogitsRoute


def reason_for_logits(
    *,
    compute_dtype: torch.dtype,
    hidden_size: int,
    transform: list[float],
    needs_entropy_gradient: bool,
    aligned: bool,
    built: bool,
    capability: tuple[int, int] | None,
) -> str | None:
    """Return why a call takes the logits route; None if it takes the probability route.

    Args:
        needs_entropy_gradient: backward will need the gradient of an entropy.
        aligned: the head's rows start at multiples of 16 bytes.
        built: the extension was built with the kernel.
        capability: compute capability of the device; None for a CPU.
    """
    scale, softcap, temperature = transform
    if not SLOPE_RANGE[0] < abs(scale / temperature) < SLOPE_RANGE[1]:
        return f"|scale / temperature| must lie in {SLOPE_RANGE}: tokens with bias -inf need finite logits"
    if softcap:
        return "a softcap needs an element-wise factor in the gradient"
    if needs_entropy_gradient:
        return "the gradient of an entropy needs an element-wise factor"
    if compute_dtype == torch.float16:
        # Also without a gradient: log probabilities have the same bits with and without one.
        return "fp16 overflows on exponentials that are not normalised yet (above e^11)"
    if _selected == "probabilities" and capability is None:
        return None
    if capability != (9, 0):
        return "the kernel is for compute capability 9.0"
    if not built:
        return "the extension was built without it (architecture 90)"
    if compute_dtype != torch.bfloat16:
        return "the kernel is for bf16"
    if hidden_size % 8 or not aligned:
        return "hidden size and the head's row stride must be multiples of 8"
    return None
