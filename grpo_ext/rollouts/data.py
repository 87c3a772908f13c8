"""Check and read datasets: a length, and rows that are dicts with a ``prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


def check_dataset(dataset: Any, name: str) -> None:
    """Check that a dataset can be trained or evaluated on.

    Raises:
        TypeError: no length, or rows that are no dicts.
        ValueError: an empty dataset, or no ``prompt`` column.
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
    """Read and check row ``number`` of a dataset. Checking here avoids a first pass over a large dataset.

    Raises:
        TypeError: the row is no dict. The message names the dataset and the row.
        ValueError: the row has no ``prompt``. The message names the dataset and the row.
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
    """``(name, dataset)`` pairs of None, one dataset or a dict of datasets."""
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return [(f"{name}[{key!r}]", part) for key, part in dataset.items()]
    return [(name, dataset)]


def columns_of(examples: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Every column except ``prompt``, as lists, with None for missing values."""
    names = {name: None for example in examples for name in example if name != "prompt"}
    return {name: [example.get(name) for example in examples] for name in names}


class MicroStepNumbers(Dataset[int]):
    """The micro-step numbers of one epoch: the dataset for transformers' training loop."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index


def collate_micro_step(numbers: list[int]) -> dict[str, int]:
    """Wrap the only micro-step number of a batch for `GRPOTrainer.training_step`."""
    return {"micro_step": numbers[0]}
