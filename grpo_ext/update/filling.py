"""Distribute the rows of an optimizer step over its slices by length, to compute less padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Maps the number of slices that this process needs in each optimizer step to the maximum over all processes.
Agree = Callable[[list[int]], list[int]]


def sorted_order(lengths: Sequence[int], rows_per_step: int) -> list[int]:
    """Return the rows of one process, sorted by length within each optimizer step; rows stay in their step."""
    order: list[int] = []
    for start in range(0, len(lengths), rows_per_step):
        order += sorted(range(start, min(start + rows_per_step, len(lengths))), key=lambda row: lengths[row])
    return order


def filled_slices(
    lengths: Sequence[int],
    computed: Sequence[bool],
    rows_per_slice: int,
    slices_per_step: int,
    agree: Agree | None = None,
) -> tuple[list[int], list[int]]:
    """Fill as few slices as possible: return the rows of one process in slice order, and the rows of each slice.

    Rows stay in their optimizer step; its longest rows come first. A slice takes rows while their number times its
    longest row stays within ``rows_per_slice`` times the step's longest row, so no slice is larger than the largest
    unfilled one. A step needs at most ``slices_per_step`` slices. The unneeded ones are empty and come first.

    Args:
        lengths: tokens of each row, prompt plus completion.
        computed: whether a row goes through the model. Other rows join the step's last slice and are not computed.
        rows_per_slice: rows of a micro-batch without filling.
        slices_per_step: slices of an optimizer step.
        agree: returns equal numbers of slices on all processes; None if each process may skip backward independently.

    Returns:
        ``(order, sizes)``.
    """
    window = slices_per_step * rows_per_slice
    steps = [range(start, min(start + window, len(lengths))) for start in range(0, len(lengths), window)]
    filled = [_fill([row for row in rows if computed[row]], lengths, rows_per_slice) for rows in steps]
    needed = [len(slices) for slices in filled]
    if agree is not None:
        needed = agree(needed)
    order: list[int] = []
    sizes: list[int] = []
    for rows, slices, number in zip(steps, filled, needed, strict=True):
        idle = [row for row in rows if not computed[row]]
        _spread(slices, idle, lengths, number)
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


def _spread(slices: list[list[int]], idle: list[int], lengths: Sequence[int], count: int) -> None:
    """Grow to ``count`` slices: halve the largest; once all hold one row, add rows that are not computed (``idle``)."""
    while len(slices) < count:
        parted = [i for i, rows in enumerate(slices) if len(rows) > 1]
        if parted:
            largest = max(parted, key=lambda i: len(slices[i]) * lengths[slices[i][0]])
            rows = slices[largest]
            slices[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        else:
            shortest = min(idle, key=lambda row: lengths[row])
            idle.remove(shortest)
            slices.append([shortest])
