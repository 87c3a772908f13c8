"""The sanitizers at work: a kernel that is told a wrong size reads past the end, and the process ends there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ONLY_SANITIZED = pytest.mark.skipif(
    "GRPO_EXT_LIBRARY" not in os.environ, reason="needs the extension with AddressSanitizer: make sanitize"
)

CALL = """
import sanitized_extension, torch
from grpo_ext import _C
from grpo_ext._ops import logit_transform
from grpo_ext._ops.packing import rows_of
logits, ids = torch.randn(2, 3, 40), torch.zeros(2, 3, dtype=torch.int64)
logps, lse = torch.empty(2, 3), torch.empty(2, 3)
rows = rows_of(logits, logit_transform(1.0, None, 1.0), ids=ids, logps=logps, lse=lse)
assert rows["logits_stride_batch"] == 120
print(_C.cpu_row_stats(rows | dict(logits_stride_batch={stride}), 1))
"""


@ONLY_SANITIZED
@pytest.mark.parametrize(("stride", "wrong"), [(120, False), (150, True)])
def test_reading_past_the_end_ends_the_process(stride: int, wrong: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALL.format(stride=stride)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    if wrong:
        assert done.returncode != 0
        assert "ERROR: AddressSanitizer" in done.stderr
        assert "READ of size" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "-1"  # no row with an id outside the vocabulary
