"""Fewer micro-batches of the same padded size: short completions share one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo_ext.rollouts.batching import BatchPlan

#: From the number of slices that this process needs in each optimizer step to the most that any process needs.
Agree = Callable[[list[int]], list[int]]


def filled_slices(
    lengths: Sequence[int], trained: Sequence[bool], plan: BatchPlan, agree: Agree | None = None
) -> tuple[list[int], list[int]]:
    """Rows of one process in the order of its slices, and the number of rows of each slice.

    An optimizer step keeps its rows. The longest come first, and a slice takes rows while their number times the
    longest of them stays within that of a slice of ``per_device_batch_size`` of the step's longest rows: no slice is
    larger than the largest that there would be without. So there are at most as many slices as before; the rest are
    empty, and come first.

    Args:
        lengths: tokens of each row, prompt and completion.
        trained: whether a row goes through the model; the others are put to the step's last slice, where nobody
            computes them.
        plan: the batch numbers.
        agree: where a backward of this process waits for the others': then the same slices hold a row on all of them.
    """
    count = min(plan.gradient_accumulation_steps, plan.steps_per_generation)
    window = count * plan.per_device_batch_size
    steps = [range(start, min(start + window, len(lengths))) for start in range(0, len(lengths), window)]
    filled = [_fill([row for row in rows if trained[row]], lengths, plan.per_device_batch_size) for rows in steps]
    needed = [len(slices) for slices in filled]
    if agree is not None:
        needed = agree(needed)
    order: list[int] = []
    sizes: list[int] = []
    for rows, slices, number in zip(steps, filled, needed, strict=True):
        idle = [row for row in rows if not trained[row]]
        _spread(slices, idle, lengths, number)
        slices = [[] for _ in range(count - len(slices))] + slices
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
    """Slices until there are ``count``: the largest are halved; where all hold one row, rows of ``idle`` are added."""
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
