"""Fill every uninitialized tensor with NaN (integers with their greatest value, bools with True).

As a pytest plugin (``-p poisoned_memory``, `make poison`) this module poisons the whole run. `sitecustomize.py` in the
same folder loads it in the ranks that tests start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def fill(on: bool) -> None:
    """Switch the filling on or off; torch fills only while deterministic algorithms are on."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on  # type: ignore[attr-defined]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialized tensors for the duration of a block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    fill(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def pytest_configure() -> None:
    fill(True)


def pytest_report_header() -> str:
    return "poisoned memory: uninitialized tensors hold NaN"
