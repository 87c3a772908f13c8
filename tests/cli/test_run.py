"""`train`, `eval`, `plot` and `info` from the command line to the files, on a model of two tiny layers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.main import main
from grpo_ext.cli.prepare import run_folder
from grpo_ext.cli.settings import read_settings
from grpo_ext.cli.train import final_line, process_seconds, train_command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_settings: dict[str, Any]) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("run") / "out"
    config = folder.parent / "toy.yaml"
    config.write_text(yaml.safe_dump(toy_settings), encoding="utf-8")
    assert main(["train", str(config), "--output_dir", str(folder), "--save_strategy=steps", "--save_steps", "1"]) == 0
    return folder


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_run_folder_holds_what_the_readme_lists(run: Path) -> None:
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.yaml",
        "reward.png",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "completions").glob("*.jsonl"))
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert [record["step"] for record in _lines(run / "metrics.jsonl") if "reward" in record] == [1, 2]


def test_summary(run: Path) -> None:
    summary = _json(run / "summary.json")
    assert summary["steps"] == 2
    assert summary["seed"] == 3
    assert summary["kernel_calls"] >= 2
    assert summary["loss_path"] == "fused head"
    assert summary["dtype"] == "float32"
    assert summary["backend"] in ("cpu-avx512", "cpu-avx2", "cpu-portable")
    assert 0 <= summary["heldout_reward_before"] <= 1
    assert 0 <= summary["heldout_reward_after"] <= 1
    assert 0 < summary["best_constant_reward"] <= 1
    assert (summary["heldout_questions"], summary["heldout_samples"]) == (4, 2)
    assert summary["seconds"] >= summary["train_seconds"] > 0
    assert summary["step_seconds"] > 0
    assert {"python", "torch", "transformers", "peft"} <= set(summary["versions"])


def test_heldout_answers_are_kept_and_not_trained_on(run: Path) -> None:
    before, after = (_lines(run / f"heldout_{name}.jsonl") for name in ("before", "after"))
    assert len(before) == len(after) == 8
    held = {sample["prompt"][0]["content"] for sample in before}
    assert len(held) == 4
    trained = "".join(path.read_text(encoding="utf-8") for path in (run / "completions").glob("*.jsonl"))
    assert trained
    assert not any(question in trained for question in held)


def test_config_of_the_run_is_complete(run: Path, toy_settings: dict[str, Any]) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert values["output_dir"] == str(run)
    assert values["learning_rate"] == 1e-3
    assert values["dataset"]["task"] == "products"
    assert values["model"] == toy_settings["model"]


def test_eval_measures_the_adapter_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    report = _json(run / "eval.json")
    summary = _json(run / "summary.json")
    assert report["heldout_reward"] == summary["heldout_reward_after"]
    assert report["best_constant_reward"] == summary["best_constant_reward"]
    assert _lines(run / "eval.jsonl") == _lines(run / "heldout_after.jsonl")
    assert main(["eval", str(run), "--samples", "3", "--seed", "9"]) == 0
    report = _json(run / "eval.json")
    assert (report["samples"], report["seed"], report["questions"]) == (3, 9, 4)
    assert len(_lines(run / "eval.jsonl")) == 12
    assert "held-out reward" in capsys.readouterr().out


def test_plot_again(run: Path) -> None:
    (run / "reward.png").unlink()
    assert main(["plot", str(run)]) == 0
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_overwritten_but_continues(
    run: Path, write_yaml: Any, toy_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_yaml(toy_settings)
    assert main(["train", config, "--output_dir", str(run)]) == 2
    assert "already contains a run" in capsys.readouterr().err
    before = _json(run / "summary.json")
    arguments = ["--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "3"]
    assert main(["train", config, *arguments]) == 0
    summary = _json(run / "summary.json")
    assert summary["steps"] == 3
    assert summary["heldout_reward_before"] == before["heldout_reward_before"]
    assert [record["step"] for record in _lines(run / "metrics.jsonl") if "reward" in record] == [1, 2, 3]


def test_dtype_auto_is_said_recorded_and_kept_when_continuing(
    tmp_path: Path,
    write_yaml: Any,
    toy_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    config = write_yaml(toy_settings | {"dtype": "auto", "output_dir": str(folder), "max_steps": 1})
    arguments = ["--save_strategy", "steps", "--save_steps", "1", "--heldout_samples", "1"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert main(["train", config, *arguments]) == 0
    line = r"^dtype auto: bfloat16 \(this processor \(.*\) multiplies bfloat16 in hardware\)$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)
    assert _json(folder / "summary.json")["dtype"] == "bfloat16"
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    # On another machine the same run would have begun with float32.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert main(["train", config, *arguments, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    assert "dtype auto: bfloat16 (as in the resumed run)" in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert main(["eval", str(folder)]) == 0
    elsewhere = tmp_path / "elsewhere"
    summary = train_command(config, ["--output_dir", str(elsewhere), "--heldout_samples", "1"])
    assert "multiplies bfloat16 in software" in capsys.readouterr().out
    assert summary["dtype"] == "float32"


def test_continuing_needs_a_checkpoint(
    tmp_path: Path, write_yaml: Any, toy_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_yaml(toy_settings)
    arguments = ["--output_dir", str(tmp_path / "nothing"), "--resume_from_checkpoint", "true"]
    assert main(["train", config, *arguments]) == 2
    assert "no checkpoint to continue from" in capsys.readouterr().err


def test_all_weights_and_no_heldout(tmp_path: Path, write_yaml: Any, toy_settings: dict[str, Any]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "answer": n + 1}) + "\n" for n in range(5)))
    reward = tmp_path / "mine.py"
    reward.write_text("def length(completions):\n    return [float(len(text)) for text in completions]\n")
    settings = toy_settings | {
        "dataset": {"path": str(rows), "heldout": 0},
        "reward_funcs": [f"{reward}:length"],
        "lora": None,
        "max_steps": 1,
        "output_dir": str(tmp_path / "out"),
    }
    summary = train_command(write_yaml(settings), ["--report_to", "none"])
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert not list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert summary["heldout_reward_before"] is None
    assert summary["best_constant_reward"] is None
    assert final_line(summary).startswith("trained without held-out questions: 1 steps")
    assert main(["eval", str(tmp_path / "out")]) == 2


def test_folders_are_numbered(
    tmp_path: Path, write_yaml: Any, toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_yaml(toy_settings, "night.yaml")
    settings = read_settings(config)
    assert run_folder(settings, config, False) == os.path.join("runs", "night")
    os.makedirs("runs/night")
    assert run_folder(settings, config, False) == os.path.join("runs", "night-2")
    with pytest.raises(SettingsError, match="resume_from_checkpoint needs output_dir"):
        run_folder(settings, config, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_generations", "1"], "num_generations"),
        (["--loss_type", "gpro"], "loss_type must be one of"),
        (["--model", "smollm2-135m-instrct"], "Did you mean 'smollm2-135m-instruct'"),
        (["--dtype", "float8"], "dtype must be one of"),
        (["--dataset.heldout", "97"], "heldout must be between 1 and 96"),
        (["--reward_funcs", "numbr"], "did you mean 'number'?"),
    ],
)
def test_wrong_values_leave_no_folder(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    write_yaml: Any,
    toy_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["train", write_yaml(toy_settings), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_info_prints_the_build_and_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("cpu_isa", "cuda_architectures", "version of torch", "version of transformers", "gpu", "dtype auto"):
        assert word in printed


def test_the_command_runs_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grpo_ext.cli.main", "train", "/nowhere.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "grpo-ext: error: cannot read /nowhere.yaml: No such file or directory"


@pytest.mark.parametrize(("given", "taken"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_openmp_is_told_to_sleep_before_torch_loads_it(given: str | None, taken: str) -> None:
    command = "from importlib.metadata import distribution\n" + (
        "found = distribution('grpo_ext').entry_points.select(group='console_scripts', name='grpo-ext')\n"
        "found['grpo-ext'].load()(['info'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # libgomp prints this while it is loaded: it has read the variable by then.
    assert f"OMP_WAIT_POLICY = '{taken}'" in done.stderr
    assert given or "PASSIVE" in done.stdout


def test_process_seconds_counts_from_the_start_of_the_process() -> None:
    assert 0.1 < process_seconds() < 24 * 3600
