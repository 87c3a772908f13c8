"""TRL on this package's kernels: ``import grpo_ext.integrations.trl as t; t.patch()``.

`patch` replaces the one symbol through which TRL's GRPO, RLOO, SFT, DPO and KTO trainers reach the vocabulary; with
``fuse_loss=True`` also the loss of its GRPO trainer. `status` says what ran where: a call that is handed back to TRL's
own code is counted with the reason.
"""

from __future__ import annotations

from grpo_ext.integrations.trl.counting import Status
from grpo_ext.integrations.trl.patching import patch, status, unpatch

__all__ = ["Status", "patch", "status", "unpatch"]
