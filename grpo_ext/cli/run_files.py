"""Names, readers and writers of the files in a run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from grpo_ext.cli.convert import SettingsError

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "reward.png"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Read the records of a run's metrics file.

    Raises:
        SettingsError: the folder has no metrics file.
    """
    path = os.path.join(folder, METRICS_FILE)
    if not os.path.isfile(path):
        raise SettingsError(f"{folder} is not a run folder: it has no {METRICS_FILE}")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def read_summary(folder: str) -> dict[str, Any]:
    """Read the run's summary; empty if it does not exist yet."""
    path = os.path.join(folder, SUMMARY_FILE)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_samples(path: str, samples: Sequence[dict[str, Any]]) -> None:
    """Write one line of JSON per sampled answer."""
    with open(path, "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def write_json(path: str, value: dict[str, Any]) -> None:
    """Write JSON to a temporary file and rename it, so that an interrupted run leaves no partial file."""
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.replace(path + ".part", path)
