"""`linear_selective_log_softmax`: log probabilities of tokens from hidden states, with autograd."""

from __future__ import annotations

from collections.abc import Callable
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
    """Arguments of `linear_logps` other than tensors."""

    numerics: Numerics
    wanted: Wanted
    with_entropy: bool
    needs_entropy_gradient: bool  # backward will need the gradient of an entropy; dlogp/dhidden would be wasted
    valid_rows: int | None
    gather: Gather | None
    with_top1: bool = False


class _LinearLogps(torch.autograd.Function):
    """Compute log probabilities and entropies, and their gradients for any upstream gradient.

    Frozen head: the forward forms dlogp/dhidden, and backward scales its rows (two products in all). Trained head: the
    forward saves statistics, and the logits if all fit into the buffer. Otherwise backward recomputes the logits.
    Only rows in ``gradient_mask`` get a gradient.
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        numerics, wanted = request.numerics, request.wanted
        trains_head = wanted.wants_weight or wanted.wants_bias
        differentiate = wanted.wants_hidden and not trains_head and not request.needs_entropy_gradient
        selection: Selection | None = None
        if not torch.compiler.is_compiling():
            selection = select_rows(mask, gradient_mask, ids.numel(), request.valid_rows)
        save_product = False
        with whole_head(request.gather, hidden, weight, bias, weight_grad) as head:
            if selection is not None and any(wanted) and not differentiate:
                save_product = 0 < selection.size <= numerics.plan(head[0]).rows
            arguments = LinearLogps(
                Inputs(hidden, *head, ids, numerics),
                _row_arguments(mask, gradient_mask, selection, request.valid_rows),
                request.with_entropy, differentiate, save_product, request.needs_entropy_gradient, request.with_top1,
            )  # fmt: skip
            logps, entropy, is_top1, row_stats, dlogp_dhidden, product = kernels.linear_logps(*flat(arguments))
        needs_inputs = not differentiate or request.with_entropy
        ctx.save_for_backward(
            dlogp_dhidden if differentiate else None,
            mask,
            logps,
            *((hidden, weight, bias, ids, gradient_mask, entropy, row_stats, weight_grad) if needs_inputs else ()),
            *((selection.indices,) if needs_inputs and selection is not None else ()),
        )
        ctx.request, ctx.differentiate = request, differentiate
        ctx.selection = None if selection is None else selection._replace(indices=None)
        ctx.product = product if save_product else None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(is_top1, *(() if request.with_entropy else (entropy,)))
        return logps, entropy, is_top1

    @staticmethod
    @first_order("linear_selective_log_softmax", "differentiate grpo_ext.reference.linear_selective_log_softmax")
    def backward(
        ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        dlogp_dhidden, mask, logps, *inputs = ctx.saved_tensors
        request: Request = ctx.request
        rest = (None,) * 5  # the other arguments have no gradient
        if grad_logps is None and grad_entropy is None:
            return None, None, None, *rest
        if ctx.differentiate and (grad_entropy is None or not request.with_entropy):
            assert grad_logps is not None
            coef = grad_logps if mask is None else torch.where(mask, grad_logps, 0.0)
            return scaled_rows(dlogp_dhidden, coef), None, None, *rest
        hidden, weight, bias, ids, gradient_mask, entropy, row_stats, weight_grad, *indices = inputs
        coef = (torch.zeros_like(logps) if grad_logps is None else grad_logps.to(logps.dtype)).contiguous()
        entropy_coef = None if grad_entropy is None else grad_entropy.to(logps.dtype).contiguous()
        product, ctx.product = ctx.product, None  # the gradient overwrites it: a second backward recomputes it
        selection: Selection | None = ctx.selection
        if selection is not None:
            selection = selection._replace(indices=indices[0])
            if product is None and not ids.is_cuda:
                selection = _select_nonzero(mask, coef, entropy_coef)
        entropy = None if entropy_coef is None else entropy
        saved = Saved(logps, entropy, None if ctx.differentiate else row_stats, product)
        wanted = request.wanted
        gradient_mask = None if entropy_coef is not None else gradient_mask
        with whole_head(request.gather, hidden, weight, bias, weight_grad) as head:
            arguments = LinearGradient(
                Inputs(hidden, *head, ids, request.numerics),
                _row_arguments(mask, gradient_mask, selection, request.valid_rows),
                saved, coef, entropy_coef, wanted, weight_grad, request.needs_entropy_gradient,
            )  # fmt: skip
            dhidden, dweight, dbias = kernels.linear_gradient(*flat(arguments))
        return (
            dhidden if wanted.wants_hidden else None,
            dweight if wanted.wants_weight and weight_grad is None else None,
            dbias if wanted.wants_bias else None,
            *rest,
        )


def _row_arguments(
    mask: Tensor | None, gradient_mask: Tensor | None, selection: Selection | None, valid_rows: int | None
) -> RowArguments:
    if selection is None:
        return RowArguments(mask, gradient_mask, valid_rows)
    return RowArguments(mask, None, valid_rows, selection.indices, selection.gradient_rows, selection.excludes_masked)


def _select_nonzero(mask: Tensor | None, coef: Tensor, entropy_coef: Tensor | None) -> Selection:
    """Select the unmasked rows with an upstream gradient. For the CPU only: counting CUDA rows is a host sync."""
    nonzero = coef != 0
    if entropy_coef is not None:
        nonzero = nonzero | (entropy_coef != 0)
    if mask is not None:
        nonzero = nonzero & mask
    return select_rows(nonzero, None, nonzero.numel())


def scaled_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """Return ``rows * factor`` in the dtype of the rows, multiplied in the factor's dtype in one pass."""
    factor = factor.unsqueeze(-1)
    if rows.dtype == factor.dtype:
        return rows * factor
    return torch.mul(rows, factor, out=torch.empty_like(rows))


#: Takes the arguments of `_LinearLogps.forward`; returns (logps, entropy, is_top1) of the shape of ids, 0 at masked
#: rows. is_top1 is bool: whether the token has the greatest logit, the first of equal ones; empty without `with_top1`.
#: The probability route compares probabilities relative to the token's, rounded to the dtype of the products: in bf16
#: those of 0.998 to 1.004 count as equal.
linear_logps: Callable[..., tuple[Tensor, Tensor, Tensor]] = _LinearLogps.apply


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
    """Compute the log probability of one token per hidden state, without the ``[tokens, vocabulary]`` logits.

    Costs, with F = 2 * tokens * V * H operations:

    - F without a gradient.
    - 2F with a frozen head: the forward forms dlogp/dhidden (the size of ``hidden``) and backward scales it. An
      upstream gradient of the entropy costs 2F more.
    - 3F with a trained head if all logits fit into the memory budget; they are then kept until backward. Else 4F.

    Args:
        hidden: ``(B,T,H)`` or ``(N,H)``, fp32, bf16 or fp16 (fp64 on the CPU).
        weight: ``(V,H)``, the head, in the dtype of ``hidden``; a DTensor is gathered. Under autocast any dtype is
            allowed, and the products use autocast's.
        ids: int64 ``(B,T)`` or ``(N,)``.
        bias: ``(V,)`` or None.
        mask: shape of ``ids``; rows with 0 enter no product, may hold NaN, and give 0. Floats must be 0 or 1: on a GPU
            any other value makes all results NaN.
        temperature, logit_softcap, logit_scale: processed logits are
            ``softcap(logit_scale * logits) / temperature`` with ``softcap(u) = c * tanh(u / c)``.
        return_entropy: also return the entropy of each row's distribution, in nats, with gradient.
        logits_dtype: None rounds logits to the dtype of the product, as a model does. ``"float32"`` keeps the precision
            in which the product accumulates. In bf16 on Hopper GPUs neither rounds (docs/inside/probabilities.md).
        process_group: ranks that hold consecutive shards of ``weight`` (and ``bias``), of equal size. All other
            arguments must be equal on all ranks; ``ids`` index the whole vocabulary.
        memory_budget: bytes for logits; None: 1220 MiB on CUDA devices, 128 MiB on the CPU
            (`grpo_ext.linear.plan.DEFAULT_BUDGET`).
        valid_rows: an upper bound on the number of unmasked rows. On a CUDA device it avoids the call's only host
            sync, which counts them.
        weight_grad: fp32 ``(V,H)`` (fp64 for fp64) to which backward adds the gradient of ``weight``; autograd then
            gets none for it.
        gather: for a head that is sharded over ranks (ZeRO-3): takes ``(weight, bias)`` and returns a context manager
            inside which they are whole. Forward enters it, and backward does if it recomputes logits. It yields the
            whole ``(weight, bias)``, or None if it fills the given tensors in place.

    Returns:
        ``logp`` of the shape of ``ids``, fp32 (fp64 for fp64), or ``(logp, entropy)``. A row's value has the same bits
        for any number of other rows, any values and any masks of them (for one head, budget and thread count).

    Raises:
        ValueError, TypeError: for an invalid shape, dtype, device or number; on the CPU also for a float mask with
            values other than 0 and 1.
        IndexError: an id outside [0, V) at an unmasked row (CPU).
    """
    plain_weight, plain_bias = checked_head(
        hidden, ids, "ids", weight, bias, weight_grad, gather, memory_budget, valid_rows
    )
    mask, mask_is_binary = check_mask(mask, ids)
    config = LossConfig(temperature=temperature, logit_softcap=logit_softcap, logit_scale=logit_scale)
    numerics = numerics_of(config, hidden, plain_weight, logits_dtype, memory_budget, process_group)
    wanted = wanted_gradients(hidden, plain_weight, plain_bias)
    request = Request(numerics, wanted, return_entropy, False, valid_rows, gather)
    logps, entropy, _ = linear_logps(hidden, plain_weight, plain_bias, ids, mask, None, weight_grad, request)
    logps, entropy = poisoned(mask_is_binary, logps), poisoned(mask_is_binary, entropy)
    return (logps, entropy) if return_entropy else logps
