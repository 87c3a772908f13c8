"""Specification page: every section that code cites exists, and the tables agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grpo_ext.rollouts.batching import PromptSchedule, plan_batches
from grpo_ext.trainer import GRPOConfig

ROOT = Path(__file__).parents[2]
SPEC = (ROOT / "docs/inside/spec.md").read_text(encoding="utf-8")
SOURCES = ("*.py", "*.pyi", "*.h", "*.cuh", "*.cu", "*.cpp", "*.md")
CITATION = re.compile(r"SPEC\s+sections?\s+(\d[\d.]*)(?:\s*(?:,|to|and)\s*(\d[\d.]*))?")


def headings() -> set[str]:
    return set(re.findall(r"^##+ (\d(?:\.\d)?)\.? ", SPEC, re.MULTILINE))


def cited(text: str) -> set[str]:
    return {number.rstrip(".") for match in CITATION.finditer(text) for number in match.groups() if number}


def test_citations_are_read() -> None:
    text = "SPEC section 3. SPEC sections 2 to 4 for\n(SPEC section 2.3), SPEC\nsection 7: and SPEC sections 5 and 6."
    assert cited(text) == {"2", "2.3", "3", "4", "5", "6", "7"}


def test_every_cited_section_has_a_heading() -> None:
    found: dict[str, set[str]] = {}
    for folder in ("grpo_ext", "csrc", "tests", "docs", "bench"):
        for pattern in SOURCES:
            for file in (ROOT / folder).rglob(pattern):
                if file != Path(__file__):
                    for number in cited(file.read_text(encoding="utf-8")):
                        found.setdefault(number, set()).add(file.relative_to(ROOT).as_posix())
    assert len(found) >= 5
    assert "csrc/common/token_loss.h" in found["2"]
    assert {number: files for number, files in found.items() if number not in headings()} == {}


def test_the_sections_keep_their_numbers() -> None:
    assert headings() >= {"1", "2", "3", "4", "5", "6", "7"}


def table(section: int) -> list[list[str]]:
    """The cells of the last table of a section, without its head."""
    text = re.split(r"^## ", SPEC, flags=re.MULTILINE)[section]
    lines = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[-1].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def test_defaults_are_those_of_the_fields() -> None:
    fields = GRPOConfig.__dataclass_fields__
    pairs = [pair for row in table(6) for pair in (row[:2], row[2:])]
    assert len(pairs) == 36
    assert {name: str(fields[name].default) for name, _ in pairs} == dict(pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", table(7), ids=lambda row: "-".join(row[:4]))
def test_worked_examples_are_those_of_the_schedule(row: list[str]) -> None:
    p, ga, spg, g = map(int, row[:4])
    plan = plan_batches(p, 1, ga, g, steps_per_generation=spg)
    rows = PromptSchedule(2 * plan.unique_prompts, plan, shuffle=False).rows(0, 0)
    micro_batches = ["".join(str(rows[i]) for i in plan.rank_rows(0, index)) for index in range(spg)]
    steps = [re.sub(r"\D", "", step) for step in row[5].split(",")]
    assert row[4].split() == micro_batches
    assert steps == [str(step) for step in range(1, spg + 1) if step % ga == 0]
