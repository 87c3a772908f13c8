"""The examples run as they stand; the trainer's on the toy model in place of the packaged one."""

from __future__ import annotations

import json
import math
import re
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


def _blocks(page: str) -> list[str]:
    text = (EXAMPLES.parent / page).read_text(encoding="utf-8")
    return re.findall(r"^```py(?:thon)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("example", "page"),
    [
        ("gsm8k_gpu", "README.md"),
        ("gsm8k_gpu", "docs/start/gpu.md"),
        ("minimal_loss", "docs/start/loss.md"),
        ("minimal_trainer", "docs/start/cpu.md"),
    ],
)
def test_pages_show_the_examples(example: str, page: str) -> None:
    lines = _code((EXAMPLES / f"{example}.py").read_text(encoding="utf-8"))
    # A script may also fix the seed and print.
    assert _code(_blocks(page)[0]) == [x for x in lines if "manual_seed" not in x and not x.startswith("print(")]


def test_readme_loss() -> None:
    names: dict[str, Any] = {}
    exec(_blocks("README.md")[1], names)
    assert names["logits"].grad.norm() > 0


def test_gsm8k_gpu(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a toy model, four rows and a CPU in place of Qwen2.5, GSM8K and a GPU."""
    import datasets

    from grpo_ext.trainer import trainer as module

    questions = [{"question": f"What is {n} + 2?", "answer": f"Add.\n#### {n + 2}"} for n in range(4)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(questions))
    real_config, real_load = module.GRPOConfig, module.load_model
    small = {"max_steps": 2, "max_completion_length": 4, "use_cpu": True, "report_to": "none"}
    monkeypatch.setattr(
        "grpo_ext.trainer.GRPOConfig", lambda folder, **fields: real_config(folder, **{**fields, **small})
    )
    asked: list[str] = []
    monkeypatch.setattr(module, "load_model", lambda name, args: asked.append(name) or real_load(str(toy_model), args))
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: load_model(str(toy_model))[1])
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / "gsm8k_gpu.py"))
    assert asked == ["Qwen/Qwen2.5-0.5B-Instruct"]
    answers = [[{"content": f"Thinking of 7, so the answer is {n}."}] for n in (42, 41)]
    assert names["correct"](answers, answer=["#### 42", "#### 42"]) == [1.0, 0.0]
    lines = (tmp_path / "runs/gsm8k/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("reward" in json.loads(line) for line in lines) == 2


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


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_plain_loop(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    """fp32 on the CPU: both loops take the same first step."""
    main = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"]
    results = main(["--trained", trained, "--batches", "2", "--rows", "3", "--steps", "1"])
    plain, faster = results["plain"], results["modules.attach"]
    assert faster["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert faster["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4) != 0
    printed = capsys.readouterr().out
    assert ("LoRA layers: fused, 14 of 14 layers" in printed) == (trained == "lora")
    assert "RMSNorm layers: fused, 9 of 9 layers\nhead: fused head\n" in printed
    assert "times as fast" in printed
