"""The operators' arguments, schemas, and output shapes for tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_ext._ops.arguments import schema_of, with_arguments
from grpo_ext._ops.packing import ENTROPY_COEF, policy_outputs, stats_outputs

library = torch.library.Library("grpo_ext", "DEF")


class PolicyTensors(NamedTuple):
    """The tensor arguments that all policy operators share: ``(B,T)`` unless said otherwise."""

    mask: Tensor
    advantages: Tensor  # (B,) or (B,T)
    old_logps: Tensor | None
    ref_logps: Tensor | None
    sampling_logps: Tensor | None
    importance_weights: Tensor | None  # (B,) or (B,T)
    num_items: Tensor | None  # ()
    entropy_threshold: Tensor | None  # ()


class RowStats(NamedTuple):
    logits: Tensor  # (B,T,V)
    ids: Tensor
    mask: Tensor | None
    transform: list[float]  # `logit_transform`
    with_entropy: bool


class RowGradient(NamedTuple):
    logits: Tensor
    ids: Tensor
    mask: Tensor | None
    logps: Tensor
    entropy: Tensor | None  # needed with entropy_coef
    lse: Tensor
    coef: Tensor  # dLoss/dlogp
    entropy_coef: Tensor | None  # dLoss/dentropy
    transform: list[float]


class PolicyLoss(NamedTuple):
    logps: Tensor
    entropy: Tensor | None
    tensors: PolicyTensors
    spec: list[float]  # `loss_spec`


class RowLoss(NamedTuple):
    logits: Tensor
    ids: Tensor
    tensors: PolicyTensors
    spec: list[float]
    transform: list[float]


class RowLossFresh(NamedTuple):
    call: RowLoss
    with_grad: bool


class ScaleRows(NamedTuple):
    grad: Tensor
    factor: Tensor  # ()


#: What implementations of an operator take, by its name.
OPERATORS: dict[str, type] = {
    "row_stats": RowStats,
    "row_gradient": RowGradient,
    "row_gradient_": RowGradient,
    "policy_loss": PolicyLoss,
    "row_loss": RowLossFresh,
    "row_loss_": RowLoss,
    "scale_rows_": ScaleRows,
}


def _define(name: str, outputs: str, fake: Callable[[Any], Any], mutates: str = "") -> None:
    arguments = OPERATORS[name]
    library.define(f"{name}({schema_of(arguments, [mutates])}) -> {outputs}")
    torch.library.register_fake(f"grpo_ext::{name}", with_arguments(arguments, fake), lib=library)


def _row_stats(a: RowStats) -> tuple[Tensor, Tensor, Tensor]:
    logps, entropy = stats_outputs(a.logits, a.with_entropy)
    return logps, entropy, torch.empty_like(logps)


def _policy_loss(a: PolicyLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, kl, metrics = policy_outputs(a.logps, a.spec)
    entropy_coef = torch.empty_like(a.logps) if a.spec[ENTROPY_COEF] else a.logps.new_empty(0)
    return loss, torch.empty_like(a.logps), entropy_coef, kl, metrics


def _row_loss_inplace(a: RowLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logps, entropy = stats_outputs(a.logits, True)
    loss, kl, metrics = policy_outputs(logps, a.spec)
    return loss, logps, entropy, kl, metrics


def _row_loss(a: RowLossFresh) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_row_loss_inplace(a.call), a.call.logits.new_empty(a.call.logits.shape if a.with_grad else (0,))


_LOSS = "Tensor loss, Tensor logps, Tensor entropy, Tensor kl, Tensor metrics"
_define("row_stats", "(Tensor logps, Tensor entropy, Tensor lse)", _row_stats)
_define("row_gradient", "Tensor", lambda a: a.logits.new_empty(a.logits.shape))
_define("row_gradient_", "()", lambda a: None, mutates="logits")
_define("policy_loss", "(Tensor loss, Tensor coef, Tensor entropy_coef, Tensor kl, Tensor metrics)", _policy_loss)
_define("row_loss", f"({_LOSS}, Tensor grad)", _row_loss)
_define("row_loss_", f"({_LOSS})", _row_loss_inplace, mutates="logits")
_define("scale_rows_", "()", lambda a: None, mutates="grad")
