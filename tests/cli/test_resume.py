"""`grpo-ext train`: a run that stops early and is resumed, and what a run folder refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo_ext.cli.main import main
from grpo_ext.trainer import run_lock


@pytest.fixture
def stopping(tmp_path: Path, toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of three steps whose reward stops it in the second one, as STOP_BY says."""
    (tmp_path / "reward.py").write_text(
        "import os, signal\n"
        "calls = []\n"
        "def reward(completions):\n"
        "    calls.append(1)\n"
        "    how = os.environ.get('STOP_BY') if len(calls) == 2 else None\n"
        "    if how == 'error':\n"
        "        raise ValueError('no answer')\n"
        "    if how == 'ctrl-c':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(len(str(c)) % 5) for c in completions]\n"
    )
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": f"{n} + 1 ="}) + "\n" for n in range(6)))
    return toy_settings | {
        "dataset": {"path": str(dataset), "heldout": 0},
        "reward_funcs": [f"{tmp_path / 'reward.py'}:reward"],
        "max_steps": 3,
        "report_to": "none",
    }


@pytest.mark.parametrize("how", ["error", "ctrl-c"])
def test_a_stopped_run_ends_with_the_command_that_resumes_it(
    how: str,
    stopping: dict[str, Any],
    tmp_path: Path,
    write_yaml: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_yaml(stopping)
    assert main(["train", config, "--output_dir", str(tmp_path / "whole")]) == 0
    monkeypatch.setenv("STOP_BY", how)
    folder = tmp_path / "a run"
    if how == "error":
        with pytest.raises(Exception, match="no answer") as error:
            main(["train", config, "--output_dir", str(folder)])
        last = error.value.__notes__[-1]
    else:
        assert main(["train", config, "--output_dir", str(folder)]) == 130
        last = capsys.readouterr().err.splitlines()[-1]
    command = f"grpo-ext train '{folder}/config.yaml' --resume_from_checkpoint true"
    assert last == f"The state after step 1 is saved in {folder}/checkpoint-1: resume with {command}"
    monkeypatch.delenv("STOP_BY")
    assert main(shlex.split(command)[1:]) == 0
    mine, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, tmp_path / "whole"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_a_folder_refuses(
    stopping: dict[str, Any],
    toy_model: Path,
    tmp_path: Path,
    write_yaml: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    config = write_yaml(stopping)
    arguments = ["train", config, "--output_dir", str(folder)]
    assert main([*arguments, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]) == 0
    before = (folder / "config.yaml").read_bytes()
    resume = [*arguments, "--resume_from_checkpoint", "true"]
    other = tmp_path / "other"
    other.symlink_to(toy_model)
    rows = tmp_path / "rows2.jsonl"
    rows.write_text('{"prompt": "1"}\n')
    for field, value, message in (
        ("model", "smollm2-135m-instruct", "model was '.*' and is 'smollm2-135m-instruct'"),
        ("dataset.path", str(rows), "dataset was .*rows.jsonl.* and is .*rows2.jsonl"),
        ("lora.r", "4", "lora was .*'r': 2.* and is .*'r': 4"),
        ("seed", "4", "seed was 3 and is 4"),
    ):
        capsys.readouterr()
        assert main([*resume, f"--{field}", value]) == 2
        assert re.search(rf"{folder} contains another run: {message}", capsys.readouterr().err), field
        assert (folder / "config.yaml").read_bytes() == before

    # Another run holds the folder: as another process would see it.
    with run_lock.sole_run(folder), monkeypatch.context() as patch:
        patch.setattr(run_lock, "_held", {})
        assert main(resume) == 2
    assert "is in use by another run (process " in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == before

    newest = folder / "checkpoint-2"
    (newest / "optimizer.pt").unlink()
    assert main([*arguments, "--resume_from_checkpoint", str(newest)]) == 2
    assert f"{newest}/optimizer.pt is missing" in capsys.readouterr().err
    # The same model under another name is the same model, and the length of a run may change.
    assert main([*resume, "--model", str(other), "--max_steps", "3"]) == 0
    assert f"resuming from {folder}/checkpoint-1: {newest}/optimizer.pt is missing" in capsys.readouterr().out
