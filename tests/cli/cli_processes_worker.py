"""`grpo-ext` runs one after the other on however many processes this is started on; see test_cli_processes.py.

    torchrun --nproc_per_node 2 cli_processes_worker.py RUNS.json

The file lists the runs, each a KIND and the arguments of the command. KIND says how the weights are spread: ``ddp``
(not at all), ``fsdp2`` or ``zero3``. Without GPUs the last two need the help of this file. SWITCH_SECONDS in the
environment: after so long a thread gives the interpreter to another that waits for it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import grpo_ext.cli.train as train
from grpo_ext.cli.main import main
from grpo_ext.cli.settings import RunSettings
from grpo_ext.modules.sharding import forward_is_collective

KIND = "ddp"
plain_config = train.make_config


def make_config(settings: RunSettings, folder: str) -> Any:
    """The config of the run, sharded on the CPU as well."""
    if KIND == "zero3":
        import deepspeed

        # accelerate asks a GPU for the name of the backend, and DeepSpeed's own messages would have to be compiled.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
        settings.trainer["accelerator_config"] = {"use_configured_state": True}
        args = plain_config(settings, folder)
        del settings.trainer["accelerator_config"]
        return args
    args = plain_config(settings, folder)
    if KIND == "fsdp2":  # accelerate turns to FSDP where it sees GPUs; all behind that question works on gloo as well
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def recorded_forward_is_collective(model: Any) -> bool:
    """Says what the command found out about the weights."""
    result = forward_is_collective(model)
    print(f"{KIND}: in pieces {result}")
    return result


if __name__ == "__main__":
    if "SWITCH_SECONDS" in os.environ:
        sys.setswitchinterval(float(os.environ["SWITCH_SECONDS"]))
    train.make_config, train.forward_is_collective = make_config, recorded_forward_is_collective
    for KIND, arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):  # noqa: B007
        status = main(arguments)
        if status:
            sys.exit(status)
