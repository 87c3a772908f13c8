"""The loops over chunks of rows: log probabilities, gradients of given coefficients, gradients of a loss.

Nothing here has the size tokens x vocabulary: a chunk's product lies in one buffer, becomes its own gradient there, and
is overwritten by the next chunk. What the product holds is known to the `Route` alone.
"""

from __future__ import annotations

from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.packing import given
from grpo_ext.linear.routes.base import Gradients, Route, Saved
from grpo_ext.linear.rows import row_chunks, sequence_chunks
from grpo_ext.vocabulary.statistics import kernels


def log_probabilities(route: Route, gradients: Gradients, keep: bool) -> Saved:
    """Fill ``route.logps`` and ``route.entropy``; return what a backward needs.

    Args:
        gradients: receives dlogp/dhidden if it has a tensor for it: backward then scales its rows, whatever the
            upstream gradient, and needs nothing saved.
        keep: save the product, of all rows in one chunk.
    """
    selection = route.selection
    derivative = gradients.hidden is not None
    rows, product = route.per_token(1 + keep), None
    if derivative:
        route.differentiate_logps()
    for start, end in row_chunks(selection.size, route.capacity):
        needed = end - start if keep else selection.gradient_rows_between(start, end) if derivative else 0
        chunk = route.forward(start, end, needed)
        if not derivative:
            route.save(chunk, rows)
        elif needed:
            route.accumulate(chunk.part(0, needed), gradients)
        if keep:
            product = chunk.product
    return Saved(route.logps, route.entropy, rows, product)


def gradients_of_logps(
    route: Route, saved: Saved, coef: Tensor, entropy_coef: Tensor | None, gradients: Gradients
) -> None:
    """Add the gradients for upstream gradients ``coef`` of the log probabilities and ``entropy_coef`` of the entropies,
    both (tokens,), from the saved product or a new one."""
    count = route.selection.size
    for start, end in row_chunks(count, route.capacity):
        chunk = route.multiply(route.again(start, end, saved), coef, entropy_coef)
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
        sequence_lengths: rows with a gradient of each completion, if chunks must hold whole completions.
    """
    selection, shape = route.selection, tensors.mask.shape
    whole = sequence_chunks(sequence_lengths or [], route.capacity)
    fused = schedule in route.fused_schedules
    if fused:
        route.differentiate_loss(tensors, spec)
    for start, end in whole + row_chunks(selection.size, route.capacity, start=whole[-1][1] if whole else 0):
        needed = selection.gradient_rows_between(start, end)
        chunk = route.forward(start, end, needed)
        if not needed:
            continue
        chunk = chunk.part(0, needed)
        if not fused:
            # On all tokens: those without a log probability yet do not enter this chunk's coefficients.
            logps, entropy = route.logps.view(shape), route.entropy.view(shape)
            _, coef, entropy_coef, _, _ = kernels.policy_loss(logps, entropy, *tensors, spec)
            entropy_coef = given(entropy_coef)
            flat = None if entropy_coef is None else entropy_coef.view(-1)
            chunk = route.multiply(chunk, coef.view(-1), flat)
        route.accumulate(chunk, gradients, is_last=end >= selection.gradient_rows)
