"""Helpers of all benchmarks: machine description, timing, peak memory, copy rate, CSV files and tables."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import grpo_ext

#: Folder for results: bench/results in the source tree; the working directory for an installed package.
SOURCE_TREE = Path(grpo_ext.__file__).parents[1] / "bench"
RESULTS = SOURCE_TREE / "results" if (SOURCE_TREE / "results").is_dir() else Path()
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_model() -> str:
    """Name of the processor, from /proc/cpuinfo if there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def driver_version() -> str:
    """Version of the GPU driver; empty without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def machine(device: torch.device) -> dict[str, Any]:
    """Columns with the machine and the versions of a measurement."""
    info = grpo_ext.build_info()
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": cpu_model(),
        "isa": info.get("cpu_isa", ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "grpo_ext": grpo_ext.__version__,
    }


@dataclasses.dataclass
class Timing:
    """Milliseconds of the measured part of each run."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(measured: Callable[[], Any], device: torch.device) -> float:
    """Time one call: wall clock on the CPU, device events on the GPU."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(8_000_000)  # 4 ms: queues the work before the clock starts, so host time is not measured
        start.record()
        measured()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    measured()
    return (time.perf_counter() - begin) * 1e3


def interleaved(
    prepared: Mapping[str, Callable[[], Callable[[], Any]]], device: torch.device, *, warmup: int, runs: int
) -> dict[str, Timing]:
    """Time several candidates in rounds of one run each, so that background load affects all of them.

    Each round has a different order: a GPU at its power limit is slower right after a long product.

    Args:
        prepared: maps a name to a function that does the unmeasured preparation and returns the call to measure.
        warmup: discarded rounds. runs: measured rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    for round_number in range(warmup + runs):
        order = list(prepared)
        random.Random(round_number).shuffle(order)
        for name in order:
            elapsed = milliseconds(prepared[name](), device)
            if round_number >= warmup:
                samples[name].append(elapsed)
    return {name: Timing(values) for name, values in samples.items()}


def peak_extra_bytes(prepare: Callable[[], Callable[[], Any]], device: torch.device) -> float:
    """Peak memory during one call, in bytes above the memory in use before it.

    GPU: torch's allocator. CPU: the kernel's high-water mark of resident memory (VmHWM of /proc/self/status, reset
    through /proc/self/clear_refs). The mark counts all pages touched by the process; NaN if the system has no mark.
    """
    measured = prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        measured()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    resident = _status_bytes("VmRSS")
    measured()
    return max(0.0, _status_bytes("VmHWM") - resident)


def _status_bytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    return math.nan


def copy_rate(nbytes: int, device: torch.device, *, runs: int = 11) -> float:
    """GB/s (bytes read plus bytes written) of copying `nbytes` between two touched buffers: the bandwidth ceiling."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    timing = interleaved({"copy": lambda: lambda: target.copy_(source)}, device, warmup=2, runs=runs)
    return 2 * nbytes / timing["copy"].median / 1e6


def read_rate(nbytes: int, device: torch.device, *, runs: int = 11) -> float:
    """GB/s of torch's sum over `nbytes`: the ceiling of a read-only kernel."""
    source = torch.ones(nbytes // 4, device=device)
    timing = interleaved({"sum": lambda: lambda: source.sum()}, device, warmup=2, runs=runs)
    return nbytes / timing["sum"].median / 1e6


def write_csv(path: Path, rows: Sequence[dict[str, Any]], *, append: bool = False) -> None:
    """Write one line per row; the header is the keys of the first row. ``append`` keeps existing lines.

    Raises:
        ValueError: if ``append`` meets a file with other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not (append and path.exists())
    if not fresh:
        header = path.read_text(encoding="utf-8").partition("\n")[0].strip().split(",")
        if header != list(rows[0]):
            raise ValueError(f"{path} has other columns than these lines: {header}, {list(rows[0])}; name another file")
    with path.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)


def print_table(rows: Sequence[dict[str, Any]], columns: Iterable[str]) -> None:
    """Print the given columns, aligned."""
    columns = list(columns)
    cells = [columns, *([str(_short(row[c])) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
