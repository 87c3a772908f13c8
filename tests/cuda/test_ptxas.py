"""Compiled sm_90 kernels: no spills, few enough registers, 16-byte accesses. Needs nvcc, no GPU."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
FILES = [f"{kind}_{dtype}" for kind in ("ring", "streaming") for dtype in ("bf16", "fp16", "fp32")]
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-gencode", "arch=compute_90,code=sm_90"]

#: Most registers per thread with which as many threads as the kernel is designed for fit an SM (65,536 registers, given
#: out in units of 8 per thread): ring 672 threads and a small block beside them, persistent statistics 576 threads,
#: statistics 3 x 256, gradient 4 x 256.
MOST_REGISTERS = {"stats_ring_kernel": 104, "ring_kernel": 80, "stats_kernel": 80, "gradient_kernel": 64}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compiled(name: str, out: Path) -> tuple[str, str]:
    """The resource report and the PTX of one source file."""
    source = str(next((SOURCES / "cuda" / "rows").rglob(f"{name}.cu")))
    command = ["nvcc", *FLAGS, "-Xptxas", "-v", f"-I{SOURCES}", "--keep", "--keep-dir", str(out), "-c", source]
    done = subprocess.run([*command, "-o", str(out / f"{name}.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, next(out.glob(f"{name}*.ptx")).read_text()


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folders = {name: tmp_path_factory.mktemp(name) for name in FILES}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(FILES, pool.map(compiled, FILES, folders.values()), strict=True))


def kernels(report: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes by kernel, from `ptxas -v`."""
    found = {}
    for part in report.split("Compiling entry function")[1:]:
        name = re.search(r"'(\S+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert name is not None
        assert registers is not None
        assert spills is not None
        found[name[1]] = {"registers": int(registers[1]), "spills": int(spills[1]) + int(spills[2])}
    return found


@pytest.mark.parametrize("name", FILES)
def test_no_spills_and_full_occupancy(builds: dict[str, tuple[str, str]], name: str) -> None:
    found = kernels(builds[name][0])
    assert len(found) == 4
    for kernel, resources in found.items():
        assert resources["spills"] == 0, kernel
        limit = next(most for part, most in MOST_REGISTERS.items() if part in kernel)
        assert resources["registers"] <= limit, kernel


@pytest.mark.parametrize("name", FILES)
def test_rows_move_in_sixteen_bytes(builds: dict[str, tuple[str, str]], name: str) -> None:
    """Bulk copies or vector accesses; single elements only at the ends of a misaligned row."""
    ptx = builds[name][1]
    if name.startswith("ring"):
        for instruction in ("cp.async.bulk.shared::cluster.global", "cp.async.bulk.global.shared", "ld.shared.v4"):
            assert instruction in ptx, instruction
        assert not re.search(r"ld\.global\.(nc\.)?[bu]16", ptx)
    else:
        for instruction in ("ld.global.L1::no_allocate.v4", "st.global.v4"):
            assert instruction in ptx, instruction
