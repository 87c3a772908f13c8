"""verl with this package's kernels: importing this module registers the policy loss ``grpo_ext``.

In verl's configuration set ``actor_rollout_ref.model.external_lib=grpo_ext.integrations.verl`` and
``actor_rollout_ref.actor.policy_loss.loss_mode=grpo_ext``. `patch` also replaces verl's fused heads, which
``use_fused_kernels=True`` turns on.
"""

from __future__ import annotations

from typing import Any

from grpo_ext.integrations.verl_functions import (
    AGGREGATIONS,
    fused_linear_for_ppo,
    grpo_ext_policy_loss,
    linear_cross_entropy,
)

try:
    from verl.trainer.ppo.core_algos import register_policy_loss
except ImportError as error:
    raise ImportError(
        "grpo_ext.integrations.verl registers a loss with verl, which cannot be imported: install verl with its "
        f"dependencies ({error})"
    ) from error

__all__ = ["AGGREGATIONS", "fused_linear_for_ppo", "grpo_ext_policy_loss", "linear_cross_entropy", "patch", "unpatch"]

register_policy_loss("grpo_ext")(grpo_ext_policy_loss)

#: Attributes that `patch` has replaced: owner, name, verl's own value.
_originals: list[tuple[Any, str, Any]] = []


def patch() -> None:
    """Replace verl's fused heads: those of ``impl_backend=torch`` (its default), ``liger`` and ``triton``.

    Affects models whose forward looks up the head at run time: those of verl's ``models.transformers``. Megatron's
    modules bind the Triton head on import: call `patch` before importing them.
    """
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as module

    if _originals:
        return
    for owner, name, ours in (
        (module, "linear_cross_entropy", linear_cross_entropy),
        (FusedLinearForPPO, "forward", fused_linear_for_ppo),
    ):
        _originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, ours)


def unpatch() -> None:
    """Restore verl's own fused heads."""
    while _originals:
        setattr(*_originals.pop())
