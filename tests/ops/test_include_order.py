"""Includes of csrc/ go one way: a folder includes itself and the folders before it (docs/inside/architecture.md)."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
ORDER = (
    "common", "cuda/base", "cuda/policy", "cuda/rows", "cuda/rows/sm90", "cuda/gemm_sm90", "cuda/probability", "cuda",
    "cpu", ".",
)  # fmt: skip


def upward(file: Path) -> list[str]:
    """Includes of a file that its folder must not see."""
    found = re.findall(r'^#include "([^"]+)"', file.read_text(), re.M)
    assert all((CSRC / name).is_file() for name in found), file
    place = str(file.relative_to(CSRC).parent)
    seen = set(ORDER[: ORDER.index(place) + 1])
    if place == "cpu":
        seen = {"common", "cpu"}
    return [name for name in found if str(Path(name).parent) not in seen]


def test_no_include_goes_up() -> None:
    files = [f for f in CSRC.rglob("*") if f.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert len(files) > 50
    assert {str(f): up for f in files if (up := upward(f))} == {}


def test_the_manual_names_the_folders_in_this_order() -> None:
    text = (CSRC.parent / "docs" / "inside" / "architecture.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("`common`"))
    assert tuple(re.findall(r"`([^`]+)`", line)) == ORDER[:-2]
