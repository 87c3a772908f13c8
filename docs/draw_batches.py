"""Draws docs/plots/batches_*.svg: the worked examples of SPEC section 7 as cycles, micro-batches and optimizer steps.

    python docs/draw_batches.py

Which prompt stands in which row comes from `plan_batches` and `PromptSchedule`, as in training. The background is
opaque, so the drawings read the same on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grpo_ext.rollouts.batching import BatchPlan, PromptSchedule, plan_batches

FOLDER = Path(__file__).parent / "plots"

#: per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, num_generations, num_iterations
EXAMPLES = {
    "two_updates": (3, 2, 4, 3, 1),
    "one_update": (3, 4, 4, 3, 1),
    "split_groups": (3, 4, 4, 4, 1),
    "whole_groups": (6, 2, 2, 3, 1),
    "replays": (3, 2, 2, 2, 2),
}

CELL, GAP, LEFT, TOP = 34, 16, 118, 70
COLOURS = ("#9ecae1", "#fdae6b", "#a1d99b", "#cbc9e2")
INK, FAINT, PAPER = "#1f2933", "#52606d", "#ffffff"


def draw(p: int, ga: int, spg: int, g: int, iterations: int) -> str:
    """Two generation batches of one process, as the text of an SVG file."""
    plan = plan_batches(p, 1, ga, g, num_iterations=iterations, steps_per_generation=spg)
    schedule = PromptSchedule(2 * plan.unique_prompts, plan, shuffle=False)
    micro_steps = 2 * plan.micro_steps_per_generation
    bottom = TOP + p * CELL
    width, height = x(micro_steps), bottom + 70
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>',
        *(text(14, y, label, "start") for y, label in ((28, "generation"), (bottom + 21, "micro-step"))),
        text(14, bottom - p * CELL / 2 + 4, "micro-batch", "start"),
        text(14, bottom + 56, "optimizer step", "start"),
    ]
    for generation in range(2):
        start, end = (x((generation + i) * plan.micro_steps_per_generation) for i in (0, 1))
        lines += bar(start, end - GAP, 36, f"cycle {'AB'[generation]}", 28)
    for step in range(micro_steps):
        lines += micro_batch(schedule, plan, step, bottom)
    return "\n".join([*lines, "</svg>", ""])


def micro_batch(schedule: PromptSchedule, plan: BatchPlan, step: int, bottom: int) -> Iterator[str]:
    """One column: the prompt of each row, the micro-step's number, and the update that follows."""
    place = schedule.locate(step)
    rows = schedule.rows(*place.epoch_and_generation)
    for row, position in enumerate(plan.rank_rows(0, place.slice_index)):
        prompt, y = rows[position], TOP + row * CELL
        colours = f'fill="{COLOURS[prompt % len(COLOURS)]}" stroke="{PAPER}"'
        yield f'<rect x="{x(step)}" y="{y}" width="{CELL}" height="{CELL}" {colours}/>'
        yield text(x(step) + CELL / 2, y + CELL / 2 + 5, str(prompt))
    yield text(x(step) + CELL / 2, bottom + 21, str(step + 1))
    if plan.num_iterations > 1 and place.slice_index == 0:
        middle = (x(step) + x(step + plan.steps_per_generation) - GAP) / 2
        yield text(middle, TOP - 12, f"use {place.iteration + 1}")
    updates, rest = divmod(step + 1, plan.gradient_accumulation_steps)
    if rest == 0:
        start = x(step + 1 - plan.gradient_accumulation_steps)
        yield from bar(start, x(step) + CELL, bottom + 34, f"update {updates}", bottom + 56)


def bar(start: float, end: float, y: float, label: str, label_y: float) -> list[str]:
    """A line with a label at its middle."""
    line = f'<line x1="{start}" y1="{y}" x2="{end}" y2="{y}" stroke="{FAINT}" stroke-width="2"/>'
    return [line, text((start + end) / 2, label_y, label)]


def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{content}</text>'


def x(step: int) -> int:
    """The left edge of a micro-step's column."""
    return LEFT + step * (CELL + GAP)


if __name__ == "__main__":
    for name, numbers in EXAMPLES.items():
        (FOLDER / f"batches_{name}.svg").write_text(draw(*numbers), encoding="utf-8")
