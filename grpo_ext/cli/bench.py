"""`grpo-ext bench`: run the modules of `grpo_ext.bench`, and write tables, CSV and plots.

Each measurement runs in a fresh process, unaffected by the memory and threads of the others.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_ext.cli.convert import SettingsError

#: Subjects of a measurement, in the order of ``all``.
SUBJECTS = ("row", "linear", "training")

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a module of `grpo_ext.bench`.

    Attributes:
        module: name of the module.
        arguments: its command-line arguments.
        csv: name of the CSV file that it writes.
        title: text of the progress line.
        into_folder: whether the module takes ``--output FOLDER`` and names the CSV itself, instead of ``--csv FILE``.
    """

    module: str
    arguments: tuple[str, ...]
    csv: str
    title: str
    into_folder: bool = False

    def command(self, output: Path) -> list[str]:
        place = ("--output", str(output)) if self.into_folder else ("--csv", str(output / self.csv))
        return [sys.executable, "-m", f"grpo_ext.bench.{self.module}", *self.arguments, *place]


def jobs_of(subject: str, device: str, threads: int, quick: bool, extra: Sequence[str]) -> list[Job]:
    """The jobs of a subject.

    Args:
        subject: one of `SUBJECTS`.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads.
        quick: use small shapes and few runs: a trial of the command, without meaningful timings.
        extra: further arguments of the module, which override the defaults. For ``training`` they go to the
            measurement of memory against tokens.
    """
    common = ("--device", device, "--threads", str(threads))
    if subject == "row":
        return [_row_job(common, device, quick, extra)]
    if subject == "linear":
        size = ("--shapes", "64x2048", "--rows", "64", "--runs", "2", "--warmup", "1") if quick else ()
        return [Job("linear", (*common, *size, *extra), f"linear_{device}.csv", "hidden states to loss")]
    return _training_jobs(common, device, threads, quick, extra)


def _row_job(common: tuple[str, ...], device: str, quick: bool, extra: Sequence[str]) -> Job:
    names = "inplace,fresh,op_inplace,op_stats,eager,compile"
    shape: tuple[str, ...]
    if device == "cuda":
        shape = ("--rows", "8192", "--vocab", "32000,49152,128256,151936,262144", "--dtypes", "bf16", "--masked", "0")
        names = "inplace,fresh,op_inplace,op_stats,sequence,eager,liger,liger_sequence"
    else:
        shape = ("--vocab", "32000,49152,151936", "--dtypes", "fp32,bf16", "--masked", "0")
    if quick:
        shape = ("--rows", "64", "--vocab", "1000,4000", "--dtypes", "fp32", "--runs", "2", "--warmup", "1")
        names = names.replace(",compile", "")
    arguments = (*common, *shape, "--candidates", names, *extra)
    return Job("row_loss", arguments, f"row_loss_{device}.csv", "logits to loss")


def _training_jobs(common: tuple[str, ...], device: str, threads: int, quick: bool, extra: Sequence[str]) -> list[Job]:
    jobs = [_phase_job(common, device, quick)]
    size = ("--layers", "1", "--rows", "4", "--steps", "1") if quick else ("--layers", "4", "--steps", "1")
    for tokens in (16, 32) if quick else (64, 128, 256):
        arguments = (*common, *size, *extra, "--tokens", str(tokens))
        title = f"training step, {tokens} tokens, both paths"
        jobs.append(Job("trainer_memory", arguments, f"trainer_memory_{device}_{tokens}.csv", title))
    if device != "cpu" or quick:  # whole steps use the full model, which is never quick
        return jobs
    for trainer in ("ours", "trl") if _has_trl() else ("ours",):
        arguments = ("--trainer", trainer, "--steps", "10", "--threads", str(threads))
        jobs.append(Job("trainer_step", arguments, f"trainer_step_{trainer}.csv", f"training step, {trainer}"))
    return jobs


def _phase_job(common: tuple[str, ...], device: str, quick: bool) -> Job:
    """Training steps of both trainers on the same completions; the module fails if their losses differ."""
    names = ["ours", "trl", "trl_patch", "trl_fused"] if _has_trl() else ["ours"]
    if quick:
        size = "--cases tiny:lora:4:spread --prompts 2 --group 4 --tokens 16 --dtype fp32 --steps 1"
        names = names[:2]
    elif device == "cpu":
        size = "--cases 0.6b:lora:4:spread --layers 2 --prompts 2 --group 8 --tokens 64 --dtype fp32 --steps 2"
    else:
        size = "--cases 0.6b:lora:8,1.7b:lora:8"
    arguments = ("phase", *common, *size.split(), "--candidates", ",".join(names))
    title = "training phase of a step: " + ", ".join(names)
    return Job("training", arguments, f"training_phase_{device}.csv", title, into_folder=True)


def _has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def run_job(job: Job, output: Path) -> list[Row]:
    """Run a module and return the rows of its CSV. ``<csv>.log`` keeps its output.

    Raises:
        SettingsError: the module failed; the message ends with its last 8 lines of output.
    """
    path, log = output / job.csv, output / f"{job.csv}.log"
    path.unlink(missing_ok=True)
    command = job.command(output)
    with log.open("w", encoding="utf-8") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0 or not path.is_file():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-8:])
        raise SettingsError(f"{job.module} ended with status {status}; its output is in {log}, and ends with:\n{tail}")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bench_command(
    subject: str,
    *,
    device: str | None = None,
    threads: int | None = None,
    output: str = "bench-results",
    quick: bool = False,
    extra: Sequence[str] = (),
) -> dict[str, list[Row]]:
    """Measure, print tables, and write CSV and PNG files.

    Args:
        subject: ``row``, ``linear``, ``training`` or ``all``.
        device: ``cpu`` or ``cuda``; None = the GPU if torch sees one.
        threads: CPU threads; None = torch's default.
        output: folder for the CSV, PNG and log files.
        quick: use small shapes, to try the command.
        extra: further arguments of the module; only with a single subject.

    Returns:
        The rows of each subject's CSV.

    Raises:
        SettingsError: the device is missing, ``extra`` is given with ``all``, or a module failed.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from grpo_ext.cli.bench_report import draw, show

    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("torch sees no CUDA device; measure with --device cpu")
    if extra and subject == "all":
        raise SettingsError(f"{' '.join(extra)}: give arguments of a module with one subject, not with all")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = threads or torch.get_num_threads()
    folder = Path(output)
    os.makedirs(folder, exist_ok=True)
    plans = {
        name: jobs_of(name, device, threads, quick, extra) for name in (SUBJECTS if subject == "all" else (subject,))
    }
    console = Console()
    if not console.is_terminal:  # for a file or a pipe rich would use 80 columns and truncate names
        console = Console(width=160)
    columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn())
    results: dict[str, list[Row]] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(jobs) for jobs in plans.values()))
        for name, jobs in plans.items():
            results[name] = []
            for job in jobs:
                progress.update(task, description=job.title)
                results[name] += run_job(job, folder)
                progress.advance(task)
            show(name, results[name], console)
            for path in (_write(folder / f"{name}_{device}.csv", results[name]), *draw(name, results[name], folder)):
                console.print(f"written to {path}")
    return results


def _write(path: Path, rows: list[Row]) -> Path:
    """Write all rows of a subject to one CSV; its modules may have different columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
