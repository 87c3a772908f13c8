"""Losses from hidden states and head of other packages, as candidates of `grpo_ext.bench.linear`.

Each factory raises ImportError with the reason if its package is missing or does not support the device.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

import grpo_ext

CONFIG = grpo_ext.LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
Inputs = dict[str, Tensor]
#: (hidden, weight, inputs) -> (loss, logps or None)
Loss = Callable[[Tensor, Tensor, Inputs], tuple[Tensor, Tensor | None]]


def torch_loss(logps: Tensor, inputs: Inputs) -> Tensor:
    """The loss `CONFIG` in torch, from log probabilities."""
    ratio = torch.exp(logps - inputs["old"])
    advantages = inputs["advantages"].unsqueeze(1)
    clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return (loss * inputs["mask"]).sum() / inputs["mask"].sum().clamp(min=1)


def trl_logps(device: torch.device) -> Loss:
    from trl.trainer import utils

    chunked, chunk = utils._ChunkedLogProbFunction, getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8192)

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        mask = inputs["mask"]
        rows = chunked.apply(hidden[mask], weight, None, inputs["ids"][mask], 1.0, chunk, None, 1.0, ())[0]
        logps = rows.new_zeros(mask.shape).masked_scatter(mask, rows)
        return torch_loss(logps, inputs), logps

    return loss


def liger_loss(device: torch.device) -> Loss:
    if device.type != "cuda":
        raise ImportError("measured on GPUs only")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CONFIG.epsilon, epsilon_high=CONFIG.clip_high, loss_type="dapo",
        temperature=1.0,
    )  # fmt: skip

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, None]:
        out = module(
            hidden, weight, inputs["ids"], inputs["mask"].long(), inputs["advantages"],
            old_per_token_logps=inputs["old"],
        )  # fmt: skip
        return out[0], None

    return loss


def liger_cute(device: torch.device) -> Loss:
    """Hopper kernels, whose backward computes the head's gradient for a frozen head, too."""
    require_hopper(device)
    import cutlass.cute  # type: ignore[import-not-found]  # noqa: F401  (Liger's class would use torch without it)
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # its check synchronizes; every id is in range

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        ids = inputs["ids"].masked_fill(~inputs["mask"], -100)
        rows = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden.flatten(0, 1), weight, ids.flatten())
        logps = -rows.view(ids.shape)
        return torch_loss(logps, inputs), logps

    return loss


def quack_loss(device: torch.device) -> Loss:
    require_hopper(device)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    names = inspect.signature(chunked_linear_cross_entropy).parameters
    options = {"use_scaled_exp": False} if "use_scaled_exp" in names else {}

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, None]:
        rows, ids = hidden.flatten(0, 1), inputs["ids"].flatten()
        return chunked_linear_cross_entropy(rows, weight, ids, chunk_size=4096, reduction="mean", **options), None

    return loss


def quack_exp(device: torch.device) -> Loss:
    require_hopper(device)
    from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, None]:
        rows, ids = hidden.flatten(0, 1), inputs["ids"].flatten()
        return scaled_exp_linear_cross_entropy(rows, weight, ids, chunk_size=4096, reduction="mean"), None

    return loss


def require_hopper(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        raise ImportError("needs a Hopper GPU")


#: Name of each peer, its factory and its package.
PEERS: dict[str, tuple[Callable[[torch.device], Loss], str]] = {
    "trl": (trl_logps, "trl"),
    "liger": (liger_loss, "liger-kernel"),
    "liger_cute": (liger_cute, "liger-kernel"),
    "quack": (quack_loss, "quack-kernels"),
    "quack_exp": (quack_exp, "quack-kernels"),
}


def version_of(peer: str) -> str:
    """Version of a peer's package; empty for our candidates and for a package without metadata."""
    try:
        return metadata.version(PEERS[peer][1]) if peer in PEERS else ""
    except metadata.PackageNotFoundError:
        return ""
