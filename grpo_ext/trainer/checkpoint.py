"""What a checkpoint of `GRPOTrainer` holds beside what transformers keeps: one file per rank."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_ext.rollouts.batching import BatchPlan
from grpo_ext.rollouts.rollout import Rollout

STATE_FILE = "grpo_state_{rank}.pt"
REFERENCE_FILE = "grpo_reference.pt"


def save_state(folder: Path, rank: int, plan: BatchPlan, kernel_calls: int, rollout: Rollout | None) -> None:
    """Write a rank's state; ``rollout`` is the generation batch in use, so that a resumed run goes on inside it."""
    state = {
        "plan": dataclasses.asdict(plan),
        "kernel_calls": kernel_calls,
        "rollout": None if rollout is None else rollout.state_dict(),
    }
    torch.save(state, folder / STATE_FILE.format(rank=rank))


def check_processes(folder: Path, rank: int, plan: BatchPlan) -> None:
    """Refuse a checkpoint of another number of processes before any of it is loaded, on every rank.

    Raises:
        ValueError: naming both numbers.
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


def load_state(folder: Path, rank: int, plan: BatchPlan) -> tuple[int, Rollout | None] | None:
    """(kernel calls, generation batch in use) of a rank; None, with a warning, where the checkpoint has no such file.

    `check_processes` has seen to it that the number of processes is the same.
    """
    path = folder / STATE_FILE.format(rank=rank)
    if not path.exists():
        warnings.warn(f"{folder} has no {path.name}: a generation batch in use is made anew", stacklevel=3)
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    now = dataclasses.asdict(plan)
    changed = {name: (old, now[name]) for name, old in state["plan"].items() if now.get(name) != old}
    if changed:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        warnings.warn(f"batch numbers differ from the checkpoint's ({listed}): other prompts follow", stacklevel=3)
        return state["kernel_calls"], None
    rollout = None if state["rollout"] is None else Rollout.from_state_dict(state["rollout"])
    return state["kernel_calls"], rollout


def save_reference(folder: Path, state: dict[str, Tensor] | None) -> None:
    """Weights of a reference model that has moved."""
    if state is not None:
        torch.save(state, folder / REFERENCE_FILE)


def load_reference(folder: Path) -> dict[str, Tensor]:
    """The inverse.

    Raises:
        FileNotFoundError: the checkpoint was written by a run whose reference model stayed where it was.
    """
    path = folder / REFERENCE_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the checkpoint holds no reference model; it was written with sync_ref_model=False, resume so"
        )
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state
