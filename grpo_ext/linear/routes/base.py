"""The protocol between chunk loops and routes.

The product of a chunk is that of its hidden states with the head. A route decides whether the product's buffer holds
logits or unnormalised probabilities. That determines which kernels read it and where a row's coefficient enters.
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
    row_stats: Tensor | None  # (1 or 2, *ids), the route's statistics of each row; 2 with a product
    product: Tensor | None  # (rows, V), of all selected rows


class Gradients(NamedTuple):
    """The sums that a chunk's products are added to."""

    hidden: Tensor | None  # (tokens, H)
    head: HeadGradient


class Chunk(Protocol):
    """A range of the selected rows, with their product."""

    @property
    def product(self) -> Tensor: ...

    def part(self, start: int, stop: int) -> Any:
        """Cut rows ``[start, stop)`` out of this chunk."""


class Route(abc.ABC):
    """Buffers and kernels of one call.

    Args:
        mask: bool, shape of the ids; None: no masked row is selected.
        with_entropy: whether `entropy` is filled.
        needs_products: whether any row's product is used after `forward`.
        with_top1: whether `is_top1` is filled. Not for a vocabulary split over ranks.
    """

    #: Schedules in which `forward` multiplies the loss's coefficients into the product.
    fused_schedules: ClassVar[Sequence[str]]
    capacity: int  # maximum rows of a chunk

    def __init__(
        self,
        inputs: Inputs,
        mask: Tensor | None,
        selection: Selection,
        with_entropy: bool = True,
        needs_products: bool = True,
        with_top1: bool = False,
    ) -> None:
        self.inputs = inputs
        self.numerics = inputs.numerics
        self.hidden = inputs.hidden.reshape(-1, inputs.hidden.shape[-1])
        # The kernels read dense memory, and the reshape of one dimension or one sequence may be a strided view.
        self.ids = inputs.ids.reshape(-1).contiguous()
        self.mask = None if mask is None else mask.reshape(-1).contiguous()
        self.selection = selection
        self.with_entropy = with_entropy
        self.needs_products = needs_products
        self.with_top1 = with_top1
        self.group = resolve_group(self.numerics.group)
        self._allocate()

    @abc.abstractmethod
    def _allocate(self) -> None:
        """Set `capacity`, and prepare weights and buffers for chunks of that many rows."""

    def zeros_per_token(self, *shape: int) -> Tensor:
        """Return zeros ``(*shape, tokens)`` in the statistics' dtype."""
        size = (*shape, self.ids.numel())
        return torch.zeros(size, dtype=self.numerics.statistics_dtype, device=self.ids.device)

    @functools.cached_property
    def logps(self) -> Tensor:
        """(tokens,), 0 where masked; `forward` fills it chunk by chunk."""
        return self.zeros_per_token()

    @functools.cached_property
    def entropy(self) -> Tensor:
        """(tokens,), 0 where masked or without `with_entropy`; `forward` fills it chunk by chunk."""
        return self.zeros_per_token()

    @functools.cached_property
    def is_top1(self) -> Tensor:
        """(tokens,) bool: whether the token has the greatest logit, the first of equal ones. False where masked or
        without `with_top1`; `forward` fills it chunk by chunk."""
        return torch.zeros(self.ids.shape, dtype=torch.bool, device=self.ids.device)

    def unmasked(self, rows: Rows) -> Tensor | None:
        """(rows,) bool: whether each row is unmasked; None: all are."""
        return None if self.mask is None else self.mask[rows]

    def gradients(self, wanted: Wanted, weight_grad: Tensor | None = None) -> Gradients:
        """Return sums that start at 0."""
        weight, bias = self.inputs.weight, self.inputs.bias
        head = HeadGradient(weight if wanted.wants_weight else None, bias if wanted.wants_bias else None, weight_grad)
        if not wanted.wants_hidden:
            return Gradients(None, head)
        dtype = self.hidden.dtype if self._writes_hidden_dtype else self.numerics.statistics_dtype
        return Gradients(torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device), head)

    @property
    def _writes_hidden_dtype(self) -> bool:
        """Whether gradients of hidden states are written in their dtype; else in the statistics' dtype."""
        return self.group is None

    def finish_hidden(self, gradient: Tensor | None) -> Tensor:
        """Sum the gradient over ranks; return it in the shape and dtype of the hidden states, empty for None."""
        if gradient is None:
            return self.hidden.new_empty(0)
        if self.group is not None:
            gradient = sum_over_ranks(gradient, self.group)
        return gradient.to(self.hidden.dtype).view(self.inputs.hidden.shape)

    @abc.abstractmethod
    def differentiate_logps(self) -> None:
        """Make `forward` turn the product of rows with a gradient into dlogp/dlogits."""

    @abc.abstractmethod
    def differentiate_loss(self, tensors: PolicyTensors, spec: list[float]) -> None:
        """Make `forward` turn the product of rows with a gradient into dLoss/dlogits; for `fused_schedules` only.

        Args:
            tensors: of the loss. spec: its constants, see `grpo_ext._ops.loss_spec`.
        """

    @abc.abstractmethod
    def forward(self, start: int, end: int, needed: int) -> Chunk:
        """Form the product of rows ``[start, end)`` of the selection; write their log probabilities and entropies.

        Args:
            needed: number of leading rows whose product is used later.
        """

    @abc.abstractmethod
    def rebuild(self, start: int, end: int, saved: Saved) -> Chunk:
        """Return the chunk that `forward` returned for these rows, from ``saved`` or by computing it again."""

    @abc.abstractmethod
    def save(self, chunk: Any, row_stats: Tensor) -> None:
        """Write the route's statistics of the chunk's rows into ``row_stats``, for `rebuild`."""

    @abc.abstractmethod
    def multiply(self, chunk: Any, coef: Tensor, entropy_coef: Tensor | None) -> Chunk:
        """Return the chunk with each row multiplied by its coefficient: it then holds the gradient of the logits.

        Args:
            coef, entropy_coef: (tokens,) upstream gradients of the log probabilities and the entropies; None: 0.
        """

    @abc.abstractmethod
    def accumulate(self, chunk: Any, gradients: Gradients, *, is_last: bool = False) -> None:
        """Multiply the gradient with the head and the hidden states, and add the results to ``gradients``.

        Args:
            is_last: no other chunk follows.
        """


def put(out: Tensor, rows: Rows, values: Tensor) -> None:
    """``out[rows] = values``."""
    if isinstance(rows, slice):
        out[rows] = values
    else:
        out.index_copy_(0, rows, values)
