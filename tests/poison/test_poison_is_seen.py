"""Uninitialized tensors are poisoned in the test process and in the ranks that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

CALLS = {
    "empty": lambda: torch.empty(3),
    "new_empty": lambda: torch.zeros(2).new_empty(3),
    "empty_like": lambda: torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)),
    "empty_strided": lambda: torch.empty_strided((2, 3), (4, 1)),
    "resize_": lambda: torch.zeros(0).resize_(3),
}


@pytest.mark.skipif(not torch.are_deterministic_algorithms_enabled(), reason="memory is poisoned under make poison")
@pytest.mark.parametrize("name", CALLS)
def test_uninitialized_tensors_are_nan(name: str) -> None:
    made: Tensor = CALLS[name]()
    assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.empty(3, dtype=torch.bool).all()


def test_ranks_that_a_test_starts_are_poisoned() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.empty(3).isnan().all().item())"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "LOCAL_RANK": "0"},
    )
    assert done.stdout.strip() == "True"
