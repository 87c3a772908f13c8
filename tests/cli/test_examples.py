"""The examples run as they stand; the trainer's on the toy model in place of the packaged one."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from grpo_ext.tasks import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def _code(text: str) -> list[str]:
    """The lines that do something: no blank ones, no comments, no docstring."""
    lines = (line.split("  #")[0].rstrip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(('"""', "#"))]


def test_readme_shows_the_examples() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    blocks = [_code(block.split("```")[0]) for block in readme.split("```python\n")[1:]]
    loss, trainer = (
        _code((EXAMPLES / f"minimal_{name}.py").read_text(encoding="utf-8")) for name in ("loss", "trainer")
    )
    assert blocks[1] == trainer
    # The script also fixes the seed and prints.
    assert blocks[0] == [line for line in loss if "manual_seed" not in line and not line.startswith("print(")]


def test_minimal_loss(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "minimal_loss.py"))
    assert math.isfinite(names["output"].loss.item())
    gradient = names["logits"].grad
    assert gradient.norm() > 0
    assert gradient[1, 3:].abs().max() == 0  # masked tokens
    assert capsys.readouterr().out.startswith("loss ")


def test_minimal_trainer(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str]] = []

    def load_toy(name: str, dtype: str) -> Any:
        loaded.append((name, dtype))
        return load_model(str(toy_model))

    monkeypatch.setattr("grpo_ext.tasks.load_model", load_toy)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "minimal_trainer.py"))
    assert loaded == [("smollm2-135m-instruct", "auto")]
    lines = (tmp_path / "runs/minimal/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [record["reward"] for record in map(json.loads, lines) if "reward" in record]
    assert len(rewards) == 5
    assert all(reward < 0 for reward in rewards)
