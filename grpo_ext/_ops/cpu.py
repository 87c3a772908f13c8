"""The operators on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.direct import implements
from grpo_ext._ops.packing import (
    ENTROPY_COEF,
    count_call,
    fresh_outputs,
    given,
    policy_of,
    policy_outputs,
    rows_of,
    stats_outputs,
    with_all_tensors,
)


def _raise_bad_id(row: int, ids: Tensor, vocab: int, masked: bool) -> None:
    if row >= 0:
        b, t = divmod(row, ids.shape[1])
        name, remedy = ("completion_ids", "set completion_mask to 0 there, or ") if masked else ("ids", "")
        raise IndexError(
            f"{name}[{b}, {t}] = {int(ids[b, t])} is outside [0, {vocab}), the vocabulary of the logits; "
            f"{remedy}pass logits of the full vocabulary"
        )


@implements("row_stats", "CPU")
def _row_stats_cpu(
    logits: Tensor, ids: Tensor, mask: Tensor | None, transform: list[float], with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count_call()
    logps, entropy = stats_outputs(logits, with_entropy)
    lse = torch.empty_like(logps)
    rows = rows_of(logits, ids=ids, mask=mask, logps=logps, entropy=given(entropy), lse=lse)
    bad = _C.cpu_row_stats(rows, transform, torch.get_num_threads())
    _raise_bad_id(bad, ids, logits.shape[-1], mask is not None)
    return logps, entropy, lse


def _row_gradient_into_cpu(
    logits: Tensor,
    grad: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    logps: Tensor,
    entropy: Tensor | None,
    lse: Tensor,
    coef: Tensor,
    entropy_coef: Tensor | None,
    transform: list[float],
) -> None:
    count_call()
    rows = rows_of(
        logits, grad=grad, ids=ids, mask=mask, logps=logps, entropy=entropy, lse=lse,
        coef=coef, entropy_coef=entropy_coef,
    )  # fmt: skip
    _C.cpu_row_gradient(rows, transform, torch.get_num_threads())


@implements("row_gradient", "CPU")
def _row_gradient_cpu(logits: Tensor, *arguments: Any) -> Tensor:
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _row_gradient_into_cpu(logits, grad, *arguments)
    return grad


@implements("row_gradient_", "CPU")
def _row_gradient_inplace_cpu(logits: Tensor, *arguments: Any) -> None:
    _row_gradient_into_cpu(logits, logits, *arguments)


@implements("policy_loss", "CPU")
def _policy_loss_cpu(
    logps: Tensor, entropy: Tensor | None, mask: Tensor, *tensors_and_spec: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count_call()
    *tensors, spec = tensors_and_spec
    loss, kl, metrics = policy_outputs(logps, spec)
    coef = torch.empty_like(logps)
    entropy_coef = torch.empty_like(logps) if spec[ENTROPY_COEF] else logps.new_empty(0)
    policy = policy_of(
        logps.shape, mask, *tensors, logps=logps, entropy=entropy, loss=loss, kl=given(kl), metrics=metrics,
        coef=coef, entropy_coef=given(entropy_coef),
    )  # fmt: skip
    _C.cpu_policy_loss(logps.dtype == torch.float64, policy, spec, torch.get_num_threads())
    return loss, coef, entropy_coef, kl, metrics


def _row_loss_into_cpu(
    logits: Tensor, grad: Tensor | None, ids: Tensor, mask: Tensor, tensors: tuple[Any, ...], spec: list[float],
    transform: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    count_call()
    loss, logps, entropy, kl, metrics = fresh_outputs(logits, spec)
    rows = rows_of(logits, grad=grad, ids=ids, mask=mask, logps=logps, entropy=entropy)
    policy = policy_of(logps.shape, mask, *tensors, logps=logps, entropy=entropy, loss=loss, kl=kl, metrics=metrics)
    bad = _C.cpu_row_loss(rows, transform, policy, spec, torch.get_num_threads())
    _raise_bad_id(bad, ids, logits.shape[-1], True)
    return loss, logps, entropy, kl, metrics


@implements("row_loss", "CPU", with_all_tensors)
def _row_loss_cpu(
    logits: Tensor, ids: Tensor, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    *tensors, spec, transform, with_grad = rest
    shape = logits.shape if with_grad else (0,)
    grad = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    return *_row_loss_into_cpu(logits, grad if with_grad else None, ids, mask, tuple(tensors), spec, transform), grad


@implements("row_loss_", "CPU", with_all_tensors)
def _row_loss_inplace_cpu(
    logits: Tensor, ids: Tensor, mask: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    *tensors, spec, transform = rest
    return _row_loss_into_cpu(logits, logits, ids, mask, tuple(tensors), spec, transform)


@implements("scale_rows_", "CPU")
def _scale_rows_cpu(grad: Tensor, factor: Tensor) -> None:
    value = float(factor)
    if value != 1.0:
        _C.cpu_scale_rows(rows_of(None, grad=grad), value, torch.get_num_threads())
