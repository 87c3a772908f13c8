"""Several runs in one page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo_ext.cli.compare import compare_runs, curves_of, labels, mean_times
from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.main import main


def _run(folder: Path, shift: float, engine: bool = False) -> Path:
    folder.mkdir(parents=True)
    records = []
    for step in range(1, 9):
        record = {"step": step, "reward": step / 10 + shift, "completions/mean_length": 20.0 - step, "entropy": 2.0}
        record |= {"clip_ratio/region_mean": 0.01, "time/generation": 2.0, "time/forward": 0.5, "step_time": 3.0}
        if engine:
            record |= {"sampling/importance_sampling_ratio/mean": 1.0, "sampling/sampling_logp_difference/mean": 0.02}
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"steps": 8, "model": "<small> & fast"}), encoding="utf-8")
    return folder


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        source = given.get("src") or given.get("href")
        if source is not None and not source.startswith("data:"):
            self.outside.append(source)
        if tag == "img":
            self.pictures.append(given["alt"] or "")


def test_two_runs_make_one_page_that_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [_run(tmp_path / "a", 0.0), _run(tmp_path / "b", 0.2, engine=True)]
    page, picture = tmp_path / "both.html", tmp_path / "both.png"
    assert main(["plot", *map(str, runs), "--output", str(page)]) == 0
    assert capsys.readouterr().out.split() == [str(page), str(picture)]
    text = page.read_text(encoding="utf-8")
    found = _Page(text)
    assert not found.outside
    titles = " ".join(found.pictures)
    for word in ("reward", "length", "entropy", "clipped", "importance weight", "mismatch", "by phase"):
        assert word in titles
    assert "KL" not in titles  # neither run has one
    assert "&lt;small&gt; &amp; fast" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_curves_leave_out_what_is_not_a_number() -> None:
    records = [{"step": 1, "x": 1.0}, {"step": 2, "x": float("nan")}, {"x": 5.0}, {"step": 1, "x": 2.0}]
    assert curves_of({"run": records, "other": []}, ("missing", "x")) == {"run": ([1], [2.0])}


def test_the_phases_and_the_rest_make_the_step() -> None:
    records = [
        {"time/generation": 1.0, "step_time": 4.0},
        {"time/generation": 3.0, "time/forward": 1.0, "step_time": 4},
    ]
    assert mean_times(records) == {"time/generation": 2.0, "time/forward": 1.0, "other": 1.0}
    assert mean_times([{"step": 1}]) == {}


def test_labels_tell_runs_apart() -> None:
    assert labels(["x/one", "x/two"]) == ["one", "two"]
    assert labels(["x/run", "y/run"]) == ["x/run", "y/run"]
    with pytest.raises(SettingsError, match="named twice"):
        labels(["x/run", "x/run"])


def test_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n', encoding="utf-8")
    with pytest.raises(SettingsError, match="holds a metric"):
        compare_runs([str(tmp_path)], str(tmp_path / "x.html"))
