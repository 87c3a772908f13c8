"""Hooks of mkdocs: pages of docs/ may link to pictures and CSV files of bench/, where readers of the source find them.

A page writes ``../bench/plots/x.svg``, which holds in the source tree; the site gets the file as ``bench/plots/x.svg``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHARED = ("bench/plots/*.png", "bench/plots/*.svg", "bench/results/*.csv", "bench/results/smollm2_arithmetic/*.png")
#: ``](../../bench/`` of a page one folder down.
LINK = re.compile(r"\]\(((?:\.\./)*)\.\./bench/")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of `SHARED` to the site."""
    for pattern in SHARED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ become links within the site, which is one folder less deep."""
    return LINK.sub(r"](\1bench/", markdown)
