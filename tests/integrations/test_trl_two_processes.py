"""TRL's GRPO trainer under DDP, stock and patched: equal numbers, reentrant checkpointing only if DDP allows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl_two_processes_worker as worker


@pytest.mark.timeout(240)
def test_two_processes_equal_stock(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*command, worker.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=220,
        cwd=Path(worker.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-4000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for with_lora in (True, False):
            for stock, mine in zip(found[f"stock {with_lora}"], found[f"ours {with_lora}"], strict=True):
                for name in ("loss", "grad_norm", "reward", "sampling/importance_sampling_ratio/mean"):
                    assert mine[name] == pytest.approx(stock[name], rel=2e-4, abs=2e-6), name
            status = found[f"status {with_lora}"]
            assert status["one_forward"] == [1, {}]
            ((reason, count),) = status["fill_micro_batches"][1].items()
            assert reason.startswith("several processes")
            assert count == 1
            # transformers lets DDP look for unused parameters if the model has an adapter.
            assert status["checkpointing"] == ([0, {"DDP looks for unused parameters": 1}] if with_lora else [1, {}])
