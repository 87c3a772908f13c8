"""Starts two_process_worker.py on two processes, and compares what it found with one process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import two_process_worker as worker

# A step that replays logs no reward, so names are compared where they occur.
SAME = ("loss", "reward", "reward_std", "kl", "entropy", "grad_norm", "num_tokens", "completions/mean_length")
ALL_RUN_BY_PEFT = "fused, 0 of 14 layers (14 run by PEFT: hooks on its parts)"


def on_two(folder: Path, kinds: Sequence[str], timeout: float, **environment: str) -> dict[str, Any]:
    """The results of two processes, by kind and case."""
    worker.make_trainer(folder / "of-one", "dapo", 1, "ddp", save_strategy="steps", save_steps=1, max_steps=1).train()
    worker.build_model().save_pretrained(folder / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*command, worker.__file__, str(folder), *kinds],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(worker.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.returncode == 0, process.stderr[-6000:]
    results: dict[str, Any] = torch.load(folder / "two.pt")
    return results


def compare(one: dict[str, Any], two: dict[str, Any], case: str, tolerance: float = 1e-5) -> None:
    """One run on one process and on two: gradients, weights, logs, and what the trained model generates."""
    for mine, theirs in zip(one["gradients"], two["gradients"], strict=len(two["gradients"]) > 0):
        assert (mine - theirs).norm() <= tolerance * mine.norm()
    start = dict(worker.build_model().named_parameters())
    for name, mine in one["weights"].items():
        moved = (mine - start[name]).norm() if name in start else mine.norm()
        assert moved > 0 or case in worker.ADAPTERS
        assert (mine - two["weights"][name]).norm() <= 10 * tolerance * moved + 1e-7 * mine.norm(), name
    for name, mine in one["handed over"].items():
        torch.testing.assert_close(two["handed over"][name], mine, rtol=10 * tolerance, atol=tolerance)
    assert len(one["logs"]) == len(two["logs"]) == 3
    for mine, theirs in zip(one["logs"], two["logs"], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() & set(SAME) - ({"entropy"} if case in worker.SKIPPED else set()):
            assert mine[name] == pytest.approx(theirs[name], rel=10 * tolerance, abs=tolerance), name
    assert two["dropped all-gathers"] == 0
    if case == "lora":
        assert one["lora layers"] == "fused, 14 of 14 layers"
        in_hooks = two["kind"] == "zero3"  # it gathers the weights in hooks of the parts
        assert two["lora layers"] == (ALL_RUN_BY_PEFT if in_hooks else one["lora layers"])
    assert one["eval_reward"] == pytest.approx(two["eval_reward"])
    assert one["generated"] == pytest.approx(two["generated"])
    assert two["generated"]["eval_completions/min_length"] < two["generated"]["eval_completions/max_length"]
    # What one process leaves out two may not: each runs at least one row, so that both have a backward.
    share = [log["skipped_sequences"] for log in one["logs"]]
    assert (max(share) > 0.3) == (case in worker.SKIPPED)
    assert two["packed"] == (case == "packed")
    passes = [log["forwards_per_micro_batch"] for log in two["logs"]]
    assert (min(passes) < 1) == (case == "filled"), (case, two["kind"], passes)


def check_the_rest(two: dict[str, Any]) -> None:
    """A loss that is not finite, and resuming."""
    assert two["nonfinite"]["counted"] == [0.0, 1.0, 0.0]
    first, skipped, third = two["nonfinite"]["losses"]
    assert math.isnan(skipped)
    assert math.isfinite(first + third + two["nonfinite"]["train_loss"])
    assert two["nonfinite"]["steps that moved nothing"] == [True, False]
    assert "step 1: the loss is not finite, for 1 step(s) in a row, all of them skipped" in two["nonfinite"]["error"]
    resumed = two["resumed"]
    for name, weight in resumed["whole"].items():
        assert torch.equal(weight, resumed["resumed"][name]), name
    whole, after = resumed["losses"]
    assert after == whole
    assert resumed["error"] == "the checkpoint was written by 1 process(es), this run has 2: use 1"
