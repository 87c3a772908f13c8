"""vLLM in two training processes: an engine in each, and one engine whose weights the two hold in halves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm_parallel_worker as worker
from vllm_toys import needs_vllm

pytestmark = needs_vllm


def check(folder: Path, size: int, bound: float, same: bool, **environment: str) -> None:
    """``same``: greedy completions must be those of transformers, which rounding in bf16 may change."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*command, worker.__file__, str(folder), str(size)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(worker.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.returncode == 0, process.stderr[-6000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["checks"]) == 3
    assert max(first["checks"]) < bound
    assert not same or (first["same"] and second["same"])
    assert first["eval_reward"] == second["eval_reward"]
    assert first["own_completions"] != second["own_completions"]  # each has drawn for itself


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.grid), 2])
def test_on_the_cpu(tmp_path: Path, size: int) -> None:
    check(tmp_path, size, 1e-5, True, CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [1, 2])
def test_on_two_gpus(tmp_path: Path, size: int) -> None:
    check(tmp_path, size, 0.1, False)
