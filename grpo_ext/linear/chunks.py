"""The loops over chunks of rows: log probabilities, gradients of given coefficients, gradients of a loss.

No tensor has the size tokens x vocabulary. All chunks use one buffer: a chunk's product is overwritten by its gradient,
then by the next chunk's product. Only the `Route` knows whether a product holds logits or probabilities.
"""

from __future__ import annotations

from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.packing import none_if_empty
from grpo_ext.linear.routes.base import Gradients, Route, Saved
from grpo_ext.linear.rows import row_chunks, sequence_chunks
from grpo_ext.vocabulary.statistics import kernels


def log_probabilities(route: Route, gradients: Gradients, save_product: bool) -> Saved:
    """Fill ``route.logps`` and ``route.entropy``; return them with the statistics and product that a backward needs.

    Args:
        gradients: if its ``hidden`` is a tensor, dlogp/dhidden is added to it, and no statistics are saved: backward
            only scales the rows of dlogp/dhidden by the upstream gradient.
        save_product: save the product; one chunk must hold all rows.
    """
    selection = route.selection
    differentiate = gradients.hidden is not None
    row_stats, product = route.zeros_per_token(1 + save_product), None
    if differentiate:
        route.differentiate_logps()
    for start, end in row_chunks(selection.size, route.capacity):
        needed = end - start if save_product else selection.gradient_rows_between(start, end) if differentiate else 0
        chunk = route.forward(start, end, needed)
        if not differentiate:
            route.save(chunk, row_stats)
        elif needed:
            route.accumulate(chunk.part(0, needed), gradients)
        if save_product:
            product = chunk.product
    return Saved(route.logps, route.entropy, row_stats, product)


def gradients_of_logps(
    route: Route, saved: Saved, coef: Tensor, entropy_coef: Tensor | None, gradients: Gradients
) -> None:
    """Add the gradients of log probabilities and entropies to ``gradients``, from the saved product or a new one.

    Args:
        coef, entropy_coef: (tokens,) upstream gradients of the log probabilities and the entropies; None: 0.
    """
    count = route.selection.size
    for start, end in row_chunks(count, route.capacity):
        chunk = route.multiply(route.rebuild(start, end, saved), coef, entropy_coef)
        route.accumulate(chunk, gradients, is_last=end == count)


def gradients_of_loss(
    route: Route,
    tensors: PolicyTensors,
    spec: list[float],
    schedule: str,
    sequence_lengths: list[int] | None,
    gradients: Gradients,
) -> None:
    """Fill ``route.logps`` and ``route.entropy``, and add the gradients of a loss.

    Args:
        tensors: of the loss. spec: its constants, see `grpo_ext._ops.loss_spec`.
        sequence_lengths: number of gradient rows of each completion if chunks must hold whole completions, else None.
    """
    selection, shape = route.selection, tensors.mask.shape
    ranges = sequence_chunks(sequence_lengths or [], route.capacity)
    ranges += row_chunks(selection.size, route.capacity, start=ranges[-1][1] if ranges else 0)
    fused = schedule in route.fused_schedules
    if fused:
        route.differentiate_loss(tensors, spec)
    for start, end in ranges:
        needed = selection.gradient_rows_between(start, end)
        chunk = route.forward(start, end, needed)
        if not needed:
            continue
        chunk = chunk.part(0, needed)
        if not fused:
            # Compute the coefficients of all tokens. Later chunks, whose log probabilities are still 0, affect none of
            # this chunk's.
            logps, entropy = route.logps.view(shape), route.entropy.view(shape)
            _, coef, entropy_coef, _, _ = kernels.policy_loss(logps, entropy, *tensors, spec)
            entropy_coef = none_if_empty(entropy_coef)
            flat = None if entropy_coef is None else entropy_coef.view(-1)
            chunk = route.multiply(chunk, coef.view(-1), flat)
        route.accumulate(chunk, gradients, is_last=end >= selection.gradient_rows)
