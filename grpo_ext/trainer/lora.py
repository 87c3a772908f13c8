"""LoRA layers in three matrix products, with a backward of their own.

PEFT computes ``y = x W^T + b + s (x A^T) B^T`` through four modules, casts x for the adapter, and scales and adds with
kernels that read and write a tensor of the size of y. In small models these kernels, and the host that starts them, are
a good part of a step. Here both scale and sum are part of the products. Whatever is not an ordinary LoRA layer in
ordinary use goes to PEFT's own forward, call by call, so adapters can be switched, merged and disabled as ever.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils import is_peft_available

#: What autocast converts.
CASTABLE = (torch.bfloat16, torch.float32, torch.float16)

#: Where a layer keeps why PEFT's forward served its latest call, None where it did not.
LATEST = "_left_to_peft"

#: Weight, bias, A, B and s of a layer, and the type that it computes in.
Terms = tuple[Tensor, Tensor | None, Tensor, Tensor, float, torch.dtype]


class FusedLora:
    """Runs a model with the forward of its LoRA layers replaced.

    Args:
        model: with LoRA layers of PEFT or not.
        wanted: None takes the fused layers where it is possible, False never, True always.
        compiled: whether the model is going to be wrapped by ``torch.compile``.

    Attributes:
        layers: the model's LoRA layers of any kind.
        reason: why PEFT's own forward is taken everywhere; None where `attached` replaces it.

    Raises:
        ValueError: ``wanted`` is True and the model has no such layers, or is compiled.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None, *, compiled: bool = False) -> None:
        self.wanted = wanted
        self.layers = lora_layers(model)
        self.reason: str | None = None
        if wanted is False:
            self.reason = "use_fused_lora=False"
        elif not self.layers:
            self.reason = "the model has no LoRA layers"
        elif compiled:
            self.reason = "torch.compile fuses them itself"
        if wanted and self.reason is not None:
            raise ValueError(f"use_fused_lora=True, but {self.reason}: leave it None")

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, the layers run this module's forward."""
        changed = [layer for layer in self.layers if self.reason is None and _is_plain(layer)]
        for layer in changed:
            # A method, not a closure: in a copy of the model it belongs to the copied layer.
            layer.forward = types.MethodType(forward, layer)
        try:
            yield
        finally:
            for layer in filter(_is_ours, changed):  # not what somebody has put around it
                del layer.forward
                layer.__dict__.pop(LATEST, None)

    def describe(self) -> str:
        """What served each layer's latest call: ``fused, 196 of 196 layers``, or ``PEFT's own, <reason>``.

        Raises:
            RuntimeError: PEFT's forward did, with ``use_fused_lora=True``.
        """
        if self.reason is not None:
            return f"PEFT's own, {self.reason}"
        found = Counter(_left_to_peft(layer) for layer in self.layers)
        fused, total = found.pop(None, 0), len(self.layers)
        why = ", ".join(f"{count} left to PEFT: {reason}" for reason, count in found.items())
        if self.wanted and why:
            raise RuntimeError(f"use_fused_lora=True, but of {total} LoRA layers {why}; leave it None to allow that")
        return f"fused, {fused} of {total} layers" + (f" ({why})" if why else "")


def lora_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers of a model, of any kind."""
    if not is_peft_available():
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _is_plain(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    return type(layer) is Linear and "forward" not in layer.__dict__


def _is_ours(layer: Any) -> bool:
    return getattr(layer.__dict__.get("forward"), "__func__", None) is forward


def _left_to_peft(layer: Any) -> str | None:
    return layer.__dict__.get(LATEST, "never called") if _is_ours(layer) else "no plain lora.Linear"


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the method of `peft.tuners.lora.Linear`."""
    terms = "arguments beside x" if args or kwargs else terms_of(self, x)
    if type(terms) is str:
        self.__dict__[LATEST] = terms
        return type(self).forward(self, x, *args, **kwargs)
    self.__dict__[LATEST] = None
    if torch.is_grad_enabled():
        return _LoraLinear.apply(x, *terms)
    return _products(x, *terms)[0]


def terms_of(layer: Any, x: Tensor) -> Terms | str:
    """What a call of a layer multiplies, or why PEFT has to.

    All of it may change between two calls, so it is looked up in each: in the modules' dicts, because an attribute that
    `torch.nn.Module` has to search for takes as long as the rest of this together.
    """
    if layer._disable_adapters:
        return "the adapter is disabled"
    if layer.merged_adapters:
        return "an adapter is merged"
    name = layer._active_adapter
    if type(name) is not str:
        if len(name) != 1:
            return f"{len(name)} adapters are active"
        name = name[0]
    modules = layer._modules
    adapter_a = modules["lora_A"]._modules.get(name)
    if adapter_a is None:
        return "the active adapter leaves it alone"
    if name in layer.lora_variant:
        return type(layer.lora_variant[name]).__name__
    base, adapter_b = modules["base_layer"], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    for part in (base, adapter_a, adapter_b, dropout):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return "hooks on its parts"
        if part is dropout:
            if type(part) is not nn.Identity and (type(part) is not nn.Dropout or (part.training and part.p > 0)):
                return "lora_dropout"
        elif type(part) is not nn.Linear or "forward" in part.__dict__:
            return f"a part is no plain torch.nn.Linear but {type(part).__name__}"
        elif type(part._parameters.get("weight")) is not nn.Parameter:  # a sharded or quantised one is a subclass
            return "a weight is no plain torch.nn.Parameter"
    if _has_any_global_hook():
        return "hooks on all modules"
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    a, b = adapter_a._parameters["weight"], adapter_b._parameters["weight"]
    if adapter_b._parameters["bias"] is not None:
        return "lora_bias"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its base layer is trained, too"
    scale, dtype, device = layer.scaling[name], x.dtype, x.device.type
    if type(scale) is not float and type(scale) is not int:
        return "its scaling is no number"
    if torch.is_autocast_enabled(device):
        if dtype in CASTABLE and weight.dtype in CASTABLE and a.dtype in CASTABLE and b.dtype in CASTABLE:
            return weight, bias, a, b, scale, torch.get_autocast_dtype(device)
    elif weight.dtype == dtype and a.dtype == dtype and b.dtype == dtype:
        return weight, bias, a, b, scale, dtype
    return f"x in {dtype}, weight in {weight.dtype}, adapter in {a.dtype}, and no autocast to one type"


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The layer's output, and rows of x, weight, A, B in ``dtype`` and ``x A^T``."""
    shape = x.shape
    rows = x.reshape(-1, shape[-1])
    if rows.dtype != dtype:
        rows = rows.to(dtype)
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    a, b = a.to(dtype), b.to(dtype)
    y = linear(rows, weight, bias if bias is None else bias.to(dtype))
    low = linear(rows, a)
    y.addmm_(low, b.t(), alpha=scale)
    return y.view(*shape[:-1], y.shape[-1]), rows, weight, a, b, low


class _LoraLinear(torch.autograd.Function):
    """Gradients of x, A and B. Autograd converts each to its input's type, as it does behind autocast's casts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *terms: Any) -> Tensor:
        y, *saved = _products(x, *terms)
        ctx.save_for_backward(*saved)
        ctx.scale = terms[4]
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a fused LoRA layer has no second derivative: set use_fused_lora=False")
        if torch.is_autocast_enabled(grad.device.type):  # of somebody's backward; the forward's types are known
            with torch.autocast(grad.device.type, enabled=False):
                return _LoraLinear.backward(ctx, grad)
        rows, weight, a, b, low = ctx.saved_tensors
        need_x, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        scale = ctx.scale
        dx = da = db = None
        grad = grad.reshape(-1, grad.shape[-1])
        if need_x or need_a:
            grad_low = grad.mm(b)
        # beta=0: the first argument is not read, the product is scaled before it is rounded.
        if need_a:
            da = torch.addmm(a, grad_low.t(), rows, beta=0, alpha=scale)
        if need_b:
            db = torch.addmm(b, grad.t(), low, beta=0, alpha=scale)
        if need_x:
            dx = grad.mm(weight).addmm_(grad_low, a, alpha=scale).view(ctx.shape)
        return dx, None, None, da, db, None, None
