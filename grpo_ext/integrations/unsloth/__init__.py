"""Unsloth with this package's kernels: ``import grpo_ext.integrations.unsloth as u; u.patch()``.

Call `patch` after ``import unsloth`` and before you create a trainer. It replaces parts of the step of Unsloth's GRPO
trainer; each has a switch in `patch` and its lines in `status`:

    head         log probabilities from hidden states and head
    one_forward  old log probabilities are those of the training forward where that is exact: no second forward
    trim         each micro-batch loses the padding that all its rows have
    dense        rows lie side by side under a causal mask where Unsloth's packed stream runs attention row by row

The loss and its metrics stay Unsloth's own code. ``tests/integrations/unsloth_check.py`` compares Unsloth's functions
with ours on the CPU in ``make test-all``. Unsloth from October 2026 can be imported without a GPU; its GRPO trainer
needs one.
"""

from __future__ import annotations

from grpo_ext.integrations.unsloth.head import SYMBOLS, hidden_states_logps
from grpo_ext.integrations.unsloth.patching import patch, status, unpatch

__all__ = ["SYMBOLS", "hidden_states_logps", "patch", "status", "unpatch"]
