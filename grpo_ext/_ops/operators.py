"""The operators, written once: outputs are allocated here, a backend fills them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from grpo_ext._ops.direct import implement
from grpo_ext._ops.packing import (
    ENTROPY_COEF,
    Params,
    count_call,
    fresh_outputs,
    none_if_empty,
    policy_of,
    policy_outputs,
    rows_of,
    stats_outputs,
    with_all_tensors,
)
from grpo_ext._ops.schemas import PolicyLoss, RowGradient, RowLoss, RowLossFresh, RowStats, ScaleRows


class Backend(Protocol):
    """The kernels of one kind of device. Each call also gets the operator's arguments."""

    def row_stats(self, rows: Params, a: RowStats) -> None: ...
    def row_gradient(self, rows: Params, a: RowGradient) -> None: ...
    def policy_loss(self, policy: Params, a: PolicyLoss) -> None: ...
    def row_loss(self, rows: Params, policy: Params, a: RowLoss) -> None: ...
    def scale_rows(self, a: ScaleRows) -> None: ...


def register(key: str, backend: Backend) -> None:
    """Register all operators under the dispatch key of ``backend``."""

    def row_stats(a: RowStats) -> tuple[Tensor, Tensor, Tensor]:
        count_call()
        logps, entropy = stats_outputs(a.logits, a.with_entropy)
        lse = torch.empty_like(logps)
        rows = rows_of(
            a.logits, a.transform, ids=a.ids, mask=a.mask, logps=logps, entropy=none_if_empty(entropy), lse=lse
        )  # fmt: skip
        backend.row_stats(rows, a)
        return logps, entropy, lse

    def gradient_into(grad: Tensor, a: RowGradient) -> None:
        count_call()
        rows = rows_of(
            a.logits, a.transform, grad=grad, ids=a.ids, mask=a.mask, logps=a.logps, entropy=a.entropy, lse=a.lse,
            coef=a.coef, entropy_coef=a.entropy_coef,
        )  # fmt: skip
        backend.row_gradient(rows, a)

    def row_gradient(a: RowGradient) -> Tensor:
        grad = a.logits.new_empty(a.logits.shape)
        gradient_into(grad, a)
        return grad

    def row_gradient_inplace(a: RowGradient) -> None:
        gradient_into(a.logits, a)

    def policy_loss(a: PolicyLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count_call()
        loss, kl, metrics = policy_outputs(a.logps, a.spec)
        coef = torch.empty_like(a.logps)
        entropy_coef = torch.empty_like(a.logps) if a.spec[ENTROPY_COEF] else a.logps.new_empty(0)
        policy = policy_of(
            a.tensors, a.spec, logps=a.logps, entropy=a.entropy, loss=loss, kl=none_if_empty(kl), metrics=metrics,
            coef=coef, entropy_coef=none_if_empty(entropy_coef),
        )  # fmt: skip
        backend.policy_loss(policy, a)
        return loss, coef, entropy_coef, kl, metrics

    def loss_into(grad: Tensor | None, a: RowLoss) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        count_call()
        loss, logps, entropy, kl, metrics = fresh_outputs(a.logits, a.spec)
        rows = rows_of(
            a.logits, a.transform, grad=grad, ids=a.ids, mask=a.tensors.mask, logps=logps, entropy=entropy
        )  # fmt: skip
        policy = policy_of(a.tensors, a.spec, logps=logps, entropy=entropy, loss=loss, kl=kl, metrics=metrics)
        backend.row_loss(rows, policy, a)
        return loss, logps, entropy, kl, metrics

    def row_loss(a: RowLossFresh) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        logits = a.call.logits
        grad = logits.new_empty(logits.shape if a.with_grad else (0,))
        return *loss_into(grad if a.with_grad else None, a.call), grad

    def row_loss_inplace(a: RowLoss) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        return loss_into(a.logits, a)

    implement("row_stats", key, row_stats)
    implement("row_gradient", key, row_gradient)
    implement("row_gradient_", key, row_gradient_inplace)
    implement("policy_loss", key, policy_loss)
    implement("row_loss", key, row_loss, with_all_tensors)
    implement("row_loss_", key, row_loss_inplace, with_all_tensors)
    implement("scale_rows_", key, backend.scale_rows)
