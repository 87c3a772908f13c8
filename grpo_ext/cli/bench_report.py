"""Tables and plots of `grpo-ext bench`, from the rows of its CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_ext.cli.figures import new_figure

#: Table columns of each subject: the CSV column, the heading, digits after the decimal point (None = text).
COLUMNS: dict[str, tuple[tuple[str, str, int | None], ...]] = {
    "row": (
        ("rows", "rows", None), ("vocab", "vocabulary", None), ("dtype", "dtype", None), ("mode", "way", None),
        ("ms", "ms", 2), ("x_eager", "× eager", 2), ("x_compile", "× compile", 2), ("x_liger", "× Liger", 2),
        ("gbps", "GB/s", 1), ("of_copy", "of copy rate", 2), ("extra_mb", "extra MB", 1),
    ),
    "linear": (
        ("rows", "rows", None), ("hidden", "hidden", None), ("vocab", "vocabulary", None), ("dtype", "dtype", None),
        ("head", "head", None), ("candidate", "way", None), ("ms", "ms", 2), ("ratio", "of bare products", 2),
        ("extra_mb", "extra MiB", 1), ("logp_error", "error of logp", 7),
    ),
    "training": (
        ("candidate", "prepared batch", None), ("model", "model", None), ("trained", "trained", None),
        ("training_s", "s of training", 3), ("tokens_per_s", "tokens / s", 0), ("peak_gib", "peak GiB", 2),
        ("path", "path", None), ("rows", "rows", None), ("tokens", "tokens", None), ("peak_mib", "peak MiB", 0),
        ("seconds_per_step", "s / step", 2), ("trainer", "whole steps", None), ("seconds_median", "s / step (run)", 2),
    ),
}  # fmt: skip


def show(subject: str, rows: list[dict[str, str]], console: Any) -> None:
    """Print a table of the rows, without empty columns."""
    from rich.table import Table

    table = Table(title=f"{subject}: {rows[0].get('device') or 'cpu'}, {rows[0].get('threads', '?')} threads")
    shown = [column for column in COLUMNS[subject] if any(_text(row, *column) for row in rows)]
    for _, heading, digits in shown:
        table.add_column(heading, justify="left" if digits is None else "right")
    for row in rows:
        table.add_row(*(_text(row, *column) for column in shown))
    console.print(table)


def _text(row: dict[str, str], name: str, _: str, digits: int | None) -> str:
    value = row.get(name, "")
    if value in ("", "nan"):
        return ""
    return value if digits is None else f"{float(value):.{digits}f}"


def _figure(width: float = 8) -> tuple[Any, Any]:
    figure = new_figure(width, 4.8)
    return figure, figure.add_subplot()


def draw(subject: str, rows: list[dict[str, str]], folder: Path) -> list[Path]:
    """Draw the plots of a subject, and return the PNG files."""
    if subject == "row":
        return [_roofline(rows, dtype, folder) for dtype in dict.fromkeys(row["dtype"] for row in rows)]
    if subject == "linear":
        return [_ratios(rows, folder)]
    phases, memory = ([row for row in rows if row.get(name)] for name in ("training_s", "peak_mib"))
    return [*([_phases(phases, folder)] if phases else []), *([_memory(memory, folder)] if memory else [])]


def _roofline(rows: list[dict[str, str]], dtype: str, folder: Path) -> Path:
    """Rate of the bytes that must move, compared with a plain copy in the same process."""
    figure, axes = _figure()
    rows = [row for row in rows if row["dtype"] == dtype]
    places = {vocab: place for place, vocab in enumerate(sorted({int(row["vocab"]) for row in rows}))}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = sorted((places[int(row["vocab"])], float(row["gbps"])) for row in rows if row["mode"] == mode)
        axes.plot(*zip(*points, strict=True), "o-", label=mode)
    roof = sorted({(places[int(row["vocab"])], float(row["copy_gbps"])) for row in rows})
    axes.plot(*zip(*roof, strict=True), "k_--", label="plain copy")
    axes.set_xticks(range(len(places)), [f"{vocab:,}" for vocab in places])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("bytes that must move, GB/s")
    axes.set_title(f"{rows[0]['rows']} rows, {dtype}, {rows[0]['device']}", fontsize=10)
    return _saved(figure, axes, folder / f"row_roofline_{dtype}.png")


def _ratios(rows: list[dict[str, str]], folder: Path) -> Path:
    """Time relative to the bare matrix products, one bar per candidate and head."""
    shapes = list(dict.fromkeys((row["hidden"], row["vocab"], row["head"]) for row in rows))
    names = [name for name in dict.fromkeys(row["candidate"] for row in rows) if not name.startswith("bare")]
    figure, axes = _figure(max(8, 1.2 * len(shapes) * len(names) ** 0.5))
    width = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        found = {(r["hidden"], r["vocab"], r["head"]): float(r["ratio"]) for r in rows if r["candidate"] == name}
        bars = axes.bar(
            [place + number * width for place, shape in enumerate(shapes) if shape in found],
            [found[shape] for shape in shapes if shape in found], width, label=name,
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1, color="black", linestyle="--", label="bare products")
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(shapes))],
        [f"H {hidden}, V {int(vocab):,}\n{head} head" for hidden, vocab, head in shapes],
    )
    axes.set_ylabel("time / time of the bare matrix products")
    axes.set_title(f"{rows[0]['rows']} rows, {rows[0]['dtype']}, {rows[0]['device']}", fontsize=10)
    return _saved(figure, axes, folder / "linear_ratio.png")


def _phases(rows: list[dict[str, str]], folder: Path) -> Path:
    """Seconds of the training phase, one group of bars per case."""
    figure, axes = _figure()
    cases = list(dict.fromkeys((row["model"], row["trained"], row["lengths"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        points = [
            (cases.index((row["model"], row["trained"], row["lengths"])) + number * width, float(row["training_s"]))
            for row in rows
            if row["candidate"] == name
        ]
        axes.bar_label(axes.bar(*zip(*points, strict=True), width, label=name), fmt="%.3g", fontsize=7)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(cases))], [" ".join(case) for case in cases])
    axes.set_ylabel("seconds of a step's training phase")
    first = rows[0]
    axes.set_title(f"{first['completions']} completions of up to {first['max_tokens']} tokens, {first['device']}")
    return _saved(figure, axes, folder / "training_phase.png")


def _memory(rows: list[dict[str, str]], folder: Path) -> Path:
    """Peak memory of a training step beyond the model, by the length of the completions."""
    figure, axes = _figure()
    for path in dict.fromkeys(row["path"] for row in rows):
        points = sorted((int(row["tokens"]), float(row["peak_mib"])) for row in rows if row["path"] == path)
        axes.plot(*zip(*points, strict=True), "o-", label=path)
    axes.set_xlabel("tokens of each completion")
    axes.set_ylabel("MiB beyond the model")
    axes.set_ylim(bottom=0)
    first = rows[0]
    axes.set_title(f"{first['rows']} completions, {first['model']}, {first['layers']} layers, {first['device']}")
    return _saved(figure, axes, folder / "training_memory.png")


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return path
