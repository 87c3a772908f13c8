"""Call the backend directly, skipping torch's dispatcher, unless something must see the operator.

The dispatcher takes longer than all of an operator's own work on the host. A compiler, a dispatch mode, a profiler and
a tensor subclass must see the operator; for them the call goes through ``torch.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_ext._ops.arguments import with_arguments
from grpo_ext._ops.schemas import OPERATORS, library

_functions: dict[tuple[str, str], Callable[..., Any]] = {}


def implement(
    name: str, key: str, function: Callable[[Any], Any], complete: Callable[[Any], Any] | None = None
) -> None:
    """Register a function of the operator's NamedTuple (`OPERATORS`) as ``grpo_ext::name`` under a dispatch key.

    ``complete`` turns its result into what the schema promises; a direct call returns the result itself.
    """
    direct = with_arguments(OPERATORS[name], function)

    def completed(*arguments: Any) -> Any:
        assert complete is not None
        return complete(direct(*arguments))

    library.impl(name, direct if complete is None else completed, key)
    _functions[name, key.lower()] = direct


def _must_dispatch(tensor: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.maybe_current_level() is not None
    )


class _Operator:
    """``torch.ops.grpo_ext.<name>``, called directly where nothing must see it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.operator = getattr(torch.ops.grpo_ext, name)

    def __call__(self, first: Tensor, *arguments: Any) -> Any:
        if _must_dispatch(first):
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
