"""The examples of the integrations run unchanged; TRL's with a tiny model instead of the packaged one."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
from trl_runs import tiny_model, tiny_tokenizer

import grpo_ext.integrations.trl as t

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("trl_patch", "liger_dropin", "transformers_loss", "verl_functions", "unsloth_patch")


@pytest.mark.parametrize("name", ["liger_dropin", "transformers_loss", "verl_functions"])
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert names["loss"].isfinite()
    assert capsys.readouterr().out.startswith("loss ")


def test_trl_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("grpo_ext.tasks.load_model", lambda _: (tiny_model(), tiny_tokenizer()))
    monkeypatch.chdir(tmp_path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(EXAMPLES / "trl_patch.py"))
        assert t.status().losses_served == 2
        assert "losses served: 2" in capsys.readouterr().out
    finally:
        t.unpatch()


def test_unsloth_example_says_what_it_needs() -> None:
    """It runs where Unsloth can be imported, on a GPU; elsewhere it stops at that import."""
    code = (EXAMPLES / "unsloth_patch.py").read_text(encoding="utf-8")
    compile(code, "unsloth_patch.py", "exec")
    loaded: dict[str, Any] = {}
    try:
        import unsloth  # noqa: F401
    except (ImportError, NotImplementedError):
        with pytest.raises((ImportError, NotImplementedError)):
            runpy.run_path(str(EXAMPLES / "unsloth_patch.py"))
    else:
        loaded = runpy.run_path(str(EXAMPLES / "unsloth_patch.py"))
        assert loaded["u"].status()["patched"]


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line and not line.startswith(("import", "from", '"""', "#"))]) <= 10
