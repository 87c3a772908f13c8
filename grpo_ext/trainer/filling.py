"""Fewer micro-batches of the same padded size: short completions share one."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_ext.trainer.batching import BatchPlan


def filled_slices(lengths: Sequence[int], trained: Sequence[bool], plan: BatchPlan) -> tuple[list[int], list[int]]:
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
    """
    count = min(plan.gradient_accumulation_steps, plan.steps_per_generation)
    window = count * plan.per_device_batch_size
    order: list[int] = []
    sizes: list[int] = []
    for start in range(0, len(lengths), window):
        rows = range(start, min(start + window, len(lengths)))
        waiting = sorted((row for row in rows if trained[row]), key=lambda row: -lengths[row])
        budget = plan.per_device_batch_size * lengths[waiting[0]] if waiting else 0
        slices: list[list[int]] = []
        while waiting:
            fitting = budget // lengths[waiting[0]]
            slices.append(waiting[:fitting])
            waiting = waiting[fitting:]
        slices = [[] for _ in range(count - len(slices))] + slices
        slices[-1] = slices[-1] + [row for row in rows if not trained[row]]
        order += [row for part in slices for row in part]
        sizes += [len(part) for part in slices]
    return order, sizes
