"""Plot the CSVs that `grpo_ext.bench.training` wrote to a folder: PNGs go to the same folder, or to ``--plots``.

Subfolders with a run's ``metrics_seed0.jsonl`` (or that of another seed) become one plot: one bar per run with the
parts of a step, generation included.

python -m grpo_ext.bench.plot_training bench/results --plots bench/plots
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "ours": "grpo_ext",
    "ours_sorted": "grpo_ext, only sorted by length",
    "ours_defaults": "grpo_ext, defaults",
    "ours_packed": "grpo_ext, packed",
    "trl": "TRL",
    "trl_patch": "TRL, patched",
    "trl_fused": "TRL, patched with the loss",
    "trl_reentrant": "TRL, use_reentrant",
}
Rows = list[dict[str, str]]


def label(name: str) -> str:
    return LABELS.get(name, name)


def phase(rows: Rows, path: Path) -> None:
    """Plot tokens per second of the training phase; the number over a bar is its ratio to TRL."""
    keys = ("model", "trained", "lengths", "micro_batch")
    cases = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    trl = {tuple(r[k] for k in keys): float(r["tokens_per_s"]) for r in rows if r["candidate"] == "trl"}
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(cases)), 4.5))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        for row in (row for row in rows if row["candidate"] == name):
            case = tuple(row[key] for key in keys)
            value = float(row["tokens_per_s"])
            place = cases.index(case) + number * width
            axes.bar(place, value, width, color=f"C{number}", label=label(name))
            if case in trl:
                axes.text(place, value, f"{value / trl[case]:.2f}", ha="center", va="bottom", fontsize=7)
    ticks = [f"{m} {t}\n{lengths}, {size} at a time" for m, t, lengths, size in cases]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(cases))], ticks, fontsize=8)
    axes.set_ylabel("tokens per second, training phase")
    first = rows[0]
    axes.set_title(
        f"{first['completions']} completions of up to {first['max_tokens']} tokens, {first['device']}", fontsize=10
    )
    finish(figure, axes, path)


def trace(rows: Rows, path: Path) -> None:
    """Plot the seconds of a step's parts as stacked bars."""
    parts = list(rows[0])[list(rows[0]).index("lengths") + 1 : list(rows[0]).index("sum")]
    figure, axes = plt.subplots(figsize=(9, 2 + 0.6 * len(rows)))
    names = [f"{label(row['candidate'])}\n{row['model']} {row['trained']}" for row in rows]
    left = [0.0] * len(rows)
    for number, part in enumerate(parts):
        values = [float(row[part]) for row in rows]
        axes.barh(range(len(rows)), values, left=left, label=part, color=plt.get_cmap("tab20")(number))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, synchronized at each boundary")
    axes.set_title(f"{rows[0]['completions']} completions, {rows[0]['device']}", fontsize=10)
    finish(figure, axes, path, below=True)


def comparable(rows: Rows) -> Rows:
    """Select runs with comparable times: seeds that all trainers ran with the same ``--together``, if any."""
    names = {row["candidate"] for row in rows}
    runs = [{(row["seed"], row["together"]) for row in rows if row["candidate"] == name} for name in names]
    shared = set.intersection(*runs)
    return [row for row in rows if (row["seed"], row["together"]) in shared] or rows


def is_of(row: dict[str, str], name: str, step: int) -> bool:
    return row["candidate"] == name and int(float(row["step"])) == step


def learn(rows: Rows, path: Path) -> None:
    """Plot mean and range over seeds of the held-out reward, against time and against samples."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    timed = comparable(rows)
    for number, name in enumerate(dict.fromkeys(row["candidate"] for row in rows)):
        order = sorted({int(float(row["step"])) for row in rows if row["candidate"] == name})
        steps = {s: [row for row in rows if is_of(row, name, s)] for s in order}
        means = [statistics.fmean(float(row["reward"]) for row in steps[s]) for s in order]
        low = [min(float(row["reward"]) for row in steps[s]) for s in order]
        high = [max(float(row["reward"]) for row in steps[s]) for s in order]
        for axes, column in zip(both, ("seconds", "samples"), strict=True):
            places = [statistics.fmean(float(row[column]) for row in timed if is_of(row, name, s)) for s in order]
            axes.plot(places, means, color=f"C{number}", label=label(name))
            axes.fill_between(places, low, high, color=f"C{number}", alpha=0.2)
    seeds = len({row["seed"] for row in rows})
    for axes, text in zip(both, ("seconds of training", "completions sampled"), strict=True):
        axes.set_xlabel(text)
        axes.grid(alpha=0.3)
    both[0].set_ylabel("held-out reward")
    both[0].set_title(f"mean and range of {seeds} seeds, {rows[0]['engine']} generates", fontsize=10)
    both[1].set_title(rows[0]["device"], fontsize=10)
    finish(figure, both[0], path)


def two(rows: Rows, path: Path) -> None:
    """Plot tokens per second by number of processes."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for number, row in enumerate(rows):
        axes.bar(number, float(row["tokens_per_s"]), color=f"C{int(row['processes']) - 1}")
    names = [f"{row['kind']}\n{row['processes']} GPU\n{row['lengths']}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("tokens per second, training phase")
    axes.set_title(f"{rows[0]['model']} {rows[0]['trained']}, {rows[0]['device']}", fontsize=10)
    axes.grid(alpha=0.3, axis="y")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


#: Parts of a step with generation, and their metrics in the trainer's log.
LOGGED_PARTS = {
    "generation": "time/generation",
    "weights to vLLM": "time/vllm_weights",
    "check of its weights": "time/vllm_check",
    "rewards": "time/rewards",
    "old and reference logps": "time/logps",
    "forward": "time/forward",
    "backward": "time/backward",
}


def engine_parts(log: Path) -> dict[str, float]:
    """Mean seconds of a step's parts from a run's metrics, without the first step."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step_time" in line][1:]
    parts = {name: statistics.fmean(step.get(key, 0.0) for step in steps) for name, key in LOGGED_PARTS.items()}
    parts["generation"] -= parts["weights to vLLM"] + parts["check of its weights"]  # time/generation includes both
    parts["optimizer and other"] = statistics.fmean(step["step_time"] for step in steps) - sum(parts.values())
    return parts


def engine(logs: Sequence[Path], path: Path) -> None:
    """Plot the seconds of a step's parts, generation included, with one bar per run."""
    figure, axes = plt.subplots(figsize=(9, 2 + 0.6 * len(logs)))
    left = [0.0] * len(logs)
    found = [engine_parts(log) for log in logs]
    for number, part in enumerate(found[0]):
        values = [parts[part] for parts in found]
        axes.barh(range(len(logs)), values, left=left, label=part, color=plt.get_cmap("tab10")(number))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(logs)), [log.parent.name for log in logs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step")
    finish(figure, axes, path, below=True)


def finish(figure: plt.Figure, axes: plt.Axes, path: Path, below: bool = False) -> None:
    handles, texts = axes.get_legend_handles_labels()
    once = dict(zip(texts, handles, strict=True))
    place = {"loc": "outside lower center", "ncols": 3} if below else {}
    (figure if below else axes).legend(once.values(), once.keys(), fontsize=7, **place)
    axes.grid(alpha=0.3)
    figure.set_layout_engine("constrained" if below else "tight")
    figure.savefig(path, dpi=150)
    plt.close(figure)


KINDS = {
    "training_phase": phase,
    "training_trace": trace,
    "training_engine": trace,
    "training_learn": learn,
    "training_two_steps": two,
}


def draw(folder: Path, plots: Path) -> list[Path]:
    """Draw one plot per CSV of a known kind, and one for all runs with generation; return their paths."""
    drawn = []
    plots.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("training_*.csv")):
        kind = path.stem.rpartition("_")[0]
        if kind in KINDS:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            if rows:
                drawn.append(plots / f"{path.stem}.png")
                KINDS[kind](rows, drawn[-1])
    logs = [min(run.glob("metrics_seed*.jsonl"), default=None) for run in sorted(folder.iterdir()) if run.is_dir()]
    if logs := [log for log in logs if log is not None]:
        drawn.append(plots / "training_runs.png")
        engine(logs, drawn[-1])
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plots", type=Path)
    arguments = parser.parse_args()
    for path in draw(arguments.folder, arguments.plots or arguments.folder):
        print(path)


if __name__ == "__main__":
    main()
