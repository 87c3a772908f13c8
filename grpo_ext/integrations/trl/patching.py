"""Replace TRL's log-probability class and GRPO loss, and restore them."""

from __future__ import annotations

from typing import Any

import torch

from grpo_ext.integrations.trl.counting import Status, counts
from grpo_ext.integrations.trl.fused_loss import compute_loss
from grpo_ext.integrations.trl.seam import LogProbabilities

#: First supported version, first unsupported version after it.
VERSIONS = ((1, 15), (1, 17))

_originals: dict[tuple[Any, str], Any] = {}


def _utils() -> Any:
    """Return ``trl.trainer.utils`` of a supported version."""
    try:
        import trl
    except ImportError as error:
        raise ImportError("grpo_ext.integrations.trl needs TRL: pip install 'trl>=1.15,<1.17'") from error
    found = tuple(int(part) for part in trl.__version__.split(".")[:2] if part.isdigit())
    if not VERSIONS[0] <= found < VERSIONS[1]:
        raise ImportError(
            f"grpo_ext.integrations.trl is written for TRL 1.15 and 1.16, and TRL {trl.__version__} is installed: "
            "pip install 'trl>=1.15,<1.17', or train without patch()"
        )
    from trl.trainer import utils

    return utils


def _replace(owner: Any, name: str, value: Any) -> None:
    if (owner, name) not in _originals:
        _originals[owner, name] = getattr(owner, name)
    setattr(owner, name, value)


def patch(*, fuse_loss: bool = False) -> None:
    """Make TRL's trainers compute log probabilities and entropies with this package's kernels.

    Affects GRPO, RLOO, SFT, DPO and KTO trainers created before or after this call. On the CPU unpatched TRL multiplies
    every position of the batch by the head; patched TRL only unmasked positions. A second call changes only
    ``fuse_loss``.

    Args:
        fuse_loss: also compute the loss of ``trl.GRPOTrainer`` with `grpo_ext.linear_grpo_loss`, inside the model's
            forward; a token-level loss then computes its logits once. Unsupported losses fall back to TRL.

    Raises:
        ImportError: if TRL is missing, is not 1.15 or 1.16, or is 1.15 without Triton.
    """
    utils = _utils()
    if not status().patched:
        original = utils._ChunkedLogProbFunction
        if original is None:
            raise ImportError("TRL 1.15 needs Triton for its fused head: install triton, or TRL 1.16")
        counts.reset()
        LogProbabilities.original = original
        _replace(utils, "_ChunkedLogProbFunction", LogProbabilities)
        if hasattr(utils, "_use_triton"):
            own = utils._use_triton

            def scores_valid_positions_only(device: torch.device) -> bool:
                return device.type in ("cpu", "cuda") or own(device)

            _replace(utils, "_use_triton", scores_valid_positions_only)
    from trl.trainer.grpo_trainer import GRPOTrainer

    if fuse_loss:
        if (GRPOTrainer, "_compute_loss") not in _originals:
            own_loss = GRPOTrainer._compute_loss

            def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
                return compute_loss(self, model, inputs, own_loss)

            _replace(GRPOTrainer, "_compute_loss", _compute_loss)
    elif (GRPOTrainer, "_compute_loss") in _originals:
        GRPOTrainer._compute_loss = _originals.pop((GRPOTrainer, "_compute_loss"))


def unpatch() -> None:
    """Restore TRL's own code; `status` keeps its counts."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


def status() -> Status:
    """Return the counts of calls by our kernels, and of fallbacks to TRL with their reasons."""
    names = {name for _, name in _originals}
    return Status(
        patched="_ChunkedLogProbFunction" in names,
        fuse_loss="_compute_loss" in names,
        served=dict(counts.served),
        handed_back=dict(counts.handed_back),
        losses_served=counts.losses_served,
        losses_handed_back=dict(counts.losses_handed_back),
    )
