"""The architecture page names only existing files and folders, and every package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/inside/architecture.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`([\w/]+(?:/|\.py|\.h|\.cpp))`", PAGE)) | set(re.findall(r"`(tests/\w+)`", PAGE)))


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "grpo_ext" / path).exists()


@pytest.mark.parametrize("folder", ["grpo_ext", "csrc", "tests"])
def test_every_folder_is_named(folder: str) -> None:
    folders = {
        f"{folder}/{child.name}"
        for child in (ROOT / folder).iterdir()
        if child.is_dir() and re.match("[a-z_]", child.name) and child.name != "__pycache__"
    }
    assert len(folders) >= 3
    assert {name for name in folders if f"`{name}" not in PAGE} == set()
