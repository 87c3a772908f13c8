"""The chunk loops as operators: opaque to torch.compile, with outputs whose shapes follow from the inputs.

How many rows are unmasked, and with it the number of chunks, is known inside only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.packing import ENTROPY_COEF, policy_outputs, statistics_dtype
from grpo_ext._ops.schemas import POLICY_ARGUMENTS
from grpo_ext.linear import probabilities_loops
from grpo_ext.linear.chunks import Numerics, Rowwise, gradients, log_probabilities, loss_gradients
from grpo_ext.linear.head import HeadGradient
from grpo_ext.linear.policy import RowPolicy
from grpo_ext.linear.probabilities import Probabilities, serves
from grpo_ext.linear.rows import Selection, select_rows, select_sequences
from grpo_ext.vocabulary.shards import total_vocabulary
from grpo_ext.vocabulary.statistics import kernels

library = torch.library.Library("grpo_ext", "FRAGMENT")

_NUMERICS = "float[] transform, ScalarType compute_dtype, ScalarType logits_dtype, int memory_budget, str group"
# rows: what select_rows found in a forward, so that backward need not ask the device again; None: ask here.
_ROWS = "Tensor? mask, Tensor? active, Tensor? rows, int active_rows, bool exact, int valid_rows"
_cudagraph_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # they may wait for a count
_TAGS = () if _cudagraph_unsafe is None else (_cudagraph_unsafe,)
library.define(
    f"linear_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_ROWS}, {_NUMERICS}, "
    "bool with_entropy, bool derivative, bool keep, bool entropy_gradient) "
    "-> (Tensor logps, Tensor entropy, Tensor lse, Tensor derivative, Tensor logits)",
    tags=_TAGS,
)
library.define(
    f"linear_gradient(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_ROWS}, {_NUMERICS}, "
    "Tensor logps, Tensor entropy, Tensor lse, Tensor coef, Tensor? entropy_coef, bool[] wanted, "
    "Tensor(a!)? weight_grad, Tensor(b!)? logits, bool entropy_gradient) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    tags=_TAGS,
)
library.define(
    f"linear_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {POLICY_ARGUMENTS}, {_NUMERICS}, "
    "Tensor? active, int valid_rows, str route, bool[] wanted, Tensor(a!)? weight_grad) "
    "-> (Tensor loss, Tensor logps, Tensor entropy, Tensor kl, Tensor metrics, "
    "Tensor dhidden, Tensor dweight, Tensor dbias)",
    tags=_TAGS,
)

NUMERIC_ARGUMENTS = len(Numerics._fields)


class RowArguments(NamedTuple):
    """Which rows, as the operators take it: `_ROWS`."""

    mask: Tensor | None
    active: Tensor | None
    rows: Tensor | None
    active_rows: int  # -1: not selected yet
    exact: bool
    valid_rows: int  # -1: no bound known


ROW_ARGUMENTS = len(RowArguments._fields)


def row_arguments(
    mask: Tensor | None, active: Tensor | None, found: Selection | None, valid_rows: int | None
) -> RowArguments:
    bound = -1 if valid_rows is None else valid_rows
    if found is None:
        return RowArguments(mask, active, None, -1, False, bound)
    return RowArguments(mask, None, found.index, found.active, found.exact, bound)


def _selection(total: int, arguments: RowArguments) -> tuple[Selection, Tensor | None]:
    """The selection, and the mask if masked rows may be among the selected ones."""
    mask, active, rows, active_rows, exact, valid_rows = arguments
    if active_rows < 0:
        selection = select_rows(mask, active, total, None if valid_rows < 0 else valid_rows)
    else:
        selection = Selection(rows, total if rows is None else rows.numel(), active_rows, exact)
    return selection, None if selection.exact else mask


def check_ids_in_range(ids: Tensor, mask: Tensor | None, vocab: int) -> None:
    """On the CPU only: elsewhere it would be a wait."""
    if ids.is_cuda:
        return
    wrong = (ids < 0) | (ids >= vocab)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        position = tuple(int(i) for i in wrong.nonzero()[0])
        raise IndexError(
            f"ids[{', '.join(map(str, position))}] = {int(ids[position])} is outside [0, {vocab}), the vocabulary of "
            "the head; set the mask to 0 there, or pass the whole head"
        )


@torch.library.impl(library, "linear_logps", "CompositeExplicitAutograd")
def _linear_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    which, rest = RowArguments(*rest[:ROW_ARGUMENTS]), rest[ROW_ARGUMENTS:]
    numerics, rest = Numerics(*rest[:NUMERIC_ARGUMENTS]), rest[NUMERIC_ARGUMENTS:]
    with_entropy, derivative, keep, entropy_gradient = rest
    check_ids_in_range(ids, which.mask, total_vocabulary(weight.shape[0], numerics.group, ids.device))
    selection, mask = _selection(ids.numel(), which)
    with torch.autocast(hidden.device.type, enabled=False):
        if serves(weight, numerics, entropy_gradient=entropy_gradient):
            stores = derivative or keep
            probable = Probabilities(hidden, weight, bias, ids, mask, selection, numerics, stores)
            factors, residuals, derivative_rows, logits = probabilities_loops.log_probabilities(
                probable, derivative, keep
            )
            per_token = [probable.logps, probable.entropy, factors]
        else:
            work = Rowwise(hidden, weight, bias, ids, mask, selection, numerics)
            *per_token, derivative_rows, logits = log_probabilities(work, with_entropy, derivative, keep)
            residuals = per_token[-1].new_empty(0)
    logps, entropy, lse = (t.view(ids.shape) for t in per_token)
    if keep:  # with what belongs to E where that is kept; the logits route has no use for it
        lse = torch.stack([lse, residuals.view(ids.shape) if residuals.numel() else torch.zeros_like(lse)])
    return logps, entropy, lse, derivative_rows.view(hidden.shape if derivative else (0,)), logits


@torch.library.register_fake("grpo_ext::linear_logps", lib=library)
def _linear_logps_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, logits_dtype, _, _, _, derivative, keep, _ = rest
    dtype = statistics_dtype(logits_dtype)
    logps, entropy, lse = (ids.new_empty(ids.shape, dtype=dtype) for _ in range(3))
    if keep:
        lse = torch.stack([lse, lse])
    rows = torch.library.get_ctx().new_dynamic_size() if keep else 0
    logits = hidden.new_empty((rows, weight.shape[0]) if keep else (0,), dtype=logits_dtype if keep else hidden.dtype)
    return logps, entropy, lse, hidden.new_empty(hidden.shape if derivative else (0,)), logits


@torch.library.impl(library, "linear_gradient", "CompositeExplicitAutograd")
def _linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    which, rest = RowArguments(*rest[:ROW_ARGUMENTS]), rest[ROW_ARGUMENTS:]
    numerics, rest = Numerics(*rest[:NUMERIC_ARGUMENTS]), rest[NUMERIC_ARGUMENTS:]
    logps, entropy, lse, coef, entropy_coef, wanted, weight_grad, logits, entropy_gradient = rest
    selection, mask = _selection(ids.numel(), which)
    residuals = lse.new_empty(0)
    if lse.dim() > ids.dim():  # the forward has kept logits or E
        lse, residuals = lse.unbind()
    # Which route the forward took, and whether the gradient can take it too: what is kept is of use to its own only.
    served = serves(weight, numerics, entropy_gradient=entropy_gradient)
    by_probabilities = served and entropy_coef is None
    if served and not by_probabilities:
        logits, lse = None, lse.new_empty(0)
    # Gradients of masked rows are not asked for: forward said 0 there whatever the hidden state.
    with torch.autocast(hidden.device.type, enabled=False):
        work: Probabilities | Rowwise
        if by_probabilities:
            work = Probabilities(hidden, weight, bias, ids, mask, selection, numerics)
            head_gradient = _head_gradient(weight, bias, wanted, weight_grad)
            dhidden = probabilities_loops.gradients(work, coef, head_gradient, wanted[0], logits, lse, residuals)
        else:
            work = Rowwise(hidden, weight, bias, ids, mask, selection, numerics)
            head_gradient = _head_gradient(weight, bias, wanted, weight_grad)
            dhidden = gradients(work, (logps, entropy, lse), coef, entropy_coef, head_gradient, wanted[0], logits)
        del work  # its buffers, before the sums are copied to the dtype of the head
        dweight, dbias = head_gradient.results(hidden)
    return dhidden.view(hidden.shape if wanted[0] else (0,)), dweight, dbias


def _head_gradient(weight: Tensor, bias: Tensor | None, wanted: list[bool], weight_grad: Tensor | None) -> HeadGradient:
    return HeadGradient(weight if wanted[1] else None, bias if wanted[2] else None, weight_grad)


def _gradient_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], weight_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wanted[0] else (0,)),
        torch.empty_like(weight) if wanted[1] and weight_grad is None else hidden.new_empty(0),
        torch.empty_like(bias) if wanted[2] and bias is not None else hidden.new_empty(0),
    )


@torch.library.register_fake("grpo_ext::linear_gradient", lib=library)
def _linear_gradient_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted, weight_grad, *_ = rest[-4:]
    return _gradient_shapes(hidden, weight, bias, wanted, weight_grad)


def _loss_arguments(rest: tuple[Any, ...]) -> tuple[PolicyTensors, list[float], Numerics, tuple[Any, ...]]:
    count = len(PolicyTensors._fields)
    tensors, spec, rest = PolicyTensors(*rest[:count]), rest[count], rest[count + 1 :]
    return tensors, spec, Numerics(*rest[:NUMERIC_ARGUMENTS]), rest[NUMERIC_ARGUMENTS:]


@torch.library.impl(library, "linear_loss", "CompositeExplicitAutograd")
def _linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors, spec, numerics, (active, valid_rows, route, wanted, weight_grad) = _loss_arguments(rest)
    check_ids_in_range(ids, tensors.mask.view(ids.shape), total_vocabulary(weight.shape[0], numerics.group, ids.device))
    bound = None if valid_rows < 0 else valid_rows
    lengths: list[int] | None = None
    if route == "sequences":
        selection, lengths = select_sequences(tensors.mask, active)
    else:
        selection = select_rows(tensors.mask, active, ids.numel(), bound)
    with torch.autocast(hidden.device.type, enabled=False):
        mask = None if selection.exact else tensors.mask
        work: Probabilities | Rowwise
        if serves(weight, numerics, entropy_gradient=spec[ENTROPY_COEF] != 0):
            work = Probabilities(hidden, weight, bias, ids, mask, selection, numerics)
            head_gradient = _head_gradient(weight, bias, wanted, weight_grad)
            own_row = route in ("one_pass", "rows")
            dhidden = probabilities_loops.loss_gradients(
                work, tensors, spec, own_row, lengths, head_gradient, wanted[0]
            )
            logps, entropy = work.logps, work.entropy
        else:
            work = Rowwise(hidden, weight, bias, ids, mask, selection, numerics)
            head_gradient = _head_gradient(weight, bias, wanted, weight_grad)
            row_policy = RowPolicy(tensors, spec) if route == "one_pass" else None
            logps, entropy, dhidden = loss_gradients(work, tensors, spec, row_policy, lengths, head_gradient, wanted[0])
        del work
        logps, entropy = logps.view(tensors.mask.shape), entropy.view(tensors.mask.shape)
        dweight, dbias = head_gradient.results(hidden)
    loss, _, _, kl, metrics = kernels.policy_loss(logps, entropy, *tensors, spec)
    return loss, logps, entropy, kl, metrics, dhidden.view(hidden.shape if wanted[0] else (0,)), dweight, dbias


@torch.library.register_fake("grpo_ext::linear_loss", lib=library)
def _linear_loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    tensors, spec, numerics, (_, _, _, wanted, weight_grad) = _loss_arguments(rest)
    logps = torch.empty_like(tensors.mask, dtype=numerics.statistics_dtype)
    loss, kl, metrics = policy_outputs(logps, spec)
    return (
        loss, logps, torch.empty_like(logps), kl, metrics,
        *_gradient_shapes(hidden, weight, bias, wanted, weight_grad),
    )  # fmt: skip
