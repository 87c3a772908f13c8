"""The documentation: links lead somewhere, examples run, names exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: Pages that are read where they lie, not on the site.
LOOSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md", "bench/NOTES.md")]

FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def dead_links(page: Path) -> Iterator[str]:
    """Relative links of a page that lead to no file or heading. Others' sites are not asked."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", [*PAGES, *LOOSE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert list(dead_links(page)) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading: here\n", encoding="utf-8")
    page = tmp_path / "page.md"
    good = "[a](there.md) [b](there.md#a-heading-here) [c](https://example.org/x) ```[no](link.md)```"
    page.write_text(f"{good}\n\n```\n[no](code.md)\n```\n[d](gone.md) [e](there.md#elsewhere)\n", encoding="utf-8")
    assert [target for target in dead_links(page) if target != "link.md"] == ["gone.md", "there.md#elsewhere"]


def settings() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def menu(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for page in entry.values():
            yield from menu(page) if isinstance(page, list) else [page]


def test_every_page_is_in_the_menu() -> None:
    assert sorted(menu(settings()["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_reference_names_exist() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "inside/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) >= 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        assert thing.__doc__, f"{name} has no docstring"


def test_everything_public_is_in_the_reference() -> None:
    import grpo_ext

    text = (DOCS / "inside/reference.md").read_text(encoding="utf-8")
    missing = [name for name in grpo_ext.__all__ if f"::: grpo_ext.{name}\n" not in text]
    assert missing == ["__version__", "build_info"]  # `grpo-ext info` prints them


def examples() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: block.start()].count("\n") + 2
            yield pytest.param(block[1], f"{page.name}:{line}", id=f"{page.stem}-{line}")


@pytest.mark.parametrize(("code", "place"), list(examples()))
def test_examples_run(code: str, place: str) -> None:
    exec(compile(code, place, "exec"), {"__name__": "__main__"})


def test_every_loss_type_is_drawn_and_described() -> None:
    from grpo_ext.config import LOSS_TYPES

    page = (DOCS / "losses.md").read_text(encoding="utf-8")
    for name in LOSS_TYPES:
        assert (DOCS / "plots" / f"loss_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(plots/loss_{name}.png)" in page
        assert re.search(rf"\b{name}\b", page)


def test_the_drawn_curve_is_the_loss() -> None:
    import runpy

    import torch

    names = runpy.run_path(str(DOCS / "plot_losses.py"), run_name="plots")
    ratio = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    loss, slope = names["curve"](names["config_of"]("dapo"), ratio, 1.0)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.0, -1.28], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([-0.5, -1.0, 0.0], dtype=torch.float64))
