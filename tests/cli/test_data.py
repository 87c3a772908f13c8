"""Datasets from files, the split by prompt, and reward functions by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.data import load_datasets, load_reward
from grpo_ext.cli.settings import DatasetSettings
from grpo_ext.tasks import number_reward


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {index % (count // 2)}", "answer": str(index)} for index in range(count)]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_files_are_split_by_prompt(tmp_path: Path, suffix: str) -> None:
    rows = _rows(20)
    text = "\n".join(json.dumps(row) for row in rows) if suffix == "jsonl" else json.dumps(rows)
    path = tmp_path / f"rows.{suffix}"
    path.write_text(text + "\n", encoding="utf-8")
    settings = DatasetSettings(path=str(path), heldout=3)
    train, heldout = load_datasets(settings, seed=0)
    assert heldout is not None
    assert (len(train), len(heldout)) == (14, 6)
    assert not set(train["prompt"]) & set(heldout["prompt"])
    again = load_datasets(settings, seed=0)[1]
    assert again is not None
    assert again.to_list() == heldout.to_list()
    everything, none = load_datasets(DatasetSettings(path=str(path), heldout=0), seed=0)
    assert (len(everything), none) == (20, None)


def test_the_split_seed_of_the_dataset_wins() -> None:
    by_run = load_datasets(DatasetSettings(task="products"), seed=1)[1]
    by_dataset = load_datasets(DatasetSettings(task="products", seed=1), seed=2)[1]
    assert by_run is not None
    assert by_dataset is not None
    assert by_run.to_list() == by_dataset.to_list()


@pytest.mark.parametrize(
    ("text", "heldout", "message"),
    [
        ("", 0, "has no rows"),
        ("{", 0, "is not valid JSON"),
        ("[1, 2]\n", 0, "must contain one JSON object per row"),
        ('{"question": "a"}\n', 0, "has no 'prompt' column, only: question"),
        ('{"prompt": "a"}\n', 1, "dataset.heldout must be between 0 and 0"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, heldout: int, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        load_datasets(DatasetSettings(path=str(path), heldout=heldout), seed=0)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        load_datasets(DatasetSettings(path=str(tmp_path / "absent.json")), seed=0)
    with pytest.raises(SettingsError, match="dataset: heldout must be between 1 and 96"):
        load_datasets(DatasetSettings(task="products", heldout=97), seed=0)


def test_a_name_that_is_nothing_else_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(path: str, split: str) -> Dataset:
        asked.append((path, split))
        if path == "prodcts":
            raise FileNotFoundError("no such dataset")
        return Dataset.from_list(_rows(8))

    monkeypatch.setattr("datasets.load_dataset", load)
    train, heldout = load_datasets(DatasetSettings(path="someone/some-questions", split="test", heldout=1), seed=0)
    assert heldout is not None
    assert (len(train), len(heldout)) == (6, 2)
    with pytest.raises(SettingsError, match=r"'prodcts' is no task: did you mean 'products'\?, no \.json"):
        load_datasets(DatasetSettings(path="prodcts"), seed=0)
    assert asked == [("someone/some-questions", "test"), ("prodcts", "train")]


def test_rewards_by_name_module_and_file(tmp_path: Path) -> None:
    assert load_reward("number") is number_reward
    assert load_reward("grpo_ext.tasks.arithmetic:number_reward") is number_reward
    path = tmp_path / "mine.py"
    lines = (
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "@dataclass",
        "class Weights:",
        "    zero: float = 0.0",
        "def zero(completions, **columns):",
        "    return [Weights().zero] * len(completions)",
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_reward(f"{path}:zero")(["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numbr", "unknown reward 'numbr': did you mean 'number'?"),
        ("no_such_module:f", "cannot load the reward"),
        ("grpo_ext.tasks.arithmetic:nothing", "cannot load the reward"),
        ("grpo_ext.tasks.arithmetic:TASKS", "is not a function"),
        ("absent.py:f", "cannot load the reward"),
    ],
)
def test_bad_rewards(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_reward(name)
