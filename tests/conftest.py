"""Shared fixtures. `device` runs a test on the CPU and, if there is one, on the GPU."""

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
def _freeze_imported_objects() -> None:
    """Exclude the objects of imported modules from garbage collection: about a million, which are never freed.

    Every training run ends with a full collection. Without those objects a short run takes a quarter of the time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device of a test; the case `cuda` has the marker `gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch sees none")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
