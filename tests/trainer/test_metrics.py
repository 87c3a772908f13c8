"""The metrics collected between two logs, and what a run writes down."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

from grpo_ext.generation.engine import Completions
from grpo_ext.rollouts.data import check_dataset, columns_of
from grpo_ext.rollouts.evaluation import evaluate_rows, evaluation_metrics, evaluation_rows
from grpo_ext.trainer.records import MetricsFileCallback, print_completions, prompt_text, write_completions
from grpo_ext.update.metrics import MetricBuffer


def test_reductions() -> None:
    metrics = MetricBuffer()
    for value, weight in ((1.0, 1.0), (torch.tensor(4.0), torch.tensor(3.0)), (math.nan, 5.0)):
        metrics.add("mean", value, weight=weight)
        for reduce in ("sum", "min", "max", "last"):
            metrics.add(reduce, value, reduce=reduce)
    metrics.add("nothing", math.nan)
    metrics.add("weightless", 3.0, weight=0.0)
    result = metrics.flush()
    assert math.isnan(result.pop("nothing"))
    assert result == {"mean": 3.25, "sum": 5.0, "min": 1.0, "max": 4.0, "last": 4.0, "weightless": 0.0}
    assert metrics.flush() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
def test_values_of_two_devices() -> None:
    """A micro-batch that had nothing to compute leaves numbers on the CPU beside the others' on the GPU."""
    metrics = MetricBuffer()
    for value in (torch.tensor(1.0, device="cuda"), torch.tensor(4.0), 7.0):
        metrics.add("loss", value)
    assert metrics.flush() == {"loss": 4.0}


def test_ranks_are_joined() -> None:
    metrics = MetricBuffer()
    metrics.add("mean", 1.0, weight=2.0)
    metrics.add("min", 1.0, reduce="min")
    metrics.add("sum", 1.0, reduce="sum")
    other = torch.tensor([[8.0, 2.0, 1.0], [-1.0, 1.0, 1.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    result = metrics.flush(lambda mine: torch.cat([mine, other]))
    assert result == {"mean": 2.5, "min": -1.0, "sum": 3.0}


def test_lengths() -> None:
    metrics = MetricBuffer()
    metrics.add_lengths([1, 2, 6], [True, True, False])
    result = metrics.flush()
    assert result["completions/mean_length"] == 3
    assert result["completions/min_length"] == 1
    assert result["completions/max_length"] == 6
    assert result["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert result["completions/mean_terminated_length"] == 1.5


class Arguments:
    def __init__(self, output_dir: Path) -> None:
        self.output_dir = str(output_dir)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file_continues_after_a_resume(tmp_path: Path) -> None:
    args: Any = Arguments(tmp_path)
    callback, control = MetricsFileCallback(), TrainerControl()
    for step in (1, 2, 3):
        callback.on_log(args, TrainerState(global_step=step), control, {"reward": step / 2, "loss": math.nan})
    # the run ends after step 3, its last checkpoint is of step 2
    state = TrainerState(global_step=2)
    callback.on_train_begin(args, state, control)
    callback.on_log(args, TrainerState(global_step=3), control, {"reward": 9.0, "kl": torch.tensor(1.0)})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[0] == {"step": 1, "reward": 0.5, "loss": None}
    assert lines(tmp_path)[2] == {"step": 3, "reward": 9.0, "kl": 1.0}


def test_only_one_process_writes(tmp_path: Path) -> None:
    state = TrainerState(global_step=1, is_world_process_zero=False)
    args: Any = Arguments(tmp_path)
    MetricsFileCallback().on_log(args, state, TrainerControl(), {"reward": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


RECORD = {"prompt": "1 + [1]", "completion": "2", "rewards": {"right": 1.0, "style": None}, "advantage": 0.5}


def test_table() -> None:
    stream = io.StringIO()
    print_completions([RECORD] * 3, 7, 2, Console(file=stream, width=100))
    text = stream.getvalue()
    assert "completions at step 7" in text
    assert text.count("1 + [1]") == 2
    assert all(word in text for word in ("right", "style", "1.00", "-", "+0.50"))


def test_completion_file(tmp_path: Path) -> None:
    path = write_completions(tmp_path / "completions", 12, 6, [RECORD, RECORD])
    assert path.name == "step-000012.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 12, "generation": 6, **RECORD}] * 2
    path = write_completions(tmp_path / "completions", 12, 46, [RECORD], several_generations=True)
    assert path.name == "step-000012-generation-000046.jsonl"


def test_prompt_text() -> None:
    assert prompt_text("a") == "a"
    assert prompt_text([{"role": "user", "content": "a"}]) == "user: a"


def test_evaluation_rows_cover_each_prompt_once() -> None:
    parts = [evaluation_rows(5, 2, 3, rank) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_evaluation_calls_the_engine_equally_often_on_all_ranks() -> None:
    """5 rows on 2 ranks, 1 at a time: an engine that joins the ranks in every call would wait for a third one."""

    def generate(batch: list[int]) -> tuple[Completions, torch.Tensor]:
        calls.append(batch)
        return Completions([[7] * (row + 1) for row in batch], [True] * len(batch)), torch.ones(len(batch), 1)

    for world, batch_size in ((2, 1), (2, 2), (4, 1), (7, 3)):
        numbers, lengths = [], []
        for rank in range(world):
            calls: list[list[int]] = []
            result = evaluate_rows(evaluation_rows(5, 1, world, rank), batch_size, generate, -(-5 // world))
            numbers.append(len(calls))
            assert len(result["lengths"]) == len(result["rewards"]) == len(result["finished"])
            lengths += result["lengths"]
        assert len(set(numbers)) == 1
        assert sorted(lengths) == [1, 2, 3, 4, 5]


def test_evaluation_metrics() -> None:
    result = {"rewards": [[1.0, math.nan], [0.0, 1.0]], "lengths": [2, 4], "finished": [True, False]}
    metrics = evaluation_metrics(result, ["a", "b"], [1.0, 0.5], "eval")
    assert metrics["eval_reward"] == 0.75
    assert metrics["eval_rewards/a/mean"] == 0.5
    assert metrics["eval_rewards/b/mean"] == 1.0
    assert metrics["eval_completions/mean_length"] == 3
    assert metrics["eval_completions/clipped_ratio"] == 0.5


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "train_dataset is empty"),
        (None, ValueError, "train_dataset is missing"),
        ([{"question": "1", "answer": "2"}], ValueError, "no 'prompt' column, only: question, answer"),
        (["text"], TypeError, "train_dataset holds str rows"),
        (iter([{"prompt": "1"}]), TypeError, "which has no length"),
    ],
)
def test_dataset_that_cannot_be_used(dataset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_dataset(dataset, "train_dataset")


def test_columns_of_uneven_rows() -> None:
    assert columns_of([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}]) == {"x": [1, None], "y": [None, 2]}
