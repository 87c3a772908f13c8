"""`linear_grpo_loss`: the language-model head and the GRPO loss together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import Number, PolicyTensors, describe, policy_tensors
from grpo_ext._ops import loss_spec
from grpo_ext.config import LossConfig
from grpo_ext.linear.arguments import (
    Gather,
    check_head,
    check_hidden,
    check_sizes,
    gathered,
    numerics_of,
    wanted_gradients,
    whole,
)
from grpo_ext.linear.chunks import Numerics
from grpo_ext.linear.logps import Request, linear_logps
from grpo_ext.linear.policy import depends_on_own_row, depends_on_own_sequence, folds_into_rows
from grpo_ext.linear.rows import active_tokens
from grpo_ext.output import GRPOLossOutput, loss_output
from grpo_ext.policy import policy_loss
from grpo_ext.vocabulary.statistics import kernels


def choose_route(
    config: LossConfig,
    tensors: PolicyTensors,
    wanted: list[bool],
    numerics: Numerics,
    buffer_rows: int,
    valid_rows: int | None,
    grad_scale: float,
) -> str:
    """How a loss meets the chunks; F is one product of all unmasked rows with the head.

    - ``one_pass``: a row's coefficient is known with its statistics; the gradients are formed in the forward, one pass
      over the logits (2F with a frozen head, 3F with a trained one).
    - ``rows``, ``sequences``: the same with three passes over a chunk's logits, because ranks have to talk in between
      or because the coefficient needs the whole completion, which then lies in one chunk (2F, 3F).
    - ``logps``: `linear_selective_log_softmax` and `policy_loss` on its result (F without gradient, 2F frozen; trained
      3F where all logits fit into the buffer, else 4F).
    """
    trained = wanted[1] or wanted[2]
    if not any(wanted):
        return "logps"
    if numerics.compute_dtype == torch.float16 and grad_scale == 1.0:
        return "logps"  # coefficients of 1 / tokens leave fp16's range before the loss scale arrives in backward
    if not numerics.group and folds_into_rows(config, tensors):
        return "one_pass"
    if not trained and config.entropy_coef == 0:
        return "logps"
    if depends_on_own_row(config, tensors):
        return "rows"
    fits = tensors.mask.numel() <= buffer_rows  # then the logits are kept
    # Nobody can count the rows of each completion while a CUDA graph is recorded.
    capturing = tensors.mask.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    waits = valid_rows is None and not capturing
    if not fits and waits and depends_on_own_sequence(config, tensors) and tensors.mask.shape[1] <= buffer_rows:
        return "sequences"
    return "logps"


class _LinearLoss(torch.autograd.Function):
    """Loss and gradients, formed together in the forward and handed over once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        active: Tensor | None,
        weight_grad: Tensor | None,
        spec: list[float],
        numerics: Numerics,
        options: tuple[int, str, list[bool], Gather | None],
        *policy: Any,
    ) -> tuple[Tensor, ...]:
        valid_rows, route, wanted, gather = options
        with gathered(gather, weight, bias) as (full_weight, full_bias):
            check_head(hidden, full_weight, full_bias, weight_grad)
            *outputs, dhidden, dweight, dbias = kernels.linear_loss(
                hidden, full_weight, full_bias, ids, *policy, spec, *numerics, active, valid_rows, route, wanted,
                weight_grad,
            )  # fmt: skip
        loss, logps, entropy, kl, metrics = outputs
        ctx.mark_non_differentiable(logps, entropy, kl, metrics)
        ctx.save_for_backward(loss)
        ctx.set_materialize_grads(False)
        ctx.grads = (dhidden, dweight, dbias)
        ctx.wanted, ctx.accumulated = wanted, weight_grad is not None
        return loss, logps, entropy, kl, metrics

    @staticmethod
    @first_order("linear_grpo_loss", "differentiate grpo_ext.reference.linear_grpo_loss")
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradient of linear_grpo_loss was handed over in an earlier backward; compute the loss once per "
                "backward"
            )
        grads = ctx.grads
        no_more = (None,) * (6 + len(PolicyTensors._fields))
        if grads[0].dtype == torch.float64 and not ctx.accumulated and grad_loss is not None:
            # fp64 is for checking: may be asked again (gradcheck)
            return *(g * grad_loss if wanted else None for g, wanted in zip(grads, ctx.wanted, strict=True)), *no_more
        ctx.grads = None
        if grad_loss is None:
            return None, None, None, *no_more
        if ctx.accumulated:
            torch._assert_async(
                grad_loss == 1,
                "linear_grpo_loss(weight_grad=...) has added its gradient in the forward, for an upstream gradient of "
                "1, and this backward brings another: call backward() on the loss itself and pass the factor as "
                "grad_scale",
            )
        handed: list[Tensor | None] = []
        for grad, wanted in zip(grads, ctx.wanted, strict=True):
            if not wanted or (grad is grads[1] and ctx.accumulated):
                handed.append(None)
                continue
            # No pass over the gradient for a factor of 1.
            kernels.scale_rows_(grad.view(1, -1, grad.shape[-1]), grad_loss)
            handed.append(grad)
        return *handed, *no_more


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    config: LossConfig,
    *,
    bias: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_items_in_batch: Number | Tensor | None = None,
    entropy_threshold: Number | Tensor | None = None,
    grad_scale: float = 1.0,
    logits_dtype: torch.dtype | str | None = None,
    process_group: Any | None = None,
    memory_budget: int | None = None,
    valid_rows: int | None = None,
    weight_grad: Tensor | None = None,
    gather: Gather | None = None,
) -> GRPOLossOutput:
    """`grpo_loss` of ``hidden @ weight.T + bias``, chunk by chunk: no tensor of the size tokens x vocabulary.

    Rows whose mask is 0 enter no product; rows whose advantage is 0 (without KL term and bonus) enter none of the
    gradient's. On the CPU clipped rows leave as well. What it costs is said at `choose_route`.

    Args:
        hidden: ``(B,T,H)``, or ``(N,H)`` for one sequence; ``hidden[b,t]`` predicts ``completion_ids[b,t]``.
        weight: ``(V,H)``, bias: ``(V,)`` or None; a gradient is formed for what requires one.
        weight_grad: fp32 ``(V,H)`` (fp64 for fp64) to which the gradient of ``weight`` is added; autograd then gets
            none for it. It may be added in this call already, for an upstream gradient of 1: call ``backward()`` on the
            loss itself and pass other factors as ``grad_scale``; anything else raises in backward.
        logits_dtype, process_group, memory_budget, valid_rows, gather: as in `linear_selective_log_softmax`.

    Everything else, the result and the errors are those of `grpo_loss`. With a float16 product pass the loss scale as
    ``grad_scale`` to have gradients formed in the forward: without it they are left to backward, whose upstream
    gradient has the scale in it.
    """
    check_hidden(hidden, completion_ids, "completion_ids")
    check_sizes(memory_budget, valid_rows)
    full_weight, full_bias = whole(weight), whole(bias)
    assert full_weight is not None
    if gather is None:
        check_head(hidden, full_weight, full_bias, weight_grad)
    if not isinstance(config, LossConfig):
        raise TypeError(f"config must be a LossConfig, got {describe(config)}; pass grpo_ext.LossConfig(...)")
    numerics = numerics_of(config, hidden, full_weight, logits_dtype, memory_budget, process_group)
    tensors = policy_tensors(
        completion_ids.shape,
        hidden.device,
        numerics.statistics_dtype,
        config,
        advantages=advantages,
        completion_mask=completion_mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        importance_weights=importance_weights,
        num_items_in_batch=num_items_in_batch,
        entropy_threshold=entropy_threshold,
    )
    wanted = wanted_gradients(hidden, full_weight, full_bias)
    active = active_tokens(config, tensors)
    with gathered(gather, full_weight, full_bias) as (some_weight, _):
        buffer_rows = numerics.plan(some_weight).rows
    route = choose_route(config, tensors, wanted, numerics, buffer_rows, valid_rows, float(grad_scale))
    shape = completion_ids.shape
    if route != "logps":
        loss, logps, entropy, kl, metrics = _LinearLoss.apply(
            hidden,
            full_weight,
            full_bias,
            completion_ids,
            active,
            weight_grad,
            loss_spec(config, float(grad_scale)),
            numerics,
            (-1 if valid_rows is None else valid_rows, route, wanted, gather),
            *tensors,
        )
        return loss_output(loss, logps, entropy, kl, metrics, shape)
    request = Request(numerics, wanted, True, config.entropy_coef != 0, valid_rows, gather)
    logps, entropy = linear_logps(
        hidden,
        full_weight,
        full_bias,
        completion_ids,
        tensors.mask.view(shape),
        None if active is None else active.reshape(shape),
        weight_grad,
        request,
    )
    return policy_loss(
        logps,
        advantages,
        completion_mask,
        config,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        importance_weights=importance_weights,
        num_items_in_batch=num_items_in_batch,
        entropy=entropy if config.entropy_coef != 0 else entropy.detach(),
        entropy_threshold=entropy_threshold,
        grad_scale=grad_scale,
    )
