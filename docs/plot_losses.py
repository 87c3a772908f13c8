"""Draws docs/plots/: the loss of one token and its gradient against the ratio, for every loss type.

    python docs/plot_losses.py

Values come from `grpo_ext.reference` in fp64: one token whose old log probability is -1, advantage +1 and -1, the
constants of each type as `LossConfig` has them (cispo with a cap of 2). The gradient is by the log probability.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from grpo_ext import LossConfig, reference
from grpo_ext.config import LOSS_TYPES

FOLDER = Path(__file__).parent / "plots"
OLD = -1.0


def config_of(loss_type: str) -> LossConfig:
    high = {"cispo": 2.0}.get(loss_type, 0.28)
    return LossConfig(loss_type=loss_type, epsilon_high=high, max_completion_length=1)  # type: ignore[arg-type]


def curve(config: LossConfig, ratio: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the log probability, one sequence of one token for each ratio."""
    new = (OLD + ratio.log()).unsqueeze(1).requires_grad_()
    ones = torch.ones_like(new, dtype=torch.bool)
    values = []
    for row in range(len(ratio)):  # one call for each: no reduction between them
        one = new[row : row + 1]
        advantages = torch.full((1,), advantage, dtype=torch.float64)
        old = torch.full_like(one, OLD).detach()
        values.append(reference.policy_loss(one, advantages, ones[:1], config, old_logps=old).loss)
    loss = torch.stack(values)
    (slope,) = torch.autograd.grad(loss.sum(), new)
    return loss.detach(), slope.squeeze(1)


def draw(loss_type: str) -> Path:
    ratio = torch.linspace(0.05, 2.5, 246, dtype=torch.float64)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    value, gradient = figure.subplots(1, 2)
    for advantage, colour in ((1.0, "tab:blue"), (-1.0, "tab:red")):
        loss, slope = curve(config_of(loss_type), ratio, advantage)
        value.plot(ratio, loss, color=colour, label=f"A = {advantage:+.0f}")
        gradient.plot(ratio, slope, color=colour, label=f"A = {advantage:+.0f}")
    for axes, title in ((value, "loss of the token"), (gradient, "its gradient by log p")):
        axes.set_title(f"{loss_type}: {title}", fontsize=10)
        axes.set_xlabel("ratio r")
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"loss_{loss_type}.png"
    figure.savefig(path, dpi=90)
    return path


if __name__ == "__main__":
    for name in LOSS_TYPES:
        print(draw(name))
