"""Records of a run: metrics.jsonl, completion files, the table of sample completions, the progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from grpo_ext.rollouts.rollout import Sample
from grpo_ext.update.metrics import MetricBuffer

METRICS_FILE = "metrics.jsonl"


class MetricsFileCallback(TrainerCallback):
    """Append every log to ``output_dir/metrics.jsonl``, one JSON object per line with its ``step``.

    When training starts, lines beyond the starting step are dropped: they come from a run that stopped after its last
    checkpoint, or from an older run in the same folder. NaN is written as null.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines that this run will write again."""
        path = Path(str(args.output_dir)) / METRICS_FILE
        if not state.is_world_process_zero or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, **{name: _plain(value) for name, value in logs.items()}}
        path = Path(str(args.output_dir)) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class RewardProgressCallback(ProgressCallback):
    """Progress bar of transformers that also shows the latest reward and completion length."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show reward, completion length and KL; metrics.jsonl has all metrics."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {
            "reward": "reward",
            "completions/mean_length": "length",
            "kl": "kl",
            "eval_reward": "eval_reward",
        }
        postfix = {label: f"{logs[name]:.3f}" for name, label in shown.items() if name in logs}
        if postfix:
            self.training_bar.set_postfix(postfix)


class StepTimer(TrainerCallback):
    """Add the seconds of each optimizer step, generation included, to the metrics as ``step_time``."""

    def __init__(self, metrics: MetricBuffer) -> None:
        self.metrics = metrics
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.metrics.add("step_time", time.perf_counter() - self._start)


def completion_records(
    sample: Sample, names: Sequence[str], rewards: Tensor, advantages: Tensor
) -> list[dict[str, Any]]:
    """Return one dict of plain values per completion, for files and tables.

    Args:
        sample: n completions.
        names: names of the reward functions.
        rewards: ``(n, functions)``, NaN where a function does not apply.
        advantages: ``(n,)``.
    """
    return [
        {
            "prompt": prompt_text(sample.prompts[i]),
            "completion": sample.texts[i],
            "rewards": {n: _plain(value) for n, value in zip(names, rewards[i].tolist(), strict=True)},
            "advantage": float(advantages[i]),
            "tokens": len(sample.completions.ids[i]),
            "finished": sample.completions.finished[i],
        }
        for i in range(len(sample.prompts))
    ]


def write_completions(
    folder: Path, step: int, generation: int, records: Sequence[dict[str, Any]], several_generations: bool = False
) -> Path:
    """Write one generation batch, one JSON object per line with its ``step`` and ``generation``.

    A resumed run that generates a batch again overwrites the batch's file.

    Args:
        folder: created if missing.
        step: first optimizer step that trains on the batch, from 1.
        generation: number of the batch in the run, from 1.
        records: result of `completion_records`.
        several_generations: a step may span several batches; the file's name then also has the number of the batch.

    Returns:
        The file's path: ``step-<step>.jsonl``, or ``step-<step>-generation-<generation>.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (
        f"step-{step:06d}-generation-{generation:06d}.jsonl" if several_generations else f"step-{step:06d}.jsonl"
    )
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"step": step, "generation": generation, **record}, default=str) + "\n")
    return path


def print_completions(
    records: Sequence[dict[str, Any]], step: int, limit: int | None = None, console: Console | None = None
) -> None:
    """Print completion records as a table: prompt, completion, one column per reward, advantage.

    Args:
        records: dicts with ``prompt``, ``completion``, ``rewards`` (by name) and ``advantage``.
        step: shown in the title.
        limit: rows to show; None = all.
        console: destination; None = standard output.
    """
    table = Table(title=f"completions at step {step}", show_lines=True)
    table.add_column("prompt", overflow="fold")
    table.add_column("completion", overflow="fold")
    names = list(records[0]["rewards"]) if records else []
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("advantage", justify="right")
    for record in list(records)[:limit]:
        rewards = ["-" if record["rewards"][n] is None else f"{record['rewards'][n]:.2f}" for n in names]
        table.add_row(Text(record["prompt"]), Text(record["completion"]), *rewards, f"{record['advantage']:+.2f}")
    (console or Console()).print(table)


def prompt_text(prompt: Any) -> str:
    """Return a prompt as one string: text unchanged, chat messages as ``role: content`` lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
