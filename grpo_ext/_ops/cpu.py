"""The operators on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops.operators import register
from grpo_ext._ops.packing import Params, rows_of
from grpo_ext._ops.schemas import PolicyLoss, RowGradient, RowLoss, RowStats, ScaleRows
from grpo_ext._ops.spec import IDENTITY


def _raise_bad_id(row: int, ids: Tensor, vocab: int, masked: bool) -> None:
    if row >= 0:
        b, t = divmod(row, ids.shape[1])
        name, remedy = ("completion_ids", "set completion_mask to 0 there, or ") if masked else ("ids", "")
        raise IndexError(
            f"{name}[{b}, {t}] = {int(ids[b, t])} is outside [0, {vocab}), the vocabulary of the logits; "
            f"{remedy}pass logits of the full vocabulary"
        )


class _Cpu:
    def row_stats(self, rows: Params, a: RowStats) -> None:
        bad = _C.cpu_row_stats(rows, torch.get_num_threads())
        _raise_bad_id(bad, a.ids, a.logits.shape[-1], a.mask is not None)

    def row_gradient(self, rows: Params, a: RowGradient) -> None:
        _C.cpu_row_gradient(rows, torch.get_num_threads())

    def policy_loss(self, policy: Params, a: PolicyLoss) -> None:
        _C.cpu_policy_loss(a.logps.dtype == torch.float64, policy, torch.get_num_threads())

    def row_loss(self, rows: Params, policy: Params, a: RowLoss) -> None:
        bad = _C.cpu_row_loss(rows, policy, torch.get_num_threads())
        _raise_bad_id(bad, a.ids, a.logits.shape[-1], True)

    def scale_rows(self, a: ScaleRows) -> None:
        factor = float(a.factor)
        if factor != 1.0:
            _C.cpu_scale_rows(rows_of(None, IDENTITY, grad=a.grad), factor, torch.get_num_threads())


register("CPU", _Cpu())
