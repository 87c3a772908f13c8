"""`linear_grpo_loss`: the language-model head and the GRPO loss together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext._autograd import first_order
from grpo_ext._checks import Number, PolicyTensors, check_config, policy_tensors
from grpo_ext._ops import loss_spec
from grpo_ext.config import LossConfig
from grpo_ext.linear.arguments import Gather, checked_head, numerics_of, wanted_gradients, whole_head
from grpo_ext.linear.logps import Request, linear_logps
from grpo_ext.linear.operators import LinearLoss, flat
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes.base import Inputs, Wanted
from grpo_ext.linear.rows import gradient_mask
from grpo_ext.linear.schedule import choose_schedule
from grpo_ext.output import GRPOLossOutput, loss_output
from grpo_ext.policy import checked_policy_loss
from grpo_ext.vocabulary.statistics import kernels


class _Options(NamedTuple):
    """Arguments of `_LinearLoss` other than tensors."""

    numerics: Numerics
    spec: list[float]  # constants of the loss, see `grpo_ext._ops.loss_spec`
    schedule: str
    wanted: Wanted
    valid_rows: int | None
    gather: Gather | None


class _LinearLoss(torch.autograd.Function):
    """Compute the loss and its gradients in the forward; backward hands the gradients to autograd, once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        gradient_mask: Tensor | None,
        weight_grad: Tensor | None,
        options: _Options,
        *policy: Any,
    ) -> tuple[Tensor, ...]:
        with whole_head(options.gather, hidden, weight, bias, weight_grad) as head:
            arguments = LinearLoss(
                Inputs(hidden, *head, ids, options.numerics), PolicyTensors(*policy), options.spec, gradient_mask,
                options.valid_rows, options.schedule, options.wanted, weight_grad,
            )  # fmt: skip
            *outputs, dhidden, dweight, dbias = kernels.linear_loss(*flat(arguments))
        loss, logps, entropy, kl, metrics = outputs
        ctx.mark_non_differentiable(logps, entropy, kl, metrics)
        ctx.save_for_backward(loss)
        ctx.set_materialize_grads(False)
        ctx.grads = (dhidden, dweight, dbias)
        ctx.wanted, ctx.accumulated = options.wanted, weight_grad is not None
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
        rest = (None,) * (4 + len(PolicyTensors._fields))  # the other arguments have no gradient
        if grads[0].dtype == torch.float64 and not ctx.accumulated and grad_loss is not None:
            # keep the gradients: gradcheck, which needs fp64, calls backward several times
            return *(g * grad_loss if wanted else None for g, wanted in zip(grads, ctx.wanted, strict=True)), *rest
        ctx.grads = None
        if grad_loss is None:
            return None, None, None, *rest
        if ctx.accumulated:
            torch._assert_async(
                grad_loss == 1,
                "linear_grpo_loss(weight_grad=...) added its gradient in the forward, for an upstream gradient of 1; "
                "this backward has another: call backward() on the loss itself and pass the factor as grad_scale",
            )
        handed: list[Tensor | None] = []
        for grad, wanted in zip(grads, ctx.wanted, strict=True):
            if not wanted or (grad is grads[1] and ctx.accumulated):
                handed.append(None)
                continue
            # in place; a no-op if the factor is 1
            kernels.scale_rows_(grad.view(1, -1, grad.shape[-1]), grad_loss)
            handed.append(grad)
        return *handed, *rest


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
    """Compute `grpo_loss` of ``hidden @ weight.T + bias`` without a tensor of the size tokens x vocabulary.

    Rows with mask 0 enter no product. Rows with advantage 0 enter no product of the gradient, unless the loss has a KL
    term or an entropy bonus. On the CPU the same holds for clipped rows. `choose_schedule` lists the costs.

    Args:
        hidden: ``(B,T,H)``, or ``(N,H)`` for one sequence; ``hidden[b,t]`` predicts ``completion_ids[b,t]``.
        weight: ``(V,H)``, bias: ``(V,)`` or None. Hidden, weight and bias get a gradient if they require one.
        weight_grad: fp32 ``(V,H)`` (fp64 for fp64) to which the gradient of ``weight`` is added; autograd then gets
            none for it. This call may already add it, for an upstream gradient of 1. So call ``backward()`` on the loss
            itself and pass factors as ``grad_scale``; any other upstream gradient raises an error in backward.
        logits_dtype, process_group, memory_budget, valid_rows, gather: as in `linear_selective_log_softmax`.

    The other arguments, the result and the errors are those of `grpo_loss`. In float16 pass the loss scale as
    ``grad_scale``: the forward then forms the gradients. Without it backward forms them, because the upstream gradient
    holds the scale; that costs as much as the schedule ``logps_then_loss``.
    """
    plain_weight, plain_bias = checked_head(
        hidden, completion_ids, "completion_ids", weight, bias, weight_grad, gather, memory_budget, valid_rows
    )
    check_config(config)
    numerics = numerics_of(config, hidden, plain_weight, logits_dtype, memory_budget, process_group)
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
    wanted = wanted_gradients(hidden, plain_weight, plain_bias)
    with whole_head(gather, hidden, plain_weight, plain_bias, weight_grad) as head:
        buffer_rows = numerics.plan(head[0]).rows
    grad_scale = float(grad_scale)
    schedule = choose_schedule(config, tensors, wanted, numerics, buffer_rows, valid_rows, grad_scale)
    has_gradient, shape = gradient_mask(config, tensors), completion_ids.shape
    inputs = hidden, plain_weight, plain_bias, completion_ids
    if schedule != "logps_then_loss":
        options = _Options(numerics, loss_spec(config, grad_scale), schedule, wanted, valid_rows, gather)
        loss, logps, entropy, kl, metrics = _LinearLoss.apply(*inputs, has_gradient, weight_grad, options, *tensors)
        return loss_output(loss, logps, entropy, kl, metrics, shape)
    request = Request(numerics, wanted, True, config.entropy_coef != 0, valid_rows, gather)
    has_gradient = None if has_gradient is None else has_gradient.reshape(shape)
    logps, entropy, _ = linear_logps(*inputs, tensors.mask.view(shape), has_gradient, weight_grad, request)
    if config.entropy_coef == 0:
        entropy = entropy.detach()
    return checked_policy_loss(logps, entropy, tensors, config, grad_scale)
