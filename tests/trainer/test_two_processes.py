"""Two gloo processes see the same data, advantages and divisors as one with twice the rows: the same gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_process_worker as worker

# A step that replays logs no reward, so names are compared where they occur.
SAME = ("loss", "reward", "reward_std", "kl", "entropy", "grad_norm", "num_tokens", "completions/mean_length")


@pytest.mark.timeout(180)
def test_two_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*command, worker.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=Path(worker.__file__).parent,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    two = torch.load(tmp_path / "two.pt")
    completions = two.pop("sampled")
    assert len(completions) == 8
    assert completions[:4] != completions[4:]  # each rank draws from a stream of its own
    for case in worker.CASES:
        one = worker.run(tmp_path, case, 1)
        assert len(one["gradients"]) == 3
        for mine, theirs in zip(one["gradients"], two[case]["gradients"], strict=True):
            assert (mine - theirs).norm() <= 1e-5 * mine.norm()
        for mine, theirs in zip(one["logs"], two[case]["logs"], strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() & set(SAME) - ({"entropy"} if case == "skipped" else set()):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
        assert one["eval_reward"] == pytest.approx(two[case]["eval_reward"])
        # What one process leaves out two may not: each runs at least one row, so that both have a backward.
        share = [log["skipped_sequences"] for log in one["logs"]]
        assert (max(share) > 0.3) == (case == "skipped")
