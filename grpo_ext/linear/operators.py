"""The chunk loops as operators that torch.compile does not trace: the number of chunks depends on the masks.

Output shapes follow from the inputs alone. An output that the arguments turn off is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.arguments import schema_of, with_arguments
from grpo_ext._ops.packing import ENTROPY_COEF, policy_outputs
from grpo_ext.linear.chunks import gradients_of_logps, gradients_of_loss, log_probabilities
from grpo_ext.linear.routes import choose_route
from grpo_ext.linear.routes.base import Inputs, Saved, Wanted
from grpo_ext.linear.rows import RowArguments, select_rows, select_sequences
from grpo_ext.vocabulary.shards import check_id_range, total_vocabulary
from grpo_ext.vocabulary.statistics import kernels

library = torch.library.Library("grpo_ext", "FRAGMENT")

Arguments = TypeVar("Arguments")
Outputs = tuple[Tensor, ...]
_GRADIENTS = "Tensor dhidden, Tensor dweight, Tensor dbias"
_cudagraph_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # an operator may synchronize to count rows
_TAGS = () if _cudagraph_unsafe is None else (_cudagraph_unsafe,)


class LinearLogps(NamedTuple):
    """Arguments of ``linear_logps``."""

    inputs: Inputs
    row_arguments: RowArguments
    with_entropy: bool
    differentiate: bool  # form dlogp/dhidden
    save_product: bool  # return the product of all rows
    needs_entropy_gradient: bool  # backward will need the gradient of an entropy
    with_top1: bool


class LinearGradient(NamedTuple):
    """Arguments of ``linear_gradient``."""

    inputs: Inputs
    row_arguments: RowArguments
    saved: Saved
    coef: Tensor  # upstream gradients of the log probabilities, shape of the ids
    entropy_coef: Tensor | None  # upstream gradients of the entropies
    wanted: Wanted
    weight_grad: Tensor | None
    needs_entropy_gradient: bool  # as in the forward


class LinearLoss(NamedTuple):
    """Arguments of ``linear_loss``."""

    inputs: Inputs
    policy: PolicyTensors
    spec: list[float]  # constants of the loss, see `grpo_ext._ops.loss_spec`
    gradient_mask: Tensor | None
    valid_rows: int | None
    schedule: str
    wanted: Wanted
    weight_grad: Tensor | None


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    """Flatten nested NamedTuples into the argument list of the operator's schema."""
    values: list[Any] = []
    for value in arguments:
        values += flat(value) if isinstance(value, tuple) else [value]
    return values


def _operator(
    arguments: type[Arguments], outputs: str, fake: Callable[[Arguments], Outputs], mutates: Sequence[str] = ()
) -> Callable[[Callable[[Arguments], Outputs]], None]:
    """Register a function of one NamedTuple as an operator named like the function; it runs without autocast."""

    def register(function: Callable[[Arguments], Outputs]) -> None:
        def without_autocast(a: Any) -> Outputs:
            with torch.autocast(a.inputs.hidden.device.type, enabled=False):
                return function(a)

        name = function.__name__
        library.define(f"{name}({schema_of(arguments, mutates)}) -> ({outputs})", tags=_TAGS)
        library.impl(name, with_arguments(arguments, without_autocast), "CompositeExplicitAutograd")
        torch.library.register_fake(f"grpo_ext::{name}", with_arguments(arguments, fake), lib=library)

    return register


def _check_ids(inputs: Inputs, mask: Tensor | None) -> None:
    """Check that unmasked ids are in the vocabulary (CPU only), and that the shards of all ranks have equal sizes."""
    ids = inputs.ids
    vocab = total_vocabulary(inputs.weight.shape[0], inputs.numerics.group, ids.device)
    check_id_range(ids, vocab, mask, "the head; set the mask to 0 there, or pass the whole head")


def _logps_shapes(a: LinearLogps) -> Outputs:
    hidden, weight, _, ids, numerics = a.inputs
    logps, entropy = (ids.new_empty(ids.shape, dtype=numerics.statistics_dtype) for _ in range(2))
    is_top1 = ids.new_empty(ids.shape if a.with_top1 else (0,), dtype=torch.bool)
    row_stats = logps.new_empty((1 + a.save_product, *ids.shape))
    dlogp_dhidden = hidden.new_empty(hidden.shape if a.differentiate else (0,))
    product = hidden.new_empty(0)
    if a.save_product:
        rows = torch.library.get_ctx().new_dynamic_size()
        product = hidden.new_empty((rows, weight.shape[0]), dtype=numerics.logits_dtype)
    return logps, entropy, is_top1, row_stats, dlogp_dhidden, product


@_operator(
    LinearLogps,
    "Tensor logps, Tensor entropy, Tensor is_top1, Tensor row_stats, Tensor dlogp_dhidden, Tensor product",
    _logps_shapes,
)
def linear_logps(a: LinearLogps) -> Outputs:
    ids = a.inputs.ids
    _check_ids(a.inputs, a.row_arguments.mask)
    selection, mask = a.row_arguments.select(ids.numel())
    chosen = choose_route(a.inputs.weight, a.inputs.numerics, needs_entropy_gradient=a.needs_entropy_gradient)
    route = chosen(a.inputs, mask, selection, a.with_entropy, a.differentiate or a.save_product, a.with_top1)
    gradients = route.gradients(Wanted(a.differentiate, False, False))
    saved = log_probabilities(route, gradients, a.save_product)
    assert saved.entropy is not None
    assert saved.row_stats is not None
    product = a.inputs.hidden.new_empty(0) if saved.product is None else saved.product
    row_stats = saved.row_stats.view(1 + a.save_product, *ids.shape)
    dlogp_dhidden = route.finish_hidden(gradients.hidden)
    is_top1 = ids.new_empty(0, dtype=torch.bool)
    if a.with_top1:  # a row with a NaN has no greatest logit
        is_top1 = (route.is_top1 & ~saved.logps.isnan()).view(ids.shape)
    return saved.logps.view(ids.shape), saved.entropy.view(ids.shape), is_top1, row_stats, dlogp_dhidden, product


def _gradient_shapes(a: LinearGradient | LinearLoss) -> Outputs:
    hidden, weight, bias, _, _ = a.inputs
    return (
        hidden.new_empty(hidden.shape if a.wanted.wants_hidden else (0,)),
        torch.empty_like(weight) if a.wanted.wants_weight and a.weight_grad is None else hidden.new_empty(0),
        torch.empty_like(bias) if a.wanted.wants_bias and bias is not None else hidden.new_empty(0),
    )


@_operator(LinearGradient, _GRADIENTS, _gradient_shapes, mutates=("weight_grad", "product"))
def linear_gradient(a: LinearGradient) -> Outputs:
    # Masked rows get no gradient: their log probability is the constant 0.
    selection, mask = a.row_arguments.select(a.inputs.ids.numel())
    weight, numerics, saved = a.inputs.weight, a.inputs.numerics, a.saved
    chosen = choose_route(
        weight, numerics, needs_entropy_gradient=a.needs_entropy_gradient or a.entropy_coef is not None
    )
    if chosen is not choose_route(weight, numerics, needs_entropy_gradient=a.needs_entropy_gradient):
        saved = saved._replace(row_stats=None, product=None)  # the forward took another route
    route = chosen(a.inputs, mask, selection)
    gradients = route.gradients(a.wanted, a.weight_grad)
    entropy_coef = None if a.entropy_coef is None else a.entropy_coef.reshape(-1)
    gradients_of_logps(route, saved, a.coef.reshape(-1), entropy_coef, gradients)
    dhidden = route.finish_hidden(gradients.hidden)
    del route  # free its buffers before the sums are cast to the head's dtype
    return dhidden, *gradients.head.results(a.inputs.hidden)


def _loss_shapes(a: LinearLoss) -> Outputs:
    logps = torch.empty_like(a.policy.mask, dtype=a.inputs.numerics.statistics_dtype)
    loss, kl, metrics = policy_outputs(logps, a.spec)
    return loss, logps, torch.empty_like(logps), kl, metrics, *_gradient_shapes(a)


@_operator(
    LinearLoss, f"Tensor loss, Tensor logps, Tensor entropy, Tensor kl, Tensor metrics, {_GRADIENTS}", _loss_shapes,
    mutates=("weight_grad",),
)  # fmt: skip
def linear_loss(a: LinearLoss) -> Outputs:
    ids, mask = a.inputs.ids, a.policy.mask
    _check_ids(a.inputs, mask.view(ids.shape))
    lengths: list[int] | None = None
    if a.schedule == "three_pass_sequences":
        selection, lengths = select_sequences(mask, a.gradient_mask)
    else:
        selection = select_rows(mask, a.gradient_mask, ids.numel(), a.valid_rows)
    chosen = choose_route(a.inputs.weight, a.inputs.numerics, needs_entropy_gradient=a.spec[ENTROPY_COEF] != 0)
    route = chosen(a.inputs, None if selection.excludes_masked else mask, selection)
    gradients = route.gradients(a.wanted, a.weight_grad)
    gradients_of_loss(route, a.policy, a.spec, a.schedule, lengths, gradients)
    dhidden = route.finish_hidden(gradients.hidden)
    logps, entropy = route.logps.view(mask.shape), route.entropy.view(mask.shape)
    del route  # free its buffers before the sums are cast to the head's dtype
    dweight, dbias = gradients.head.results(a.inputs.hidden)
    loss, _, _, kl, metrics = kernels.policy_loss(logps, entropy, *a.policy, a.spec)
    return loss, logps, entropy, kl, metrics, dhidden, dweight, dbias
