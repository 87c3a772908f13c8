"""docs/metrics.md explains every name that a run logs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toys import FixedEngine

from grpo_ext.output import METRIC_NAMES
from grpo_ext.trainer import GRPOTrainer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")


def explained(name: str) -> bool:
    return f"`{re.sub('rewards/reward_number/', 'rewards/NAME/', name)}`" in PAGE


class ReportingEngine(FixedEngine):
    """Reports a log probability for each token, and metrics as vLLM's engine does."""

    def generate(self, *arguments: Any) -> Any:
        completions = super().generate(*arguments)
        return dataclasses.replace(completions, sampling_logps=[[-1.0] * len(ids) for ids in completions.ids])

    def pop_metrics(self) -> dict[str, float]:
        return {"vllm/weight_check": 0.0, "time/vllm_weights": 0.0, "time/vllm_check": 0.0}


def test_names_of_a_run(make_trainer: Callable[..., GRPOTrainer], dataset: list[dict[str, Any]]) -> None:
    trainer = make_trainer(
        engine=ReportingEngine(),
        eval_dataset=dataset[:2],
        beta=0.1,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    lines = (Path(str(trainer.args.output_dir)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = {name for line in lines for name in json.loads(line)}
    assert {"kl", "eval_reward", "train_loss", "sampling/importance_sampling_ratio/min", "vllm/weight_check"} <= names
    assert sorted(name for name in names if not explained(name)) == []


def test_names_in_the_code() -> None:
    """Those of branches that a short run does not take, too."""
    call = re.compile(r'(?:\badd|_record|\btimed)\(\s*(?:self\.metrics, |metrics, )?"([\w/]+)"')
    names = {name for file in (ROOT / "grpo_ext").rglob("*.py") for name in call.findall(file.read_text("utf-8"))}
    assert {"time/rewards_hidden", "time/vllm_check", "nonfinite_steps", "tokens/padded"} <= names
    assert sorted(name for name in names if not explained(name)) == []


def test_names_of_a_loss() -> None:
    assert [name for name in METRIC_NAMES if not explained(name)] == []
