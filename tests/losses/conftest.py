"""`impl`: run a test on the reference and on the compiled functions."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import grpo_ext
from grpo_ext import reference


@pytest.fixture(params=["reference", "compiled"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    """A module with grpo_loss, policy_loss and selective_log_softmax."""
    return reference if request.param == "reference" else grpo_ext


@pytest.fixture
def real(device: torch.device) -> torch.dtype:
    """The widest dtype of the device: fp64 is for the CPU only."""
    return torch.float64 if device.type == "cpu" else torch.float32
