"""LoRA layers in three matrix products, with a custom backward.

PEFT computes ``y = x W^T + b + s (x A^T) B^T`` through four modules, casts x for the adapter, and scales and adds with
kernels that read and write a tensor of the size of y. In small models these kernels and their launches take a large
part of a step. Here scale and sum are part of the products. Each call checks that it is supported, and otherwise falls
back to PEFT's forward, so adapters can be switched, merged and disabled as usual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils import is_peft_available

from grpo_ext.modules.fused_layers import FALLBACK_REASON, FusedLayers

#: Dtypes that autocast converts.
CASTABLE = (torch.bfloat16, torch.float32, torch.float16)

#: In elements; each weight of `FusedLora.precast_weights` starts at a multiple of this.
ALIGNMENT = 64

#: Attribute of a layer during `FusedLora.precast_weights`: its adapter's weights in the dtype of the products.
CASTS = "_lora_casts"

#: Weight, bias, A, B and s of a layer, the dtype of its products, and A and B precast to that dtype or None.
Terms = tuple[Tensor, Tensor | None, Tensor, Tensor, float, torch.dtype, tuple[Tensor, Tensor] | None]


class FusedLora(FusedLayers):
    """Run a model with the forward of its LoRA layers replaced.

    Args:
        model: a model with or without LoRA layers of PEFT.
        wanted: None fuses the layers that allow it, False none, True all.
        compiled: whether ``torch.compile`` will wrap the model.

    Raises:
        ValueError: ``wanted`` is True, and the model has no such layers or is compiled.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None, *, compiled: bool = False) -> None:
        super().__init__(
            lora_layers(model),
            forward,
            _is_plain,
            "lora.Linear",
            kind="LoRA layers",
            owner="PEFT",
            option="use_fused_lora",
            wanted=wanted,
            compiled=compiled,
        )

    @contextlib.contextmanager
    def precast_weights(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Cast the weights of all adapters to ``dtype`` at once, and use the casts in the ``with`` block.

        Without it, each pass over a layer casts its weights with two kernels. A weight that changes in the block is
        cast again, unless its version stays equal: after changes through ``.data``, or by an optimizer with
        ``fused=True``. So take no optimizer step in the block before its last pass.

        Args:
            dtype: autocast's dtype; None casts nothing.
        """
        layers = [] if dtype is None else [layer for layer in self.layers if self._is_ours(layer)]
        try:
            if dtype is not None:
                _cast_together(layers, dtype)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop(CASTS, None)


def lora_layers(model: nn.Module) -> list[Any]:
    """Return the LoRA layers of PEFT in a model, of any kind."""
    if not is_peft_available():
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _is_plain(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    return type(layer) is Linear


class Cast(NamedTuple):
    """A cast of a weight, with the weight's version and address at that time."""

    weight: Tensor
    version: int
    address: int
    rounded: Tensor

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the cast if the weight has not changed since; else None."""
        same = weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address
        return self.rounded if same and self.rounded.dtype == dtype else None


@torch.no_grad()
def _cast_together(layers: list[Any], dtype: torch.dtype) -> None:
    """Set `CASTS` of the layers that have one active adapter with weights of another dtype."""
    found: dict[torch.device, list[Any]] = {}  # a layer, its A and its B; a model may lie on several devices
    for layer in layers:
        name = layer._active_adapter
        if type(name) is not str:
            if len(name) != 1:
                continue
            name = name[0]
        pair = [layer._modules[part]._modules.get(name) for part in ("lora_A", "lora_B")]
        own: list[Any] = [part._parameters.get("weight") for part in pair if type(part) is nn.Linear]
        if sum(_is_to_round(weight, dtype) for weight in own) == 2 and own[0].device == own[1].device:
            found.setdefault(own[0].device, []).append((layer, *own))
    for device, group in found.items():
        weights = [weight for _, *own in group for weight in own]
        sizes = [-(-weight.numel() // ALIGNMENT) * ALIGNMENT for weight in weights]
        # New memory each time: the casts of an earlier call may still be saved in an autograd graph.
        pieces = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
        rounded = [piece[: w.numel()].view(w.shape) for piece, w in zip(pieces, weights, strict=True)]
        torch._foreach_copy_(rounded, weights)
        casts = [Cast(w, w._version, w.data_ptr(), r) for w, r in zip(weights, rounded, strict=True)]
        for number, (layer, *_) in enumerate(group):
            layer.__dict__[CASTS] = (casts[2 * number], casts[2 * number + 1])


def _is_to_round(weight: Any, dtype: torch.dtype) -> bool:
    return type(weight) is nn.Parameter and weight.dtype != dtype and weight.dtype in CASTABLE


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replacement for the method of `peft.tuners.lora.Linear`."""
    terms = "arguments other than x" if args or kwargs else terms_of(self, x)
    if type(terms) is str:
        self.__dict__[FALLBACK_REASON] = terms
        return type(self).forward(self, x, *args, **kwargs)
    self.__dict__[FALLBACK_REASON] = None
    if torch.is_grad_enabled():
        return _LoraLinear.apply(x, *terms)
    return _products(x, *terms)[0]


def terms_of(layer: Any, x: Tensor) -> Terms | str:
    """Return the operands of a call of a layer, or why the call must fall back to PEFT.

    All of them may change between two calls, so each call looks them up. It reads the modules' dicts: one attribute
    lookup through `torch.nn.Module` takes as long as the rest of this function.
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
        return "the active adapter does not cover it"
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
        elif type(part._parameters.get("weight")) is not nn.Parameter:  # sharded and quantised weights are subclasses
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
            dtype = torch.get_autocast_dtype(device)
            return weight, bias, a, b, scale, dtype, _casts_of(layer, a, b, dtype)
    elif weight.dtype == dtype and a.dtype == dtype and b.dtype == dtype:
        return weight, bias, a, b, scale, dtype, (a, b)
    return f"x in {dtype}, weight in {weight.dtype}, adapter in {a.dtype}, and no autocast to one type"


def _casts_of(layer: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    casts = layer.__dict__.get(CASTS)
    if casts is None:
        return None
    found_a, found_b = casts[0].of(a, dtype), casts[1].of(b, dtype)
    return None if found_a is None or found_b is None else (found_a, found_b)


def _products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    casts: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """Return the layer's output; then rows of x, weight, A and B in ``dtype``, and ``x A^T``."""
    shape = x.shape
    rows = _left_factor(x, dtype)
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    a, b = casts or (a.to(dtype), b.to(dtype))
    y = linear(rows, weight, bias if bias is None else bias.to(dtype))
    low = linear(rows, a)
    y.addmm_(low, b.t(), alpha=scale)
    return y.view(*shape[:-1], y.shape[-1]), rows, weight, a, b, low


def _left_factor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (rows, columns) in ``dtype``, as left operand of a product.

    On the CPU, strided rows of a 16-bit dtype are copied: oneDNN's AMX GEMM reads past their last column, and a NaN in
    the tensor around the slice would enter the result (`grpo_ext.linear.head.padded_rows`).
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.dtype != dtype:
        rows = rows.to(dtype)
    return rows if rows.is_cuda or rows.itemsize != 2 else rows.contiguous()


class _LoraLinear(torch.autograd.Function):
    """Autograd function of a LoRA layer: gradients of x, A and B, each in its input's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *terms: Any) -> Tensor:
        y, *saved = _products(x, *terms)
        ctx.save_for_backward(*saved)
        ctx.scale = terms[4]
        ctx.grad_dtype = terms[2].dtype
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a fused LoRA layer has no second derivative: set use_fused_lora=False")
        if torch.is_autocast_enabled(grad.device.type):  # backward was called under autocast; keep the forward's dtypes
            with torch.autocast(grad.device.type, enabled=False):
                return _LoraLinear.backward(ctx, grad)
        rows, weight, a, b, low = ctx.saved_tensors
        need_x, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        scale = ctx.scale
        dx = da = db = None
        grad = _left_factor(grad, grad.dtype)
        if need_x or need_a:
            grad_low = grad.mm(b)
        if need_a:
            da = _scaled_product(a, grad_low.t(), rows, scale, ctx.grad_dtype)
        if need_b:
            db = _scaled_product(b, grad.t(), low, scale, ctx.grad_dtype)
        if need_x:
            dx = grad.mm(weight).addmm_(grad_low, a, alpha=scale).view(ctx.shape)
        return dx, None, None, da, db, None, None, None


def _scaled_product(like: Tensor, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return ``scale * left @ right``, in the shape of ``like``.

    On a GPU an fp32 gradient of a 16-bit product is not rounded. Elsewhere the product is rounded to its inputs' dtype,
    and autograd converts it.
    """
    # beta=0: addmm does not read its first argument, and scales the product before it rounds.
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.addmm(like, left, right, out_dtype=dtype, beta=0, alpha=scale)
    return torch.addmm(like, left, right, beta=0, alpha=scale)
