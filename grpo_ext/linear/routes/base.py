"""The protocol between chunk loops and routes.

A route decides what the product with the head leaves in the chunk's buffer (logits, or unnormalised probabilities), and
with it which kernels look at the buffer and where a row's coefficient is multiplied in.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext.linear.head import HeadGradient
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.rows import Rows, Selection
from grpo_ext.vocabulary.shards import resolve_group, sum_over_ranks


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool


class Inputs(NamedTuple):
    """Hidden states, the head, the tokens to score, and how logits are formed."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V,H)
    bias: Tensor | None  # (V,)
    ids: Tensor  # (...) int64
    numerics: Numerics


class Saved(NamedTuple):
    """Results of a forward that its backward needs."""

    logps: Tensor  # shape of the ids
    entropy: Tensor | None
    rows: Tensor | None  # (1 or 2, *ids), numbers per row that are the route's own; 2 with a product
    product: Tensor | None  # (rows, V), of all selected rows


class Gradients(NamedTuple):
    """The sums that a chunk's products are added to."""

    hidden: Tensor | None  # (tokens, H)
    head: HeadGradient


class Chunk(Protocol):
    """Some of the selected rows, with their product."""

    @property
    def product(self) -> Tensor: ...

    def part(self, start: int, stop: int) -> Any:
        """The chunk of rows ``[start, stop)`` of this one."""


class Route(abc.ABC):
    """Buffers and kernels of one call.

    Args:
        mask: bool, shape of the ids; None: no masked row is selected.
        with_entropy: whether `entropy` is asked for.

    Both routes also take ``stores``: whether the product of any row is used after `forward`.
    """

    #: Schedules in which `forward` multiplies the coefficients of the loss into the product.
    fused_schedules: ClassVar[Sequence[str]]
    capacity: int  # rows of a chunk

    def __init__(self, inputs: Inputs, mask: Tensor | None, selection: Selection, with_entropy: bool) -> None:
        self.inputs = inputs
        self.numerics = inputs.numerics
        self.hidden = inputs.hidden.reshape(-1, inputs.hidden.shape[-1])
        # The kernels read dense memory: reshape returns a strided view for one dimension, or for one sequence.
        self.ids = inputs.ids.reshape(-1).contiguous()
        self.mask = None if mask is None else mask.reshape(-1).contiguous()
        self.selection = selection
        self.with_entropy = with_entropy
        self.group = resolve_group(self.numerics.group)

    def per_token(self, *shape: int) -> Tensor:
        """Zeros ``(*shape, tokens)`` in the statistics' dtype."""
        size = (*shape, self.ids.numel())
        return torch.zeros(size, dtype=self.numerics.statistics_dtype, device=self.ids.device)

    @functools.cached_property
    def logps(self) -> Tensor:
        """(tokens,), 0 where masked; `forward` fills it chunk by chunk."""
        return self.per_token()

    @functools.cached_property
    def entropy(self) -> Tensor:
        """(tokens,), 0 where masked or not asked for; `forward` fills it chunk by chunk."""
        return self.per_token()

    def unmasked(self, rows: Rows) -> Tensor | None:
        """(rows,) bool; None: all of them."""
        return None if self.mask is None else self.mask[rows]

    def gradients(self, wanted: Wanted, weight_grad: Tensor | None = None) -> Gradients:
        """Sums that start at 0. `hidden` is fp32 if it is summed over ranks."""
        weight, bias = self.inputs.weight, self.inputs.bias
        head = HeadGradient(weight if wanted.wants_weight else None, bias if wanted.wants_bias else None, weight_grad)
        if not wanted.wants_hidden:
            return Gradients(None, head)
        dtype = self.hidden.dtype if self._writes_hidden_dtype else self.numerics.statistics_dtype
        return Gradients(torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device), head)

    @property
    def _writes_hidden_dtype(self) -> bool:
        return self.group is None

    def finish_hidden(self, gradient: Tensor | None) -> Tensor:
        """The gradient of the hidden states in their shape and dtype, added up over ranks; empty if not wanted."""
        if gradient is None:
            return self.hidden.new_empty(0)
        if self.group is not None:
            gradient = sum_over_ranks(gradient, self.group)
        return gradient.to(self.hidden.dtype).view(self.inputs.hidden.shape)

    @abc.abstractmethod
    def differentiate_logps(self) -> None:
        """Let `forward` leave dlogp/dlogits in the product of rows with a gradient."""

    @abc.abstractmethod
    def differentiate_loss(self, tensors: PolicyTensors, spec: list[float]) -> None:
        """Let `forward` leave dLoss/dlogits there; for the `fused_schedules`."""

    @abc.abstractmethod
    def forward(self, start: int, end: int, needed: int) -> Chunk:
        """Rows ``[start, end)`` of the selection: product, log probabilities, entropies.

        Args:
            needed: of how many leading rows the product will be used.
        """

    @abc.abstractmethod
    def again(self, start: int, end: int, saved: Saved) -> Chunk:
        """Rebuild the chunk that `forward` saved."""

    @abc.abstractmethod
    def save(self, chunk: Any, rows: Tensor) -> None:
        """Write the route's numbers per row into ``rows``, for `again`."""

    @abc.abstractmethod
    def multiply(self, chunk: Any, coef: Tensor, entropy_coef: Tensor | None) -> Chunk:
        """The chunk whose product is the gradient for these coefficients of all tokens, (tokens,)."""

    @abc.abstractmethod
    def accumulate(self, chunk: Any, gradients: Gradients, *, is_last: bool = False) -> None:
        """Add the chunk's products with the head and with the hidden states. is_last: nothing is added after this."""


def put(out: Tensor, rows: Rows, values: Tensor) -> None:
    """``out[rows] = values``."""
    if isinstance(rows, slice):
        out[rows] = values
    else:
        out.index_copy_(0, rows, values)
