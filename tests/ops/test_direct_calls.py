"""Losses skip torch's dispatcher unless a compiler, mode, profiler or tensor subclass must see the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_ext
from grpo_ext._ops import kernel_calls
from grpo_ext.output import METRIC_NAMES


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def loss() -> grpo_ext.GRPOLossOutput:
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(6).view(2, 3)
    return grpo_ext.grpo_loss(logits, ids, torch.tensor([1.0, -1.0]), torch.ones(2, 3), grpo_ext.LossConfig())


def test_a_dispatch_mode_sees_the_operator() -> None:
    plain = loss()
    with Seen() as seen:
        watched = loss()
    assert "grpo_ext::row_loss" in seen.names
    assert torch.equal(plain.loss, watched.loss)


def test_the_profiler_sees_the_operator() -> None:
    with torch.profiler.profile() as profile:
        loss()
    assert any(event.key == "grpo_ext::row_loss" for event in profile.key_averages())


def test_otherwise_the_dispatcher_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_ext import _ops

    def never(*_: Any) -> None:
        raise AssertionError("through the dispatcher")

    monkeypatch.setattr(_ops.kernels.row_loss, "operator", never)
    before = kernel_calls()
    loss()
    assert kernel_calls() == before + 1


def test_metrics_are_a_mapping() -> None:
    metrics = loss().metrics
    assert tuple(metrics) == METRIC_NAMES
    assert len(metrics) == len(METRIC_NAMES)
    assert float(metrics["tokens"]) == 6
    assert metrics["tokens"].dim() == 0
    assert set({"more": 1} | metrics) == {*METRIC_NAMES, "more"}
    assert set(metrics | {"more": 1}) == {*METRIC_NAMES, "more"}
    assert "ratio/mean" in repr(metrics)
    with pytest.raises(KeyError, match="not a metric of the loss"):
        metrics["nothing"]
