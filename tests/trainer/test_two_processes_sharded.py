"""FSDP2 on two GPUs equals one process; a checkpoint of another number of processes does not resume."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sharded_training_worker as worker
import torch

from grpo_ext.trainer import GRPOTrainer


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate shards on GPUs only: needs two")
@pytest.mark.timeout(180)
def test_fsdp2_equals_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*command, worker.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=Path(worker.__file__).parent,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    two = torch.load(tmp_path / "sharded.pt", weights_only=True)
    one = worker.run(tmp_path, 1)
    assert "DTensor" in two["kinds"]
    assert "DTensor" not in one["kinds"]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-3, abs=1e-4)
    start = dict(worker.build_model().named_parameters())
    for name, mine in one["weights"].items():
        step = (mine.cpu() - start[name]).norm()
        assert (mine.cpu() - two["weights"][name].cpu()).norm() <= 1e-3 * step + 1e-6, name


def test_another_number_of_processes_does_not_resume(make_trainer: Callable[..., GRPOTrainer], tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    path = tmp_path / "run" / "checkpoint-1" / "grpo_state_0.pt"
    state = torch.load(path, weights_only=True)
    state["plan"]["world_size"] = 2
    torch.save(state, path)
    assert dataclasses.asdict(trainer.plan)["world_size"] == 1
    with pytest.raises(ValueError, match=r"was written by 2 process\(es\), this run has 1: use 2"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(path.parent))
