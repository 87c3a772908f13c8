"""verl on this package's kernels: importing this module registers the policy loss ``grpo_ext``.

In verl's configuration: ``actor_rollout_ref.model.external_lib=grpo_ext.integrations.verl`` and
``actor_rollout_ref.actor.policy_loss.loss_mode=grpo_ext``. `patch` also replaces its fused head,
``use_fused_kernels=True`` with ``fused_kernel_options.impl_backend=triton``.
"""

from __future__ import annotations

from typing import Any

from grpo_ext.integrations.verl_functions import AGGREGATIONS, grpo_ext_policy_loss, linear_cross_entropy

try:
    from verl.trainer.ppo.core_algos import register_policy_loss
except ImportError as error:
    raise ImportError(
        "grpo_ext.integrations.verl registers a loss with verl, which cannot be imported here: install verl with what "
        f"it needs ({error})"
    ) from error

__all__ = ["AGGREGATIONS", "grpo_ext_policy_loss", "linear_cross_entropy", "patch", "unpatch"]

register_policy_loss("grpo_ext")(grpo_ext_policy_loss)

_original: list[Any] = []


def patch() -> None:
    """verl's fused head becomes ours for models whose forward looks it up when it runs: those of verl's
    ``models.transformers``. Megatron's modules have bound it by then if they were imported before."""
    from verl.utils.kernel import linear_cross_entropy as module

    if not _original:
        _original.append(module.linear_cross_entropy)
        module.linear_cross_entropy = linear_cross_entropy


def unpatch() -> None:
    """verl's own fused head again."""
    from verl.utils.kernel import linear_cross_entropy as module

    if _original:
        module.linear_cross_entropy = _original.pop()
