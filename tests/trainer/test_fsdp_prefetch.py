"""FSDP2 fetches no weights that nobody takes, and modules read their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from grpo_ext.modules.sharding import _bare

WORKER = Path(__file__).parent / "fsdp_prefetch_worker.py"


def results(**environment: str) -> list[dict[str, Any]]:
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=WORKER.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def check(lines: list[dict[str, Any]]) -> None:
    """Torch's own lists, which are what is wrong, are reported: where they drop nothing there is nothing to mend."""
    print(*lines, sep="\n")
    assert {(line["in_order"], line["frozen"]) for line in lines} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    assert any(line["dropped"] > 0 for line in lines if not line["in_order"])
    for line in lines:
        if line["in_order"]:
            assert line["dropped"] == line["wrong"] == 0
            assert (line["ahead"] > 0) == (not line["frozen"])  # with one layer trained there is none before it


def test_layers_behind_wrappers_are_found() -> None:
    layer = torch.nn.Linear(2, 2)
    assert _bare(layer) is layer
    assert _bare(checkpoint_wrapper(layer)) is layer
    assert _bare(torch.compile(checkpoint_wrapper(layer))) is layer


@pytest.mark.timeout(240)
def test_on_the_cpu() -> None:
    check(results(CUDA_VISIBLE_DEVICES=""))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(240)
def test_on_two_gpus() -> None:
    check(results())
