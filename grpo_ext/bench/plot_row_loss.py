"""Plot bandwidth over vocabulary: bench/results/row_loss_cuda.csv to bench/plots/row_loss_cuda.png.

    python -m grpo_ext.bench.plot_row_loss

Bandwidth is the bytes that must move, divided by the time. The dashed line is the rate of a plain copy in the same run:
the ceiling of a kernel limited by memory bandwidth.
"""

from __future__ import annotations

import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from grpo_ext.bench import common

FOLDER = common.SOURCE_TREE
SHOWN = {
    "op_inplace": ("grpo_ext, loss + gradient", "o-"),
    "sequence": ("grpo_ext, sequence level off-policy, forward + backward", "s-"),
    "op_stats": ("grpo_ext, log probabilities + entropy", "^-"),
    "liger": ("Liger 0.8.5 Triton, token level", "o:"),
    "liger_sequence": ("Liger 0.8.5 Triton, sequence level", "s:"),
    "eager": ("plain torch", "x:"),
}


def main() -> None:
    with (FOLDER / "results" / "row_loss_cuda.csv").open() as file:
        lines = [
            row for row in csv.DictReader(file) if row["rows"] == row["valid"] == "8192" and row["dtype"] == "bf16"
        ]
    vocabularies = sorted({int(row["vocab"]) for row in lines})
    place = {str(vocab): i for i, vocab in enumerate(vocabularies)}
    figure, axes = plt.subplots(figsize=(8, 5))
    for mode, (label, style) in SHOWN.items():
        points = sorted((place[row["vocab"]], float(row["gbps"]) / 1e3) for row in lines if row["mode"] == mode)
        axes.plot(*zip(*points, strict=True), style, label=label)
    roof = sorted({(place[row["vocab"]], float(row["copy_gbps"]) / 1e3) for row in lines})
    axes.plot(*zip(*roof, strict=True), "k--", label="plain copy")
    axes.set_xticks(range(len(vocabularies)), [f"{v:,}" for v in vocabularies])
    axes.set_ylim(0, 3.4)
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("TB/s of the bytes that must move")
    axes.set_title(f"8,192 rows, bf16, {lines[0]['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center", bbox_to_anchor=(0.5, 0.3))
    figure.tight_layout()
    (FOLDER / "plots").mkdir(exist_ok=True)
    figure.savefig(FOLDER / "plots" / "row_loss_cuda.png", dpi=150)


if __name__ == "__main__":
    main()
