"""A source build compiles for the GPUs that nvidia-smi reports; tested with a fake nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
LISTED = "80-real;86-real;89-real;90-real;100-real;103-real;120-real;120-virtual"
pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


def architectures(folder: Path, nvidia_smi: str | None) -> str:
    """Return the architectures that the build compiles for if nvidia-smi is this shell script."""
    if nvidia_smi is not None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (folder / "nvidia-smi").chmod(0o755)
    (folder / "ask.cmake").write_text(
        f"include({ROOT}/cmake/gpu_architectures.cmake)\n"
        f'grpo_gpu_architectures(found "{LISTED}")\n'
        'message(STATUS "found=${found}.")\n'
    )
    done = subprocess.run(
        [str(CMAKE), "-P", str(folder / "ask.cmake")],
        env={"PATH": str(folder), "CMAKE_SYSTEM_PROGRAM_PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("found=")[2].rpartition(".")[0]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ("9.0", "90-real"),
        ("9.0\\n9.0", "90-real"),
        ("8.0\\n8.9", "80-real;89-real"),
        ("8.7", "86-real"),  # binaries run on later minor versions
        ("12.1", "120-real"),
        ("13.0", "120-virtual"),
        ("7.5", ""),  # too old: no kernels of ours
    ],
)
def test_the_gpus_that_are_here(tmp_path: Path, capabilities: str, expected: str) -> None:
    assert architectures(tmp_path, f'printf "{capabilities}\\n"') == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 9", ""),  # a driver without a device
        ('echo "No devices were found"', ""),
        ('[ "$1" = -L ] && echo "GPU 0: NVIDIA A100" || exit 2', LISTED),  # a driver that does not know the question
    ],
)
def test_no_gpu_and_an_old_driver(tmp_path: Path, script: str, expected: str) -> None:
    assert architectures(tmp_path, script) == expected


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="an nvidia-smi is installed")
def test_no_driver(tmp_path: Path) -> None:
    assert architectures(tmp_path, None) == ""
