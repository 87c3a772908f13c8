"""Datasets as the trainer sees them: a length, and rows that are dicts with a ``prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


def check_dataset(dataset: Any, name: str) -> None:
    """Raise a readable error for a dataset that cannot be trained or evaluated on.

    Raises:
        TypeError: without a length or without dict rows.
        ValueError: when it is empty or has no ``prompt`` column.
    """
    if dataset is None:
        raise ValueError(f"{name} is missing: pass rows with a 'prompt' column")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} is {type(dataset).__name__}, which has no length: prompts are drawn by index, "
            "so load a streamed dataset into memory first"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to generate from")
    read_row(dataset, 0, name)


def read_row(dataset: Any, number: int, name: str) -> dict[str, Any]:
    """Row ``number`` of a dataset, checked when it is read: a large dataset is not read twice.

    Raises:
        TypeError: for a row that is no dict.
        ValueError: for one without a ``prompt``; both name the dataset and the row.
    """
    row: Any = dataset[number]
    if not isinstance(row, dict):
        raise TypeError(
            f"{name} holds {type(row).__name__} rows ({name}[{number}]): each must be a dict with a 'prompt'"
        )
    if row.get("prompt") is None:
        only = (
            "prompt=None" if "prompt" in row else f"no 'prompt' column, only: {', '.join(map(str, row)) or 'nothing'}"
        )
        raise ValueError(
            f"{name}[{number}] has {only}; give every row a prompt (text or chat messages), or drop the row"
        )
    return row


def named_datasets(dataset: Any, name: str) -> list[tuple[str, Any]]:
    """``(name, dataset)`` pairs of None, one dataset or a dict of them."""
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return [(f"{name}[{key!r}]", part) for key, part in dataset.items()]
    return [(name, dataset)]


def columns_of(examples: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Every column but ``prompt``, as lists; None where a row lacks one."""
    names = {name: None for example in examples for name in example if name != "prompt"}
    return {name: [example.get(name) for example in examples] for name in names}


class MicroStepNumbers(Dataset[int]):
    """The micro-steps of one epoch, as the dataset that transformers' loop iterates over."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index


def collate_micro_step(numbers: list[int]) -> dict[str, int]:
    """The one micro-step of a batch, under the name that `GRPOTrainer.training_step` reads."""
    return {"micro_step": numbers[0]}
