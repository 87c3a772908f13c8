"""Train TRL's GRPO trainer on the processes of torchrun, stock and patched; see test_trl_two_processes.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import test_trl_step as step
import torch.distributed as dist
from trl_runs import tiny_model

import grpo_ext.integrations.trl as ours


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    arguments: dict[str, Any] = {"gradient_checkpointing": True, "per_device_train_batch_size": 4, "max_steps": 1}
    found: dict[str, Any] = {}
    for with_lora in (True, False):
        model = {"model": tiny_model(), "with_lora": with_lora}
        found[f"stock {with_lora}"] = step.run(folder / f"stock{rank}", **model, **arguments)[0]
        ours.patch(fill_micro_batches=True)
        model["model"] = tiny_model()
        found[f"ours {with_lora}"] = step.run(folder / f"ours{rank}", **model, **arguments)[0]
        found[f"status {with_lora}"] = {
            name: [part.served, part.handed_back] for name, part in ours.status().parts.items()
        }
        ours.unpatch()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
