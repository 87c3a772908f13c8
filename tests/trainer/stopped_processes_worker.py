"""torchrun --nproc_per_node 2 stopped_processes_worker.py FOLDER; see test_stopped_processes.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from torch import distributed as dist
from two_process_worker import make_trainer

from grpo_ext.trainer.checkpoint import STATE_FILE


def error_of_a_run(folder: Path) -> str:
    """The error with which `train` ends here."""
    try:
        make_trainer(folder, "dapo", 2, "ddp").train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def generates_again(folder: Path, mixed: bool) -> bool:
    """Whether this rank resumes without the generation batch of a checkpoint within it.

    Args:
        folder: where the runs are made.
        mixed: rank 1's file is another run's.
    """
    states = []
    for name in ("old", "new"):
        trainer = make_trainer(folder / name, "dapo", 2, "ddp", save_strategy="steps", save_steps=1, max_steps=1)
        trainer.train()
        states.append(Path(str(trainer.args.output_dir)) / "checkpoint-1" / STATE_FILE.format(rank=1))
    if mixed and dist.get_rank() == 1:
        shutil.copy(*states)
    trainer = make_trainer(folder / "resumed", "dapo", 2, "ddp")
    trainer._load_rng_state(str(states[1].parent))
    return trainer._rollout is None


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {name: error_of_a_run(folder / name) for name in ("in use", "no lock")}
    found |= {name: generates_again(folder / name, name == "mixed") for name in ("whole", "mixed")}
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
