"""The drawings of batches agree with the schedule, and the page shows all of them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT: dict[str, Any] = runpy.run_path(str(DOCS / "draw_batches.py"), run_name="drawings")
EXAMPLES: dict[str, tuple[int, ...]] = SCRIPT["EXAMPLES"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_drawings_are_up_to_date(name: str) -> None:
    committed = (DOCS / f"plots/batches_{name}.svg").read_text(encoding="utf-8")
    assert committed == SCRIPT["draw"](*EXAMPLES[name]), "run: python docs/draw_batches.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_names_the_numbers_above_each_drawing(name: str) -> None:
    page = (DOCS / "batches.md").read_text(encoding="utf-8")
    section = page.partition(f"(plots/batches_{name}.svg)")[0].rpartition("\n##")[2]
    fields = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_generations")
    assert [re.findall(rf"{field}=(\d+)", section) for field in fields] == [[str(n)] for n in EXAMPLES[name][:4]]


def test_the_worked_examples_are_drawn() -> None:
    spec = (DOCS / "inside/spec.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (\d) \| (\d) \| (\d) \|", spec, re.MULTILINE)
    assert [tuple(map(int, row)) for row in rows] == [numbers[:4] for numbers in EXAMPLES.values() if numbers[4] == 1]
