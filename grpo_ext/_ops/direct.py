"""Calls of the operators without torch's dispatcher where nobody listens to it.

The way through the dispatcher into Python takes longer than all of an operator's own work on the host. So the losses
call the backend's function themselves, unless something wants to see the operator: a compiler, a dispatch mode, a
profiler, or a tensor that is more than a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_ext._ops.schemas import library

_functions: dict[tuple[str, str], Callable[..., Any]] = {}


def implements(
    name: str, key: str, complete: Callable[[Any], Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as operator ``grpo_ext::name`` on the devices of dispatch key ``key``.

    ``complete`` makes of its result what the schema promises; who calls past the dispatcher gets the result itself.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def completed(*arguments: Any) -> Any:
            assert complete is not None
            return complete(function(*arguments))

        library.impl(name, function if complete is None else completed, key)
        _functions[name, key.lower()] = function
        return function

    return register


def _somebody_listens(tensor: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.maybe_current_level() is not None
    )


class _Operator:
    """``torch.ops.grpo_ext.<name>`` by the shortest way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.operator = getattr(torch.ops.grpo_ext, name)

    def __call__(self, first: Tensor, *arguments: Any) -> Any:
        if _somebody_listens(first):
            return self.operator(first, *arguments)
        function = _functions.get((self.name, first.device.type))
        return self.operator(first, *arguments) if function is None else function(first, *arguments)


class Kernels:
    """The operators as attributes, like ``torch.ops.grpo_ext``. The first argument is a tensor on the device."""

    row_stats = _Operator("row_stats")
    row_gradient = _Operator("row_gradient")
    row_gradient_ = _Operator("row_gradient_")
    policy_loss = _Operator("policy_loss")
    row_loss = _Operator("row_loss")
    row_loss_ = _Operator("row_loss_")
    scale_rows_ = _Operator("scale_rows_")


kernels = Kernels()
