"""TRL with this package's kernels: ``import grpo_ext.integrations.trl as t; t.patch()``.

`patch` replaces the class with which TRL's GRPO, RLOO, AsyncGRPO, SFT, DPO and KTO trainers compute log probabilities
from hidden states and head. ``fuse_loss=True`` also replaces the loss of TRL's GRPO trainer. `status` counts the calls
that our kernels computed, and the fallbacks to TRL's own code with their reasons.
"""

from __future__ import annotations

from grpo_ext.integrations.trl.counting import Status
from grpo_ext.integrations.trl.patching import patch, status, unpatch

__all__ = ["Status", "patch", "status", "unpatch"]
