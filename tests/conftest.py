"""Shared fixtures. `device` runs a test on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

import gc

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-isa", help="instruction set of the CPU kernels: portable, avx2 or avx512")


def pytest_configure(config: pytest.Config) -> None:
    isa = config.getoption("--cpu-isa")
    if isa is not None:
        from grpo_ext import _C

        if not _C.select_cpu_isa(isa):
            raise pytest.UsageError(f"--cpu-isa {isa}: this processor lacks it; it has {_C.cpu_isa()}")


@pytest.fixture(scope="module", autouse=True)
def _collect_only_what_is_new() -> None:
    """Every end of a training run collects garbage over all objects there are. Those of imported modules, a million of
    them, stay for good: left out, a short run takes a quarter of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device a test runs on; the case `cuda` carries the marker `gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch sees none")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(1234)
