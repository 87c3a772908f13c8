"""Helpers of reference.py: three autograd functions, shape conversions and checks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Exp(torch.autograd.Function):
    """``exp`` whose backward keeps a zero gradient zero if the value is infinite (a clipped ratio)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        r = w.exp()
        ctx.save_for_backward(r)
        return r

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return torch.where(grad == 0, grad, grad * r)


class ZeroWithGradient(torch.autograd.Function):
    """``new - new.detach()`` that is 0 for -inf too; NaN stays NaN."""

    @staticmethod
    def forward(ctx: Any, new: Tensor) -> Tensor:
        return torch.where(new.isnan(), new, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def select(where: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Choose one of two numbers, with the dtype of ``like`` (torch.where of two numbers would give fp32)."""
    return torch.where(where, torch.full_like(like, yes), torch.full_like(like, no))


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def rows(tensor: Tensor) -> Tensor:
    """View ``(N,)`` as one sequence ``(1, N)``."""
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor


def per_sequence_or_token(
    name: str, tensor: Tensor, shape: torch.Size, m: Tensor, neutral: float, dtype: torch.dtype
) -> Tensor:
    """Convert to ``(B, 1)``, or to ``(B, T)`` with the neutral value at masked positions."""
    if tensor.shape == shape:
        return torch.where(m, rows(tensor).to(dtype), neutral)
    if len(shape) == 2 and tensor.shape in ((shape[0],), (shape[0], 1)):
        return tensor.to(dtype).reshape(shape[0], 1)
    allowed = "(B,), (B, 1) or (B, T)" if len(shape) == 2 else "(N,)"
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the tokens {tuple(shape)}: pass {allowed}")


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    m: Tensor,
    logits_dtype: torch.dtype | None,
) -> Tensor:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}: pass (..., H) and (V, H)"
        )
    require_shape("hidden without its last dimension", hidden[..., 0], m.shape)
    z = F.linear(torch.where(m.unsqueeze(-1), hidden, 0.0), weight, bias)
    return z if logits_dtype is None else z.to(logits_dtype)


def require_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}: one value per token")


def require_whole_vocabulary(process_group: object | None) -> None:
    if process_group is not None:
        raise ValueError("the reference needs the whole vocabulary: gather the shards and pass process_group=None")


def check_ids(logits: Tensor, ids: Tensor, m: Tensor | None) -> None:
    if logits.dim() < 1 or logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, ids {tuple(ids.shape)}: pass (..., V) and (...)")
    V = logits.shape[-1]
    wrong = (ids < 0) | (ids >= V)
    if m is not None:
        wrong = wrong & m
    if bool(wrong.any()):
        position = tuple(int(i) for i in wrong.nonzero()[0])
        raise IndexError(f"id {int(ids[position])} at position {position} is outside [0, {V})")
