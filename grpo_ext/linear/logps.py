"""`linear_selective_log_softmax`: log probabilities of tokens from hidden states, for any upstream gradient."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import poisoned
from grpo_ext.config import LossConfig
from grpo_ext.linear.arguments import (
    Gather,
    check_head,
    check_hidden,
    check_mask,
    check_sizes,
    gathered,
    numerics_of,
    wanted_gradients,
    whole,
)
from grpo_ext.linear.chunks import Numerics
from grpo_ext.linear.operators import row_arguments
from grpo_ext.linear.rows import Selection, select_rows
from grpo_ext.vocabulary.statistics import kernels


class Request(NamedTuple):
    """What a call of `_LinearLogps` asks for beside its tensors."""

    numerics: Numerics
    wanted: list[bool]  # gradients of hidden, weight, bias
    with_entropy: bool
    entropy_gradient: bool  # sure to be asked for; then the derivative of logp alone is not worth forming
    valid_rows: int | None
    gather: Gather | None


class _LinearLogps(torch.autograd.Function):
    """Frozen head: dlogp/dhidden comes with the forward, backward scales its rows (two products in all).

    Trained head: forward leaves statistics; backward makes the logits again, or finds them kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        active: Tensor | None,
        weight_grad: Tensor | None,
        request: Request,
    ) -> tuple[Tensor, Tensor]:
        numerics, wanted = request.numerics, request.wanted
        found: Selection | None = None
        keep = False
        trained = wanted[1] or wanted[2]
        derivative = wanted[0] and not trained and not request.entropy_gradient
        if not torch.compiler.is_compiling():
            found = select_rows(mask, active, ids.numel(), request.valid_rows)
        which = row_arguments(mask, active, found, request.valid_rows)
        with gathered(request.gather, weight, bias) as (full_weight, full_bias):
            check_head(hidden, full_weight, full_bias, weight_grad)
            if found is not None and any(wanted) and not derivative:
                keep = 0 < found.count <= numerics.plan(full_weight).rows
            logps, entropy, lse, rows, logits = kernels.linear_logps(
                hidden, full_weight, full_bias, ids, *which, *numerics,
                request.with_entropy or request.entropy_gradient, derivative, keep, request.entropy_gradient,
            )  # fmt: skip
        again = not derivative or request.with_entropy
        ctx.save_for_backward(
            rows if derivative else None,
            mask,
            logps,
            *((hidden, weight, bias, ids, active, entropy, lse, weight_grad) if again else ()),
            *((found.index,) if again and found is not None else ()),
        )
        ctx.request, ctx.found, ctx.derivative = request, found and dataclasses.replace(found, index=None), derivative
        ctx.kept = logits if keep else None
        ctx.set_materialize_grads(False)
        if not (request.with_entropy or request.entropy_gradient):
            ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @first_order("linear_selective_log_softmax", "differentiate grpo_ext.reference.linear_selective_log_softmax")
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, mask, logps, *saved = ctx.saved_tensors
        no_more = (None,) * 5
        if grad_logps is None and grad_entropy is None:
            return None, None, None, *no_more
        if ctx.derivative and (grad_entropy is None or not ctx.request.with_entropy):
            assert grad_logps is not None
            grad = grad_logps if mask is None else torch.where(mask, grad_logps, 0.0)
            return scaled_rows(rows, grad), None, None, *no_more
        hidden, weight, bias, ids, active, entropy, lse, weight_grad, *index = saved
        request: Request = ctx.request
        if grad_logps is None:
            grad_logps = torch.zeros_like(logps)
        coef = grad_logps.to(logps.dtype).contiguous()
        entropy_coef = None if grad_entropy is None else grad_entropy.to(logps.dtype).contiguous()
        kept, ctx.kept = ctx.kept, None  # they become their own gradient: a second backward makes them again
        found: Selection | None = ctx.found
        if found is not None:
            found = dataclasses.replace(found, index=index[0])
            if kept is None and not ids.is_cuda:
                found = _with_gradient(mask, coef, entropy_coef)
        which = row_arguments(mask, None if entropy_coef is not None else active, found, request.valid_rows)
        with gathered(request.gather, weight, bias) as (full_weight, full_bias):
            dhidden, dweight, dbias = kernels.linear_gradient(
                hidden, full_weight, full_bias, ids, *which, *request.numerics, logps, entropy,
                lse.new_empty(0) if ctx.derivative else lse, coef, entropy_coef, request.wanted, weight_grad, kept,
                request.entropy_gradient,
            )  # fmt: skip
        wanted = request.wanted
        return (
            dhidden if wanted[0] else None,
            dweight if wanted[1] and weight_grad is None else None,
            dbias if wanted[2] else None,
            *no_more,
        )


def _with_gradient(mask: Tensor | None, coef: Tensor, entropy_coef: Tensor | None) -> Selection:
    """The unmasked rows that a gradient arrives at; for the CPU, where counting them costs nothing."""
    arrives = coef != 0
    if entropy_coef is not None:
        arrives = arrives | (entropy_coef != 0)
    if mask is not None:
        arrives = arrives & mask
    return select_rows(arrives, None, arrives.numel())


def scaled_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """``rows * factor`` in the dtype of the rows, multiplied in that of the factor, in one pass."""
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
    active: Tensor | None,
    weight_grad: Tensor | None,
    request: Request,
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of the shape of ids, 0 where the mask is 0; no gradient but at ``active`` rows."""
    result: tuple[Tensor, Tensor] = _LinearLogps.apply(hidden, weight, bias, ids, mask, active, weight_grad, request)
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

    With F = 2 * tokens * V * H operations: F without a gradient; 2F with a frozen head, whatever the upstream gradient,
    because dlogp/dhidden (the size of ``hidden``) is formed in the forward and only scaled in backward (an upstream
    gradient of the entropy costs 2F more); with a trained head 3F where all logits fit into the memory budget, which
    then stays taken until backward, and 4F otherwise.

    Args:
        hidden: ``(B,T,H)`` or ``(N,H)``, fp32, bf16 or fp16 (fp64 on the CPU).
        weight: ``(V,H)``, the head; a DTensor is gathered. Its dtype is that of ``hidden``, or anything under autocast,
            whose dtype the products then have.
        ids: int64 ``(B,T)`` or ``(N,)``.
        bias: ``(V,)`` or None.
        mask: shape of ``ids``; rows with 0 enter no product, whatever they hold, and give 0. Floats have to be 0 or 1;
            with others all results are NaN on a GPU.
        temperature, logit_softcap, logit_scale: processed logits are
            ``softcap(logit_scale * logits) / temperature`` with ``softcap(u) = c * tanh(u / c)``.
        return_entropy: also return the entropy of each row's distribution, in nats, with gradient.
        logits_dtype: None: logits are rounded to the dtype of the product, as a model does; ``"float32"``: they stay as
            the product accumulates them. In bf16 on Hopper GPUs nothing is rounded either way
            (docs/inside/probabilities.md).
        process_group: ranks that hold equal consecutive shards of ``weight`` (and ``bias``), and the same everything
            else. ``ids`` are those of the whole vocabulary.
        memory_budget: bytes for logits; None: 1220 MiB on CUDA devices, 128 MiB on the CPU
            (`grpo_ext.linear.plan.DEFAULT_BUDGET`).
        valid_rows: an upper bound on the number of unmasked rows, where the caller knows one. On a CUDA device it saves
            the one wait of the call, for that number.
        weight_grad: fp32 ``(V,H)`` (fp64 for fp64) to which backward adds the gradient of ``weight``; autograd then
            gets none for it.
        gather: for a head that is sharded over ranks (ZeRO-3): called with ``(weight, bias)``, returns a context in
            which they are whole; entered in forward and, where logits are made again, in backward. The context may
            yield ``(weight, bias)`` to be used instead.

    Returns:
        ``logp`` of the shape of ``ids``, fp32 (fp64 for fp64), or ``(logp, entropy)``. A row's value has the same bits
        whatever the other rows, their number and their masks (for one head, budget and thread count).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit; a mask of floats other than 0 and 1
            (CPU).
        IndexError: an id outside [0, V) at an unmasked row (CPU).
    """
    check_hidden(hidden, ids, "ids")
    check_sizes(memory_budget, valid_rows)
    mask, right = check_mask(mask, ids)
    full_weight, full_bias = whole(weight), whole(bias)
    assert full_weight is not None
    if gather is None:
        check_head(hidden, full_weight, full_bias, weight_grad)
    config = LossConfig(temperature=temperature, logit_softcap=logit_softcap, logit_scale=logit_scale)
    numerics = numerics_of(config, hidden, full_weight, logits_dtype, memory_budget, process_group)
    wanted = wanted_gradients(hidden, full_weight, full_bias)
    request = Request(numerics, wanted, return_entropy, False, valid_rows, gather)
    logps, entropy = linear_logps(hidden, full_weight, full_bias, ids, mask, None, weight_grad, request)
    logps, entropy = poisoned(right, logps), poisoned(right, entropy)
    return (logps, entropy) if return_entropy else logps
