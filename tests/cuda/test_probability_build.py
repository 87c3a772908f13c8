"""What nvcc makes of the probability product, and what compute-sanitizer finds in it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


def cutlass_include() -> Path | None:
    """Where CMake looks as well: GRPO_EXT_CUTLASS_DIR, then the package nvidia-cutlass."""
    given = os.environ.get("GRPO_EXT_CUTLASS_DIR")
    spec = importlib.util.find_spec("cutlass_library")
    root = Path(given) if given else Path(spec.origin).parent / "source" if spec and spec.origin else None
    if root is None:
        return None
    return next((p for p in (root / "include", root) if (p / "cutlass" / "cutlass.h").exists()), None)


def report(name: str, out: Path, *flags: str) -> str:
    command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v", *flags]
    done = subprocess.run(
        [*command, "-c", str(SOURCES / f"{name}.cu"), "-o", str(out / f"{name}.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_glue_spills_nothing(tmp_path: Path) -> None:
    text = report("probability_glue", tmp_path, "-gencode", "arch=compute_90,code=sm_90")
    assert text.count("Compiling entry function") == 4
    assert not re.search(r"[1-9]\d* bytes spill", text)
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", text)) <= 40


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(cutlass_include() is None, reason="needs the headers of nvidia-cutlass")
def test_the_product_keeps_its_tensor_cores_busy(tmp_path: Path) -> None:
    """wgmma is not serialised (C7510), register budgets are honoured (C7508), and no loop spills: a few words per tile
    at most."""
    flags = ("-gencode", "arch=compute_90a,code=sm_90a", "-I", str(cutlass_include()))
    text = report("probability_product_bf16", tmp_path, *flags)
    assert "C7510" not in text
    assert "C7508" not in text
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", text)]
    assert len(spills) == 4
    assert max(spills) <= 64


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
