"""`grpo-ext plot`: draw the reward curve of a run to a PNG."""

from __future__ import annotations

import os

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.figures import new_figure
from grpo_ext.cli.run_files import METRICS_FILE, PLOT_FILE, read_metrics, read_summary

#: Steps of the moving average.
WINDOW = 5


def plot_run(folder: str, output: str | None = None) -> str:
    """Draw the training reward, the held-out reward before and after, and the best constant answer.

    Args:
        folder: the run folder.
        output: the PNG to write; None = ``reward.png`` in the folder.

    Returns:
        The path written.

    Raises:
        SettingsError: the folder has no metrics with a reward.
    """
    steps, rewards = reward_curve(folder)
    summary = read_summary(folder)
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, ".", color="tab:blue", alpha=0.45, label="training reward, each step")
    axes.plot(steps, moving_average(rewards), color="tab:blue", label=f"mean of {WINDOW} steps")
    before, after = summary.get("heldout_reward_before"), summary.get("heldout_reward_after")
    if before is not None and after is not None:
        axes.plot(
            [0, steps[-1]],
            [before, after],
            "D",
            color="tab:red",
            label="held-out questions, before and after",
        )
        for step, value, side in ((0, before, "left"), (steps[-1], after, "right")):
            axes.annotate(f"{value:.2f}", (step, value), xytext=(0, 8), textcoords="offset points", ha=side)
    if summary.get("best_constant_reward") is not None:
        axes.axhline(summary["best_constant_reward"], color="grey", linestyle="--", label="best constant answer")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean reward")
    axes.set_title(os.path.basename(os.path.abspath(folder)))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    output = output or os.path.join(folder, PLOT_FILE)
    figure.savefig(output, dpi=120)
    return output


def reward_curve(folder: str) -> tuple[list[int], list[float]]:
    """(steps, rewards) of a run's metrics file, one point per step; the last value of a step counts.

    Raises:
        SettingsError: no metrics file, or none of its lines has a step and a reward.
    """
    curve = {
        int(record["step"]): float(record["reward"])
        for record in read_metrics(folder)
        if record.get("reward") is not None and "step" in record
    }
    if not curve:
        raise SettingsError(f"{os.path.join(folder, METRICS_FILE)} contains no reward: no step has finished")
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def moving_average(values: list[float]) -> list[float]:
    """Mean of each value and up to `WINDOW` - 1 before it."""
    windows = [values[max(0, index + 1 - WINDOW) : index + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]
