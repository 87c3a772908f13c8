"""`linear_selective_log_softmax`: log probabilities of tokens from hidden states, for any upstream gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import poisoned
from grpo_ext.config import LossConfig
from grpo_ext.linear.arguments import Gather, check_mask, checked_head, numerics_of, wanted_gradients, whole_head
from grpo_ext.linear.operators import LinearGradient, LinearLogps, flat
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes.base import Inputs, Saved, Wanted
from grpo_ext.linear.rows import RowArguments, Selection, select_rows
from grpo_ext.vocabulary.statistics import kernels


class Request(NamedTuple):
    """Arguments of `linear_logps` beside its tensors."""

    numerics: Numerics
    wanted: Wanted
    with_entropy: bool
    entropy_gradient: bool  # backward will need it, so the forward does not form dlogp/dhidden
    valid_rows: int | None
    gather: Gather | None


class _LinearLogps(torch.autograd.Function):
    """Log probabilities with a gradient for any upstream gradient.

    Frozen head: the forward forms dlogp/dhidden, and backward scales its rows (two products in all). Trained head: the
    forward saves statistics, and the logits if all fit; otherwise backward forms the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        gradient_mask: Tensor | None,
        weight_grad: Tensor | None,
        request: Request,
    ) -> tuple[Tensor, Tensor]:
        numerics, wanted = request.numerics, request.wanted
        trains_head = wanted.wants_weight or wanted.wants_bias
        derivative = wanted.wants_hidden and not trains_head and not request.entropy_gradient
        selection: Selection | None = None
        if not torch.compiler.is_compiling():
            selection = select_rows(mask, gradient_mask, ids.numel(), request.valid_rows)
        keep = False
        with whole_head(request.gather, hidden, weight, bias, weight_grad) as head:
            if selection is not None and any(wanted) and not derivative:
                keep = 0 < selection.size <= numerics.plan(head[0]).rows
            arguments = LinearLogps(
                Inputs(hidden, *head, ids, numerics),
                _row_arguments(mask, gradient_mask, selection, request.valid_rows),
                request.with_entropy, derivative, keep, request.entropy_gradient,
            )  # fmt: skip
            logps, entropy, rows, slope, product = kernels.linear_logps(*flat(arguments))
        needs_inputs = not derivative or request.with_entropy
        ctx.save_for_backward(
            slope if derivative else None,
            mask,
            logps,
            *((hidden, weight, bias, ids, gradient_mask, entropy, rows, weight_grad) if needs_inputs else ()),
            *((selection.indices,) if needs_inputs and selection is not None else ()),
        )
        ctx.request, ctx.derivative = request, derivative
        ctx.selection = None if selection is None else selection._replace(indices=None)
        ctx.product = product if keep else None
        ctx.set_materialize_grads(False)
        if not request.with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @first_order("linear_selective_log_softmax", "differentiate grpo_ext.reference.linear_selective_log_softmax")
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        slope, mask, logps, *inputs = ctx.saved_tensors
        request: Request = ctx.request
        no_more = (None,) * 5
        if grad_logps is None and grad_entropy is None:
            return None, None, None, *no_more
        if ctx.derivative and (grad_entropy is None or not request.with_entropy):
            assert grad_logps is not None
            coef = grad_logps if mask is None else torch.where(mask, grad_logps, 0.0)
            return scaled_rows(slope, coef), None, None, *no_more
        hidden, weight, bias, ids, gradient_mask, entropy, rows, weight_grad, *indices = inputs
        coef = (torch.zeros_like(logps) if grad_logps is None else grad_logps.to(logps.dtype)).contiguous()
        entropy_coef = None if grad_entropy is None else grad_entropy.to(logps.dtype).contiguous()
        product, ctx.product = ctx.product, None  # its gradient overwrites it: a second backward forms it again
        selection: Selection | None = ctx.selection
        if selection is not None:
            selection = selection._replace(indices=indices[0])
            if product is None and not ids.is_cuda:
                selection = _select_nonzero(mask, coef, entropy_coef)
        saved = Saved(logps, None if entropy_coef is None else entropy, None if ctx.derivative else rows, product)
        wanted = request.wanted
        gradient_mask = None if entropy_coef is not None else gradient_mask
        with whole_head(request.gather, hidden, weight, bias, weight_grad) as head:
            arguments = LinearGradient(
                Inputs(hidden, *head, ids, request.numerics),
                _row_arguments(mask, gradient_mask, selection, request.valid_rows),
                saved, coef, entropy_coef, wanted, weight_grad, request.entropy_gradient,
            )  # fmt: skip
            dhidden, dweight, dbias = kernels.linear_gradient(*flat(arguments))
        return (
            dhidden if wanted.wants_hidden else None,
            dweight if wanted.wants_weight and weight_grad is None else None,
            dbias if wanted.wants_bias else None,
            *no_more,
        )


def _row_arguments(
    mask: Tensor | None, gradient_mask: Tensor | None, selection: Selection | None, valid_rows: int | None
) -> RowArguments:
    if selection is None:
        return RowArguments(mask, gradient_mask, valid_rows)
    return RowArguments(mask, None, valid_rows, selection.indices, selection.gradient_rows, selection.exact)


def _select_nonzero(mask: Tensor | None, coef: Tensor, entropy_coef: Tensor | None) -> Selection:
    """Select the unmasked rows with an upstream gradient; for the CPU, where counting them needs no wait."""
    nonzero = coef != 0
    if entropy_coef is not None:
        nonzero = nonzero | (entropy_coef != 0)
    if mask is not None:
        nonzero = nonzero & mask
    return select_rows(nonzero, None, nonzero.numel())


def scaled_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """``rows * factor`` in one pass, multiplied in the factor's dtype and rounded to that of the rows."""
    factor = factor.unsqueeze(-1)
    if rows.dtype == factor.dtype:
        return rows * factor
    return torch.mul(rows, factor, out=torch.empty_like(rows))


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    gradient_mask: Tensor | None,
    weight_grad: Tensor | None,
    request: Request,
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of the shape of ids, 0 where the mask is 0. Only rows of ``gradient_mask`` get a gradient."""
    result: tuple[Tensor, Tensor] = _LinearLogps.apply(
        hidden, weight, bias, ids, mask, gradient_mask, weight_grad, request
    )
    return result


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | str | None = None,
    process_group: Any | None = None,
    memory_budget: int | None = None,
    valid_rows: int | None = None,
    weight_grad: Tensor | None = None,
    gather: Gather | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log probability of one token per hidden state, without the ``[tokens, vocabulary]`` logits.

    Costs in F = 2 * tokens * V * H operations: F without a gradient. 2F with a frozen head: the forward forms
    dlogp/dhidden (the size of ``hidden``) and backward scales it; an upstream gradient of the entropy costs 2F more.
    With a trained head 3F if all logits fit into the memory budget, which then stays taken until backward, else 4F.

    Args:
        hidden: ``(B,T,H)`` or ``(N,H)``, fp32, bf16 or fp16 (fp64 on the CPU).
        weight: ``(V,H)``, the head; a DTensor is gathered. Its dtype is that of ``hidden``; under autocast any, and the
            products have autocast's.
        ids: int64 ``(B,T)`` or ``(N,)``.
        bias: ``(V,)`` or None.
        mask: shape of ``ids``; rows with 0 enter no product, whatever they hold, and give 0. Floats must be 0 or 1:
            others make all results NaN on a GPU.
        temperature, logit_softcap, logit_scale: processed logits are
            ``softcap(logit_scale * logits) / temperature`` with ``softcap(u) = c * tanh(u / c)``.
        return_entropy: also return the entropy of each row's distribution, in nats, with gradient.
        logits_dtype: None: logits are rounded to the dtype of the product, as a model does; ``"float32"``: they stay as
            the product accumulates them. In bf16 on Hopper GPUs nothing is rounded either way
            (docs/inside/probabilities.md).
        process_group: ranks that hold consecutive shards of ``weight`` (and ``bias``), of equal size. All other
            arguments are the same on each; ``ids`` are those of the whole vocabulary.
        memory_budget: bytes for logits; None: 1220 MiB on CUDA devices, 128 MiB on the CPU
            (`grpo_ext.linear.plan.DEFAULT_BUDGET`).
        valid_rows: an upper bound on the number of unmasked rows. On a CUDA device it saves the call's only wait, for
            that number.
        weight_grad: fp32 ``(V,H)`` (fp64 for fp64) to which backward adds the gradient of ``weight``; autograd then
            gets none for it.
        gather: for a head that is sharded over ranks (ZeRO-3): called with ``(weight, bias)``, returns a context in
            which they are whole. Forward enters it, and backward if it forms logits again. The context may yield
            ``(weight, bias)`` to be used instead.

    Returns:
        ``logp`` of the shape of ``ids``, fp32 (fp64 for fp64), or ``(logp, entropy)``. A row's value has the same bits
        whatever the other rows, their number and their masks (for one head, budget and thread count).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit; a mask of floats other than 0 and 1
            (CPU).
        IndexError: an id outside [0, V) at an unmasked row (CPU).
    """
    plain_weight, plain_bias = checked_head(
        hidden, ids, "ids", weight, bias, weight_grad, gather, memory_budget, valid_rows
    )
    mask, right = check_mask(mask, ids)
    config = LossConfig(temperature=temperature, logit_softcap=logit_softcap, logit_scale=logit_scale)
    numerics = numerics_of(config, hidden, plain_weight, logits_dtype, memory_budget, process_group)
    wanted = wanted_gradients(hidden, plain_weight, plain_bias)
    request = Request(numerics, wanted, return_entropy, False, valid_rows, gather)
    logps, entropy = linear_logps(hidden, plain_weight, plain_bias, ids, mask, None, weight_grad, request)
    logps, entropy = poisoned(right, logps), poisoned(right, entropy)
    return (logps, entropy) if return_entropy else logps
