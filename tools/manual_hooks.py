"""Hooks of mkdocs: let pages of docs/ link to pictures and CSV files of bench/.

A page links to ``../bench/plots/x.svg``, which is valid in the source tree. The site contains the file as
``bench/plots/x.svg``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHARED = ("bench/plots/*.png", "bench/plots/*.svg", "bench/results/*.csv", "bench/results/smollm2_arithmetic/*.png")
#: A link to bench/, such as ``](../../bench/`` in a page one folder down.
LINK = re.compile(r"\]\(((?:\.\./)*)\.\./bench/")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of `SHARED` to the site."""
    for pattern in SHARED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite links to bench/, which on the site is one folder nearer."""
    return LINK.sub(r"](\1bench/", markdown)
