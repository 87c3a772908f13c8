"""`grpo-ext plot RUN RUN ...`: compare runs in one self-contained HTML file and one PNG."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Sequence
from typing import Any

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.figures import new_figure
from grpo_ext.cli.plot import moving_average
from grpo_ext.cli.run_files import read_metrics, read_summary

#: Panel title, and names of its metric in order of preference; panels without values are skipped.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward",)),
    ("mean completion length, tokens", ("completions/mean_length",)),
    ("entropy, nats", ("entropy",)),
    ("share of tokens clipped", ("clip_ratio/region_mean",)),
    (
        "importance weight against the engine, mean",
        ("sampling/importance_sampling_ratio/mean", "importance_weight/mean"),
    ),
    (
        "importance weight against the engine, greatest",
        ("sampling/importance_sampling_ratio/max", "importance_weight/max"),
    ),
    (
        "mismatch with the engine, mean |Δ log p|",
        ("sampling/sampling_logp_difference/mean", "sampling_logp_difference/mean"),
    ),
    (
        "mismatch with the engine, greatest |Δ log p|",
        ("sampling/sampling_logp_difference/max", "sampling_logp_difference/max"),
    ),
    ("KL to the reference model", ("kl",)),
    ("gradient norm", ("grad_norm",)),
)
#: Phases of a step, in the order of the stacked bars.
PHASES = ("time/generation", "time/rewards", "time/logps", "time/forward", "time/backward")
#: Rows of the table of summaries.
SUMMARY = (
    "model", "dtype", "steps", "seconds", "step_seconds", "heldout_reward_before", "heldout_reward_after",
    "best_constant_reward", "loss_path", "backend", "seed",
)  # fmt: skip

#: Width and height of a panel, in inches.
PANEL = (6.4, 3.8)

Curve = tuple[list[int], list[float]]


def compare_runs(folders: Sequence[str], output: str = "comparison.html") -> list[str]:
    """Draw several runs into a self-contained HTML file and a PNG of the same name.

    Args:
        folders: run folders, each with a metrics file.
        output: the HTML or PNG file; the other file gets the same name with its own suffix.

    Returns:
        The paths written: HTML, then PNG.

    Raises:
        SettingsError: a folder is not a run folder, or no run has a metric of `PANELS`.
    """
    names = labels(folders)
    metrics = {name: read_metrics(folder) for name, folder in zip(names, folders, strict=True)}
    panels = [(title, curves) for title, keys in PANELS if (curves := curves_of(metrics, keys))]
    times = {name: mean_times(records) for name, records in metrics.items()}
    times = {name: phases for name, phases in times.items() if phases}
    if not panels:
        raise SettingsError(f"none of {', '.join(folders)} holds a metric to compare")
    figures = []
    for title, curves in panels:
        figure = new_figure(*PANEL)
        _draw_curves(figure.add_subplot(), title, curves, names)
        figures.append((title, figure))
    if times:
        figure = new_figure(*PANEL)
        _draw_times(figure.add_subplot(), times)
        figures.append(("seconds of a step, by phase", figure))
    base = os.path.splitext(output)[0]
    page, picture = f"{base}.html", f"{base}.png"
    summaries = {name: read_summary(folder) for name, folder in zip(names, folders, strict=True)}
    with open(page, "w", encoding="utf-8") as file:
        file.write(_page(figures, summaries))
    _all_panels(panels, times, names).savefig(picture, dpi=110)
    return [page, picture]


def labels(folders: Sequence[str]) -> list[str]:
    """A short unique name for each run: the last parts of its path."""
    paths = [os.path.abspath(folder).split(os.sep) for folder in folders]
    names = [parts[-1] for parts in paths]
    depth = 1
    while len(set(names)) < len(names) and depth < max(map(len, paths)):
        depth += 1
        names = [os.path.join(*parts[-depth:]) for parts in paths]
    if len(set(names)) < len(names):
        raise SettingsError(f"a run is named twice: {', '.join(folders)}; name each run once")
    return names


def curves_of(metrics: dict[str, list[dict[str, Any]]], keys: Sequence[str]) -> dict[str, Curve]:
    """For each run, (steps, values) of the first of `keys` that it has; the last value of a step counts."""
    found: dict[str, Curve] = {}
    for name, records in metrics.items():
        for key in keys:
            points = {
                int(record["step"]): float(record[key])
                for record in records
                if "step" in record and record.get(key) is not None and math.isfinite(record[key])
            }
            if points:
                steps = sorted(points)
                found[name] = (steps, [points[step] for step in steps])
                break
    return found


def mean_times(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of each phase over the steps that log it, and ``other``: the rest of the step."""
    means = {}
    for phase in (*PHASES, "step_time"):
        values = [float(record[phase]) for record in records if record.get(phase) is not None]
        if values:
            means[phase] = sum(values) / len(values)
    whole = means.pop("step_time", None)
    if whole is not None and means:
        means["other"] = max(0.0, whole - sum(means.values()))
    return means


def _draw_curves(axes: Any, title: str, curves: dict[str, Curve], names: Sequence[str]) -> None:
    """Draw the steps of each run as points and their moving average as a line; a run keeps its colour in all panels."""
    for name, (steps, values) in curves.items():
        colour = f"C{list(names).index(name) % 10}"
        axes.plot(steps, values, ".", color=colour, alpha=0.25, markersize=3)
        axes.plot(steps, moving_average(values), color=colour, label=name)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _draw_times(axes: Any, times: dict[str, dict[str, float]]) -> None:
    left = dict.fromkeys(times, 0.0)
    for phase in (*PHASES, "other"):
        widths = [times[name].get(phase, 0.0) for name in times]
        if any(widths):
            axes.barh(list(times), widths, left=list(left.values()), label=phase.removeprefix("time/"))
            left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, mean")
    axes.set_title("time per phase", fontsize=10)
    axes.legend(fontsize="x-small")


def _all_panels(panels: Sequence[tuple[str, dict[str, Curve]]], times: dict[str, Any], names: Sequence[str]) -> Any:
    count = len(panels) + bool(times)
    rows = -(-count // 2)
    figure = new_figure(2 * PANEL[0], rows * PANEL[1])
    for place, (title, curves) in enumerate(panels, 1):
        _draw_curves(figure.add_subplot(rows, 2, place), title, curves, names)
    if times:
        _draw_times(figure.add_subplot(rows, 2, count), times)
    return figure


def _page(figures: Sequence[tuple[str, Any]], summaries: dict[str, dict[str, Any]]) -> str:
    """The HTML file, without external references."""
    body = []
    for title, figure in figures:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        data = base64.b64encode(picture.getvalue()).decode()
        body.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    rows = []
    for key in SUMMARY:
        cells = [summary.get(key) for summary in summaries.values()]
        if any(cell is not None for cell in cells):
            texts = "".join(f"<td>{'' if cell is None else html.escape(str(cell))}</td>" for cell in cells)
            rows.append(f"<tr><th>{key}</th>{texts}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in summaries)
    table = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>" if rows else ""
    names = html.escape(", ".join(summaries))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>grpo_ext runs: {names}</title><style>"
        "body{font-family:sans-serif;margin:1.5em;max-width:1500px}"
        "img{width:48%;min-width:420px;margin:0.4%}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:left}"
        f"</style></head><body><h1>{names}</h1>{table}{''.join(body)}</body></html>\n"
    )
