"""Raise an error for second derivatives that a backward pass does not support."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(name: str, remedy: str) -> Callable[[Backward], Backward]:
    """Decorate a ``torch.autograd.Function``'s ``backward`` so that differentiating its gradients raises.

    With ``create_graph=True`` the gradients keep their usual values. torch's ``once_differentiable`` raises only if the
    upstream gradient requires grad. After ``loss.backward(create_graph=True)`` the upstream gradient is a constant, and
    ``once_differentiable`` gives a second derivative of 0 without an error.

    The function must save at least one of its outputs or differentiable inputs: the error is attached to the autograd
    history of the saved tensors.

    Args:
        name: the public function, for the error. remedy: the alternative that the error suggests.

    Raises:
        RuntimeError: when a second derivative is computed; names the function and the remedy.
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
    """Return `gradients` unchanged, as functions of the tensors in `history`; raise in backward."""

    @staticmethod
    def forward(
        ctx: Any, message: str, gradients: tuple[Tensor | None, ...], *history: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)
