"""Backward passes that cannot be differentiated again, and raise when that is tried."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(name: str, remedy: str) -> Callable[[Backward], Backward]:
    """Decorate the ``backward`` of a ``torch.autograd.Function`` whose gradients have no derivative of their own.

    With ``create_graph=True`` the gradients have their usual values, and differentiating them raises. torch's
    ``once_differentiable`` raises only where the upstream gradient requires grad. With a constant one, as after
    ``loss.backward(create_graph=True)``, the second derivative is silently 0 there.

    The function has to save one of its outputs or differentiable inputs: the error hangs on their history.

    Args:
        name: the public function, for the error. remedy: what to do instead.

    Raises:
        RuntimeError: from the second derivative, naming the function and the remedy.
    """
    message = f"{name} has no second derivative, and its gradient (create_graph=True) is being differentiated: {remedy}"

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            history = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
            with torch.no_grad():
                results = backward(ctx, *grads)
            found: tuple[Tensor | None, ...] = _NoDerivative.apply(message, results, *history)
            return found

        return guarded

    return decorate


class _NoDerivative(torch.autograd.Function):
    """Hand gradients on unchanged, with `history` as theirs; raise in backward."""

    @staticmethod
    def forward(
        ctx: Any, message: str, gradients: tuple[Tensor | None, ...], *history: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)
