"""Schemas of the operators, and their shapes for tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext._ops.packing import ENTROPY_COEF, policy_outputs, stats_outputs

library = torch.library.Library("grpo_ext", "DEF")

#: Of `PolicyTensors` and the ``LossSpec``, in their order.
POLICY_ARGUMENTS = (
    "Tensor mask, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? sampling_logps, "
    "Tensor? importance_weights, Tensor? num_items, Tensor? entropy_threshold, float[] spec"
)

library.define(
    "row_stats(Tensor logits, Tensor ids, Tensor? mask, float[] transform, bool with_entropy) "
    "-> (Tensor logps, Tensor entropy, Tensor lse)"
)
_ROW_GRADIENT_ARGUMENTS = (
    "Tensor ids, Tensor? mask, Tensor logps, Tensor? entropy, Tensor lse, Tensor coef, "
    "Tensor? entropy_coef, float[] transform"
)
library.define(f"row_gradient(Tensor logits, {_ROW_GRADIENT_ARGUMENTS}) -> Tensor")
library.define(f"row_gradient_(Tensor(a!) logits, {_ROW_GRADIENT_ARGUMENTS}) -> ()")
library.define(
    f"policy_loss(Tensor logps, Tensor? entropy, {POLICY_ARGUMENTS}) "
    "-> (Tensor loss, Tensor coef, Tensor entropy_coef, Tensor kl, Tensor metrics)"
)
_ROW_LOSS_OUTPUTS = "Tensor loss, Tensor logps, Tensor entropy, Tensor kl, Tensor metrics"
library.define(
    f"row_loss(Tensor logits, Tensor ids, {POLICY_ARGUMENTS}, float[] transform, bool with_grad) "
    f"-> ({_ROW_LOSS_OUTPUTS}, Tensor grad)"
)
library.define(
    f"row_loss_(Tensor(a!) logits, Tensor ids, {POLICY_ARGUMENTS}, float[] transform) -> ({_ROW_LOSS_OUTPUTS})"
)
library.define("scale_rows_(Tensor(a!) grad, Tensor factor) -> ()")


@torch.library.register_fake("grpo_ext::row_stats", lib=library)
def _row_stats_fake(
    logits: Tensor, ids: Tensor, mask: Tensor | None, transform: list[float], with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logps, entropy = stats_outputs(logits, with_entropy)
    return logps, entropy, torch.empty_like(logps)


@torch.library.register_fake("grpo_ext::row_gradient", lib=library)
def _row_gradient_fake(logits: Tensor, *arguments: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("grpo_ext::row_gradient_", lib=library)
def _row_gradient_inplace_fake(logits: Tensor, *arguments: Any) -> None:
    return None


@torch.library.register_fake("grpo_ext::policy_loss", lib=library)
def _policy_loss_fake(
    logps: Tensor, entropy: Tensor | None, mask: Tensor, *tensors_and_spec: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = tensors_and_spec[-1]
    loss, kl, metrics = policy_outputs(logps, spec)
    entropy_coef = torch.empty_like(logps) if spec[ENTROPY_COEF] else logps.new_empty(0)
    return loss, torch.empty_like(logps), entropy_coef, kl, metrics


@torch.library.register_fake("grpo_ext::row_loss", lib=library)
def _row_loss_fake(
    logits: Tensor, ids: Tensor, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, spec, _, with_grad = rest
    logps, entropy = stats_outputs(logits, True)
    loss, kl, metrics = policy_outputs(logps, spec)
    shape = logits.shape if with_grad else (0,)
    return loss, logps, entropy, kl, metrics, torch.empty(shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("grpo_ext::row_loss_", lib=library)
def _row_loss_inplace_fake(
    logits: Tensor, ids: Tensor, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _row_loss_fake(logits, ids, mask, *rest, False)[:5]


@torch.library.register_fake("grpo_ext::scale_rows_", lib=library)
def _scale_rows_fake(grad: Tensor, factor: Tensor) -> None:
    return None
