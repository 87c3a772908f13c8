"""Length limits of README and manual: lines of the README, words per sentence and per paragraph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES, MOST_WORDS_OF_A_PARAGRAPH, MOST_WORDS_OF_A_SENTENCE = 200, 80, 30

FENCE = re.compile(r"^```.*?^```\n?", re.DOTALL | re.MULTILINE)
#: A table's row, a heading, HTML, a reference of mkdocstrings: no prose.
NOT_PROSE = re.compile(r"\s*(\||#|<|:::)")
ITEM = re.compile(r"^\s*([-*]|\d+\.) ")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items of a page, each on one line; inline code, formulas and links count as one word."""
    lines: list[str] = []
    for line in [*FENCE.sub("\n", text).splitlines(), ""]:
        apart = not line.strip() or NOT_PROSE.match(line)
        if (apart or ITEM.match(line)) and lines:
            yield re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "x", " ".join(lines))
            lines = []
        if not apart:
            lines.append(ITEM.sub("", line).strip())


def words(text: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def too_long(text: str) -> list[str]:
    found = []
    for paragraph in paragraphs(text):
        parts = [paragraph] if words(paragraph) > MOST_WORDS_OF_A_PARAGRAPH else []
        parts += [s for s in re.split(r"(?<=[.!?])[*_)\"]*\s", paragraph) if words(s) > MOST_WORDS_OF_A_SENTENCE]
        found += [f"{words(part)} words: {part[:80]}" for part in parts]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_sentence_and_no_paragraph_is_too_long(page: Path) -> None:
    assert too_long(page.read_text(encoding="utf-8")) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_long_ones_are_found() -> None:
    long, short = "word " * 31, "word " * 29 + "end. "
    assert too_long(f"{short}\n") == []
    assert too_long(f"- {short}\n- {short}\n- {short}\n") == []
    assert [line.split(" words")[0] for line in too_long(f"# Title\n\n{long}\n")] == ["31"]
    assert [line.split(" words")[0] for line in too_long(f"{short * 3}\n\n| {long} |\n")] == ["90"]
    assert too_long(f"```\n{long}\n```\n`{long}` (`{long}`).\n") == []
