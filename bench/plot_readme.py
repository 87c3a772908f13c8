"""Draw the README's chart: tokens per second of the training phase of grpo_ext, TRL and Unsloth.

    python bench/plot_readme.py        # results/training_phase_h200.csv -> plots/training_phase_h200.svg

Transparent background and grey text are readable on light and dark pages.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
GREY = "#7d8590"
#: From the bottom of a group to its top.
SHOWN = {
    "trl": ("TRL 1.16", "#9aa4b0"),
    "trl_patch": ("TRL 1.16 with patch()", "#b08ad6"),
    "unsloth": ("Unsloth 2026.10", "#d9a441"),
    "ours": ("grpo_ext", "#2f81f7"),
}
TRAINED = {"lora": "LoRA", "full": "all weights"}


def main() -> None:
    with (FOLDER / "results" / "training_phase_h200.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["candidate"] in SHOWN and row["completions"] == "64"]
    cases = list(dict.fromkeys((row["model"], row["trained"], row["lengths"]) for row in rows))
    plt.rcParams.update({"svg.hashsalt": "grpo_ext", "text.color": GREY, "font.size": 9})
    figure, axes = plt.subplots(figsize=(8.4, 6.2))
    place, ticks, seen = 0.0, [], set()
    for case in cases:
        found = {row["candidate"]: row for row in rows if (row["model"], row["trained"], row["lengths"]) == case}
        start = place
        for name in (name for name in reversed(SHOWN) if name in found):
            low, high = (float(found[name][f"tokens_per_s_{end}"]) for end in ("min", "max"))
            label, colour = SHOWN[name]
            axes.barh(place, low, 0.86, color=colour, label=None if name in seen else label)
            axes.barh(place, high - low, 0.86, left=low, color=colour, alpha=0.45)
            figures = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
            axes.text(high + 400, place, figures, va="center", fontsize=8)
            seen.add(name)
            place += 1
        ticks.append(((start + place - 1) / 2, f"{case[0].upper()}, {TRAINED[case[1]]}\n{case[2]}"))
        place += 0.7
    axes.set_yticks([tick for tick, _ in ticks], [text for _, text in ticks])
    axes.invert_yaxis()
    axes.set_xlim(0, 56000)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(
        "tokens per second of the training phase, one H200; a pale end is the range of two machines", color=GREY
    )
    axes.tick_params(colors=GREY, length=0)
    axes.grid(axis="x", color=GREY, alpha=0.25)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    path = FOLDER / "plots" / "training_phase_h200.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", "utf-8")


if __name__ == "__main__":
    main()
