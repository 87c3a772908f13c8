"""Documentation: links resolve, examples run, names exist."""

from __future__ import annotations

import dataclasses
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
LOOSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/llms.txt", "bench/README.md", "bench/NOTES.md")]

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
        for target in entry.values():
            yield from menu(target) if isinstance(target, list) else [target]


def test_every_page_is_in_the_menu() -> None:
    assert sorted(menu(settings()["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_the_site_fetches_nothing_from_elsewhere() -> None:
    found = settings()
    scripts = found["extra"]["polyfills"]
    assert "offline" in found["plugins"]
    assert any("iframe-worker" in name for name in scripts)  # else the plugin adds its own, from another host
    assert [name for name in [*scripts, *found["extra_css"]] if not (DOCS / name).is_file()] == []
    assert found["theme"]["font"] is False


def test_llms_txt_names_every_page_with_a_sentence() -> None:
    lines = (DOCS / "llms.txt").read_text(encoding="utf-8").splitlines()
    listed = [match[1] for line in lines if (match := re.fullmatch(r"- \[[^\]]+\]\(([^)]+)\): .{20,}\.", line))]
    assert listed == list(menu(settings()["nav"]))
    assert len(listed) == sum(line.startswith("-") for line in lines)


def test_reference_names_exist() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "inside" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) >= 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        assert thing.__doc__, f"{name} has no docstring"


def test_everything_public_is_in_the_reference() -> None:
    import grpo_ext

    text = (DOCS / "inside" / "reference.md").read_text(encoding="utf-8")
    missing = [name for name in grpo_ext.__all__ if f"::: grpo_ext.{name}\n" not in text]
    assert missing == ["__version__", "build_info"]  # `grpo-ext info` prints them


def examples() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: block.start()].count("\n") + 2
            name = page.relative_to(DOCS).as_posix()
            yield pytest.param(block[1], f"{name}:{line}", id=f"{name}-{line}")


@pytest.mark.parametrize(("code", "place"), list(examples()))
def test_examples_run(code: str, place: str) -> None:
    exec(compile(code, place, "exec"), {"__name__": "__main__"})


def commands() -> Iterator[Any]:
    """Each line of README and manual that calls ``grpo-ext train`` or ``make train``, continued lines joined."""
    for page in [ROOT / "README.md", *PAGES]:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"\b(grpo-ext|make) train\b", line):
                    yield pytest.param(line.split("  #")[0], id=f"{page.stem}-{line.strip()[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_name_fields_that_exist(line: str) -> None:
    from grpo_ext.cli.settings import check_names, parse_overrides

    arguments = re.split(r"\.yaml|\btrain\b", line)[-1].replace('ARGS="', "").replace('"', "").split()
    check_names(parse_overrides([word for word in arguments if "=" not in word or word.startswith("--")]), "the manual")


@pytest.mark.parametrize("page", [*LOOSE, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"\bpython ((?:bench|examples|docs|tests|tools)/[\w/]+\.py)", text)
    modules = re.findall(r"\bpython -m (grpo_ext[\w.]+)", text)
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_your_own_data_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the training, which needs the packaged model."""
    from grpo_ext.cli.data import load_datasets, load_reward
    from grpo_ext.cli.prepare import lora_config, make_config
    from grpo_ext.cli.settings import read_settings

    text = (DOCS / "start" / "data.md").read_text(encoding="utf-8")
    written = {
        kind: re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for kind in ("json", "python", "yaml")
    }
    for name, kind in (("questions.jsonl", "json"), ("rewards.py", "python"), ("mine.yaml", "yaml")):
        (tmp_path / name).write_text(written[kind][0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert sum(written[kind][0].count("\n") for kind in written) + 1 == 15  # and the command
    run = read_settings("mine.yaml")
    train, heldout = load_datasets(run.dataset, run.seed)
    assert (len(train), heldout) == (2, None)
    reward = load_reward(*run.reward_funcs)
    answers = [[{"role": "assistant", "content": f"It is {number}."}] for number in (12, 41)]
    assert reward(completions=answers, **{name: train[name] for name in train.column_names}) == [1.0, 0.0]
    assert make_config(run, "runs/mine").batch_plan.per_device_batch_size == 16
    assert lora_config(run.lora).r == 16


def test_missing_and_differing_fields_of_trl() -> None:
    """The lists of docs/moving/trl.md are those of the two classes."""
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip("the page is about TRL 1.16")
    from grpo_ext.trainer import GRPOConfig

    theirs, ours = (
        {field.name: field.default for field in dataclasses.fields(c)} for c in (trl.GRPOConfig, GRPOConfig)
    )
    page = (DOCS / "moving" / "trl.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")}
    named = {
        heading: set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", part, re.MULTILINE))))
        for heading, part in sections.items()
    }
    missing = set(theirs) - set(ours)
    assert named["What is missing?"] == missing
    assert f"\n{len(missing)} fields of TRL 1.16" in sections["What is missing?"]
    assert named["What is new?"] == set(ours) - set(theirs)
    alike = {"bf16", "top_k", "vllm_importance_sampling_clip_max"}  # None and False or 0; another name of the cap
    differ = {name for name in set(theirs) & set(ours) if theirs[name] != ours[name]} - alike
    assert named["Which defaults differ?"] == differ


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
