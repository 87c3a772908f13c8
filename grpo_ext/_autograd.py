"""Backward passes that cannot be differentiated again, and raise when that is tried."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


def first_order(name: str, remedy: str) -> Callable[[Backward], Backward]:
    """Decorate the ``backward`` of a ``torch.autograd.Function`` whose gradients have no derivative of their own.

    With ``create_graph=True`` the gradients have their usual values, and differentiating them raises. torch's
    ``once_differentiable`` connects them to an error only where the upstream gradient requires grad. With a constant
    one, as after ``loss.sum()``, the second derivative is silently 0 there.

    Args:
        name: the public function, for the error. remedy: what to call or set instead.

    Raises:
        RuntimeError: from the second derivative, naming the function and the remedy.
    """
    message = f"{name} has no second derivative, but its gradient (create_graph=True) is being differentiated: {remedy}"

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            several = isinstance(results, tuple)
            # An input that requires grad makes every output require it, whatever the upstream gradient.
            outputs = _NoDerivative.apply(
                torch.zeros((), requires_grad=True), message, *(results if several else (results,))
            )
            return outputs if several else outputs[0]

        return guarded

    return decorate


class _NoDerivative(torch.autograd.Function):
    """Hand gradients on unchanged; raise in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, message: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return tuple(None if gradient is None else gradient.detach() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)
