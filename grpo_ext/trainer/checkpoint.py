"""Files that `GRPOTrainer` adds to a checkpoint of transformers, and the search for complete checkpoints."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_ext.rollouts.batching import BatchPlan
from grpo_ext.rollouts.rollout import Rollout

STATE_FILE = "grpo_state_{rank}.pt"
REFERENCE_FILE = "grpo_reference.pt"

#: transformers writes this file last: a checkpoint without it is incomplete.
LAST_FILE = "trainer_state.json"


def checkpoint_fault(folder: Path, whole_weights: bool = True, with_optimizer: bool = True) -> str | None:
    """Return why a checkpoint cannot be resumed: the missing or truncated file; None for a complete checkpoint.

    Reads only headers and file sizes, so large files take no time.

    Args:
        folder: folder of the checkpoint.
        whole_weights: one process saved weights and optimizer; False under FSDP and DeepSpeed, which save other files.
        with_optimizer: False if the run saves only the model.
    """
    if not folder.is_dir():
        return f"{folder} is not a folder"
    needed = [LAST_FILE]
    if whole_weights and with_optimizer:
        needed += ["optimizer.pt", "scheduler.pt"]
    for index in folder.glob("*.index.json"):
        try:
            needed += sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError):
            return f"{index} is truncated"
    for name in needed:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    try:
        json.loads((folder / LAST_FILE).read_bytes())
    except ValueError:
        return f"{folder / LAST_FILE} is truncated"
    # PEFT saves an adapter that is not named "default" into a folder of its name.
    paths = sorted([*folder.iterdir(), *folder.glob("*/adapter_model.*")])
    found = [path for path in paths if path.suffix in (".safetensors", ".pt", ".pth", ".bin")]
    for path in found:
        if not (_safetensors_is_whole(path) if path.suffix == ".safetensors" else zipfile.is_zipfile(path)):
            return f"{path} is truncated"
    if whole_weights and not any(re.match(r"(pytorch_|adapter_)?model\b", path.name) for path in found):
        return f"{folder} holds no weights (model.safetensors or adapter_model.safetensors)"
    return None


def checkpoint_step(folder: Path) -> int:
    """Return the optimizer step after which a complete checkpoint was saved."""
    return int(json.loads((folder / LAST_FILE).read_bytes())["global_step"])


def _safetensors_is_whole(path: Path) -> bool:
    """Whether the file has the length that its header states."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)


def newest_complete(folder: Path, **kind: bool) -> tuple[Path, list[str]]:
    """Return the newest complete checkpoint of a run folder, and the faults of the newer ones.

    Args:
        folder: folder of the run.
        kind: keyword arguments of `checkpoint_fault`.

    Raises:
        ValueError: no checkpoint is complete; the message names each fault.
    """
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    faults: list[str] = []
    for _, path in sorted(((int(match[1]), path) for match, path in matches if match), reverse=True):
        fault = checkpoint_fault(path, **kind)
        if fault is None:
            return path, faults
        faults.append(fault)
    raise ValueError(f"{folder} holds no checkpoint to continue from" + "".join(f"; {fault}" for fault in faults))


def checkpoint_to_resume(given: str | bool | None, run: Path, **kind: bool) -> tuple[str | None, str | None]:
    """Resolve ``resume_from_checkpoint`` to a folder, and a line to print if newer checkpoints are incomplete.

    Args:
        given: a folder; True for the newest complete checkpoint of the run; None or False for a new run.
        run: folder of the run.
        kind: keyword arguments of `checkpoint_fault`.

    Raises:
        ValueError: the given checkpoint is incomplete, or no checkpoint is complete; the message names the file.
    """
    if given is None or given is False:
        return None, None
    if given is not True:
        fault = checkpoint_fault(Path(given), **kind)
        if fault is not None:
            raise ValueError(f"cannot resume from {given}: {fault}; name another checkpoint")
        return given, None
    path, faults = newest_complete(run, **kind)
    return str(path), f"resuming from {path}: {'; '.join(faults)}" if faults else None


def remove_older_files(folder: Path, processes: int) -> None:
    """Remove an older run's files from a checkpoint that the main process is about to write.

    Files named for ranks of this run stay: another process may have written its own already.
    """
    (folder / LAST_FILE).unlink(missing_ok=True)  # first: without it the rest is an incomplete checkpoint
    written = {STATE_FILE.format(rank=rank) for rank in range(processes)}
    written |= {f"rng_state_{rank}.pth" for rank in range(processes) if processes > 1}
    for path in folder.glob("*"):
        if path.is_file() and path.name not in written:
            path.unlink(missing_ok=True)


def save_state(folder: Path, rank: int, run: str, plan: BatchPlan, kernel_calls: int, rollout: Rollout | None) -> None:
    """Write a rank's state.

    Args:
        folder: folder of the checkpoint.
        rank: rank of this process.
        run: identifier of the run, equal on all ranks: files of two runs do not mix.
        plan: the run's batch numbers.
        kernel_calls: kernel calls of the run so far.
        rollout: the generation batch in use, so that a resumed run continues inside it.
    """
    state = {
        "run": run,
        "plan": dataclasses.asdict(plan),
        "kernel_calls": kernel_calls,
        "rollout": None if rollout is None else rollout.state_dict(),
    }
    torch.save(state, folder / STATE_FILE.format(rank=rank))


def check_processes(folder: Path, rank: int, plan: BatchPlan) -> None:
    """Reject a checkpoint of another number of processes on every rank, before any of it is loaded.

    Raises:
        ValueError: the numbers of processes differ; the message names both.
    """
    paths = [folder / STATE_FILE.format(rank=r) for r in (rank, 0)]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return
    before = torch.load(path, weights_only=True)["plan"]["world_size"]
    if before != plan.world_size:
        raise ValueError(
            f"the checkpoint was written by {before} process(es), this run has {plan.world_size}: use {before}"
        )


def load_state(folder: Path, rank: int, plan: BatchPlan) -> tuple[str, int, Rollout | None] | None:
    """Load ``(run, kernel calls, generation batch in use)`` of a rank; None, with a warning, if the file is missing.

    Call `check_processes` first: the number of processes must be equal.
    """
    path = folder / STATE_FILE.format(rank=rank)
    if not path.exists():
        warnings.warn(f"{folder} has no {path.name}: the generation batch in use is generated again", stacklevel=3)
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    now = dataclasses.asdict(plan)
    changed = {name: (old, now[name]) for name, old in state["plan"].items() if now.get(name) != old}
    if changed:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        warnings.warn(
            f"batch numbers differ from the checkpoint's ({listed}): the run continues with other prompts", stacklevel=3
        )
        return state.get("run", ""), state["kernel_calls"], None
    rollout = None if state["rollout"] is None else Rollout.from_state_dict(state["rollout"])
    return state.get("run", ""), state["kernel_calls"], rollout


def save_reference(folder: Path, state: dict[str, Tensor] | None) -> None:
    """Write the weights of a reference model that ``sync_ref_model`` moves; a no-op if ``state`` is None."""
    if state is not None:
        torch.save(state, folder / REFERENCE_FILE)


def load_reference(folder: Path) -> dict[str, Tensor]:
    """Load the weights that `save_reference` wrote.

    Raises:
        FileNotFoundError: the checkpoint was written by a run with ``sync_ref_model=False``.
    """
    path = folder / REFERENCE_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint was written with sync_ref_model=False; resume with that setting"
        )
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state
