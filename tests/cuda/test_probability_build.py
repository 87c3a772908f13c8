"""Compiled code of the Hopper products, and a compute-sanitizer run of the probability route."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "csrc"


def report(name: str, out: Path, *flags: str) -> str:
    command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v", *flags]
    done = subprocess.run(
        [*command, f"-I{SOURCES}", "-c", str(SOURCES / "cuda" / f"{name}.cu"), "-o", str(out / "kernel.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_glue_spills_nothing(tmp_path: Path) -> None:
    text = report("probability/probability_glue", tmp_path, "-gencode", "arch=compute_90,code=sm_90")
    assert text.count("Compiling entry function") == 5
    assert not re.search(r"[1-9]\d* bytes spill", text)
    # Eight vectors under way in each lane made the first a third faster (bench/NOTES.md).
    limits = {"target_kernel": 56, "fold_kernel": 40, "scale_kernel": 40, "scaled_hidden_kernel": 40}
    used = re.findall(r"entry function '\S*?\d+([a-z_]+_kernel)I.*?Used (\d+) reg", text, re.S)
    assert {name for name, _ in used} == set(limits)
    assert all(int(registers) <= limits[name] for name, registers in used), used


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_products_keep_their_tensor_cores_busy(tmp_path: Path) -> None:
    """wgmma is not serialised (C7510), register budgets are honoured (C7508), and nothing spills."""
    text = report("gemm_sm90/products", tmp_path, "-gencode", "arch=compute_90a,code=sm_90a")
    assert "C7510" not in text
    assert "C7508" not in text
    assert re.findall(r"(\d+) bytes spill stores", text) == ["0"] * 9
    assert re.findall(r"(\d+) bytes stack frame", text) == ["0"] * 9


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_clean(tool: str) -> None:
    script = Path(__file__).with_name("probability_grid.py")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
