"""Distribute the rows of an optimizer step over its slices (micro-batches) by length, to compute less padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Maps this rank's number of slices in each optimizer step to the maximum over all ranks.
MaxOverRanks = Callable[[list[int]], list[int]]


def sorted_order(lengths: Sequence[int], rows_per_step: int) -> list[int]:
    """Return the row numbers of one rank, sorted by length within each optimizer step; rows stay in their step."""
    order: list[int] = []
    for start in range(0, len(lengths), rows_per_step):
        order += sorted(range(start, min(start + rows_per_step, len(lengths))), key=lambda row: lengths[row])
    return order


def filled_slices(
    lengths: Sequence[int],
    computed: Sequence[bool],
    rows_per_slice: int,
    slices_per_step: int,
    max_over_ranks: MaxOverRanks | None = None,
) -> tuple[list[int], list[int]]:
    """Fill as few slices as possible with the rows of one rank.

    Rows stay in their optimizer step; its longest rows come first. A slice takes rows while ``rows * longest_of_slice
    <= rows_per_slice * longest_of_step``. So no slice has more padded tokens than the largest one without filling. A
    step needs at most ``slices_per_step`` slices; unneeded slices are empty and come first.

    Args:
        lengths: tokens of each row, prompt plus completion.
        computed: whether each row goes through the model. Other rows join the step's last slice.
        rows_per_slice: rows of a micro-batch without filling.
        slices_per_step: slices of an optimizer step.
        max_over_ranks: None if ranks may run backward for different numbers of slices.

    Returns:
        The row numbers in slice order, and the number of rows of each slice.
    """
    window = slices_per_step * rows_per_slice
    steps = [range(start, min(start + window, len(lengths))) for start in range(0, len(lengths), window)]
    filled = [_fill([row for row in rows if computed[row]], lengths, rows_per_slice) for rows in steps]
    needed = [len(slices) for slices in filled]
    if max_over_ranks is not None:
        needed = max_over_ranks(needed)
    order: list[int] = []
    sizes: list[int] = []
    for rows, slices, number in zip(steps, filled, needed, strict=True):
        idle = [row for row in rows if not computed[row]]
        _split_to_count(slices, idle, lengths, number)
        slices = [[] for _ in range(slices_per_step - len(slices))] + slices
        slices[-1] = slices[-1] + idle
        order += [row for part in slices for row in part]
        sizes += [len(part) for part in slices]
    return order, sizes


def _fill(rows: list[int], lengths: Sequence[int], per_slice: int) -> list[list[int]]:
    waiting = sorted(rows, key=lambda row: -lengths[row])
    budget = per_slice * lengths[waiting[0]] if waiting else 0
    slices: list[list[int]] = []
    while waiting:
        fitting = budget // lengths[waiting[0]]
        slices.append(waiting[:fitting])
        waiting = waiting[fitting:]
    return slices


def _split_to_count(slices: list[list[int]], idle: list[int], lengths: Sequence[int], count: int) -> None:
    """Split slices until there are ``count``: halve the largest; if all hold one row, add a slice with an idle row."""
    while len(slices) < count:
        divisible = [i for i, rows in enumerate(slices) if len(rows) > 1]
        if divisible:
            largest = max(divisible, key=lambda i: len(slices[i]) * lengths[slices[i][0]])
            rows = slices[largest]
            slices[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        else:
            shortest = min(idle, key=lambda row: lengths[row])
            idle.remove(shortest)
            slices.append([shortest])
