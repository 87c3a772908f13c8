"""Load the datasets and reward functions named in a run file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from grpo_ext.cli.convert import SettingsError, suggest
from grpo_ext.cli.settings import DatasetSettings
from grpo_ext.tasks.arithmetic import TASKS, arithmetic_datasets, number_reward

REWARDS: dict[str, Callable[..., Any]] = {"number": number_reward}


def load_datasets(settings: DatasetSettings, seed: int) -> tuple[Dataset, Dataset | None]:
    """Load train and held-out datasets that share no prompt.

    Args:
        settings: the dataset's section of the run file.
        seed: default seed of the split.

    Returns:
        (train, heldout); heldout is None if ``settings.heldout`` is 0.

    Raises:
        SettingsError: a file is missing, empty or not JSON, or the rows have no prompt.
    """
    seed = seed if settings.seed is None else settings.seed
    if settings.task is not None:
        try:
            return arithmetic_datasets(
                settings.task,
                digits=settings.digits,
                terms=settings.terms,
                draws=settings.draws,
                heldout=settings.heldout,
                seed=seed,
            )
        except ValueError as error:
            raise SettingsError(f"dataset: {error}") from error
    path = settings.path or ""
    if path.endswith((".json", ".jsonl")):
        dataset = _read_json(path)
    else:
        from datasets import load_dataset

        try:
            dataset = load_dataset(path, split=settings.split)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{path!r} is no task{suggest(path, TASKS)}, no .json or .jsonl file, and as a hub dataset it "
                f"cannot be loaded: {error}"
            ) from error
    if len(dataset) == 0:
        raise SettingsError(f"{path} has no rows")
    if "prompt" not in dataset.column_names:
        raise SettingsError(f"{path} has no 'prompt' column, only: {', '.join(dataset.column_names)}")
    return _split_by_prompt(dataset, settings.heldout, seed)


def load_reward(name: str) -> Callable[..., Any]:
    """Load a reward function by its short name, ``package.module:function`` or ``file.py:function``.

    Raises:
        SettingsError: the function does not exist or cannot be loaded.
    """
    if name in REWARDS:
        return REWARDS[name]
    source, colon, attribute = name.rpartition(":")
    if not colon:
        raise SettingsError(
            f"unknown reward {name!r}{suggest(name, REWARDS)} (known: {', '.join(REWARDS)}; "
            "your own is named package.module:function or file.py:function)"
        )
    try:
        module = _module_of_file(source) if source.endswith(".py") else _module_here(source)
        reward = getattr(module, attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise SettingsError(f"cannot load the reward {name!r}: {error}") from error
    if not callable(reward):
        raise SettingsError(f"the reward {name!r} is not a function")
    return reward


def _module_here(name: str) -> Any:
    """Import a module, also from the current folder, which console scripts do not search."""
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())


def _module_of_file(path: str) -> Any:
    name = f"grpo_ext_reward_file_{os.path.splitext(os.path.basename(path))[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module in sys.modules
    spec.loader.exec_module(module)
    return module


def _read_json(path: str) -> Dataset:
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()] if path.endswith("l") else json.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SettingsError(f"{path} must contain one JSON object per row")
    return Dataset.from_list(rows)


def _split_by_prompt(dataset: Dataset, heldout: int, seed: int) -> tuple[Dataset, Dataset | None]:
    if heldout == 0:
        return dataset, None
    keys = [json.dumps(prompt, sort_keys=True) for prompt in dataset["prompt"]]
    distinct = list(dict.fromkeys(keys))
    if not 0 < heldout < len(distinct):
        raise SettingsError(
            f"dataset.heldout must be between 0 and {len(distinct) - 1} "
            f"(there are {len(distinct)} distinct prompts), got {heldout}"
        )
    random.Random(seed).shuffle(distinct)
    held = set(distinct[:heldout])
    return (
        dataset.select([index for index, key in enumerate(keys) if key not in held]),
        dataset.select([index for index, key in enumerate(keys) if key in held]),
    )
