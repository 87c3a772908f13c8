"""Batches and settings for the tests of Liger's drop-ins, on the CPU and on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def batch(
    B: int = 4, L: int = 9, V: int = 131, *, weights: str = "none", dtype: torch.dtype = torch.float32,
    device: str = "cpu", full: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Logits (B, L+1, V) that need a gradient, and what goes with them; one completion is empty unless ``full``."""
    generator = torch.Generator().manual_seed(V + L)
    logits = torch.randn(B, L + 1, V, generator=generator) * 2
    ids = torch.randint(0, V, (B, L), generator=generator)
    lengths = torch.full((B,), L) if full else torch.tensor([L, L // 2, 0, L - 1] * B)[:B]
    mask = (torch.arange(L) < lengths[:, None]).long()
    logps = torch.log_softmax(logits[:, :-1] / 0.9, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    drift = torch.tensor([-0.5, 0.4, 0.1, 0.0] * B)[:B, None]  # two whole completions are outside the clip
    tensors = {
        "logits": logits.to(dtype),
        "ids": ids,
        "mask": mask,
        "advantages": torch.tensor([1.3, -0.8, 0.5, -0.2] * B)[:B],
        "old": logps + drift + 0.3 * torch.randn(B, L, generator=generator),
        "ref": logps + 0.3 * torch.randn(B, L, generator=generator),
    }
    if weights != "none":
        shape = {"B": (B,), "B1": (B, 1), "BL": (B, L)}[weights]
        tensors["weights"] = torch.rand(shape, generator=generator) + 0.5
        if weights == "BL":
            tensors["weights"] = torch.where(mask != 0, tensors["weights"], 1.0)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    tensors["logits"].requires_grad_()
    return tensors


def cases() -> list[dict[str, Any]]:
    """Settings of `triton_grpo_loss`: every loss type and level, with the options spread over them."""
    options = itertools.cycle(
        [
            {"beta": 0.0},
            {"beta": 0.04, "weights": "BL"},
            {"beta": 0.04, "use_bias_correction_kl": True, "weights": "B1"},
            {"beta": 0.0, "weights": "B", "num_items_in_batch": 57},
            {"beta": 0.04, "on_policy": True},
        ]
    )
    grid = itertools.product(LOSS_TYPES, ("token", "sequence"), range(3))
    found = []
    for loss_type, level, _ in grid:
        case = {"loss_type": loss_type, "importance_sampling_level": level, **next(options)}
        if loss_type == "cispo":
            case["eps_high"] = 1.1
        if loss_type in ("grpo", "dapo"):
            case["delta"] = 1.6
        found.append(case)
    return found


def name_of(case: dict[str, Any]) -> str:
    return "-".join(
        f"{k}={v}" if k not in ("loss_type", "importance_sampling_level") else str(v) for k, v in case.items()
    )


def cases_of_liger() -> list[dict[str, Any]]:
    """Those that Liger computes: it refuses three types at sequence level, and its luspo is another formula (a
    completion's losses times its length, averaged over all positions)."""
    return [
        case
        for case in cases()
        if case["loss_type"] != "luspo"
        and (case["importance_sampling_level"] == "token" or case["loss_type"] in CLIPPED)
    ]
