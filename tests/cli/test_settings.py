"""Run files, the command line over them, and the errors for what is written wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.main import main
from grpo_ext.cli.settings import LoraSettings, parse_overrides, read_run, read_settings
from grpo_ext.trainer import GRPOConfig

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "smollm2_arithmetic.yaml")


def test_words_for_truth_values_reach_the_trainer(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: products\nlog_completions: yes\nmask_truncated_completions: 'no'\n")
    words = "--beta=0.1 --shuffle_dataset=false --use_fused_head=false --max_completion_length=7.0"
    fields = read_settings(str(path), words.split(" ")).trainer
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **fields)
    assert (config.beta, config.shuffle_dataset, config.use_fused_head) == (0.1, False, False)
    assert (config.log_completions, config.mask_truncated_completions, config.max_completion_length) == (True, False, 7)


def test_the_example_says_what_the_readme_says() -> None:
    settings = read_settings(EXAMPLE)
    assert settings.model == "smollm2-135m-instruct"
    assert settings.dtype == "auto"
    assert (settings.dataset.task, settings.dataset.heldout) == ("products", 24)
    assert settings.lora == LoraSettings(r=16, alpha=32, dropout=0.0, target_modules="all-linear")
    trainer = settings.trainer
    assert trainer["learning_rate"] == 2e-4
    assert trainer["lr_scheduler_type"] == "constant"
    assert trainer["max_completion_length"] == 24
    assert (trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]) == 32
    assert trainer["num_generations"] == 8


def test_overrides_are_typed_and_win(write_yaml: Any, toy_settings: dict[str, Any]) -> None:
    path = write_yaml(toy_settings)
    settings = read_settings(
        path,
        [
            "--learning_rate",
            "2e-4",
            "--max-steps=7",
            "--loss_type",
            "grpo",
            "--epsilon_high",
            "null",
            "--lora.r",
            "4",
            "--dataset.task=chain_sum",
            "--bf16",
            "--seed",
            "-1",
            "--model",
            "123",
        ],
    )
    assert settings.trainer["learning_rate"] == 2e-4
    assert settings.trainer["max_steps"] == 7
    assert settings.trainer["loss_type"] == "grpo"
    assert settings.trainer["epsilon_high"] is None
    assert settings.trainer["bf16"] is True
    assert settings.seed == -1
    assert settings.model == "123"
    assert settings.lora is not None
    assert settings.lora.r == 4
    assert (settings.dataset.task, settings.dataset.heldout) == ("chain_sum", 4)


def test_parse_overrides_forms() -> None:
    assert parse_overrides(["--a", "1", "--b=x=y", "--c", "--d", "-5", "--e="]) == {
        "a": "1",
        "b": "x=y",
        "c": "true",
        "d": "-5",
        "e": "",
    }
    with pytest.raises(SettingsError, match="unexpected argument 'stray'"):
        parse_overrides(["--a", "1", "stray"])


def test_a_word_for_a_dataset(write_yaml: Any) -> None:
    settings = read_settings(write_yaml({"model": "m", "dataset": "chain_sum"}))
    assert settings.dataset.task == "chain_sum"
    settings = read_settings(write_yaml({"model": "m", "dataset": "chain_sum"}), ["--dataset.terms", "3"])
    assert (settings.dataset.task, settings.dataset.terms) == ("chain_sum", 3)
    settings = read_settings(write_yaml({"model": "m", "dataset": "rows.jsonl"}))
    assert settings.dataset.path == "rows.jsonl"


@pytest.mark.parametrize(("value", "expected"), [("null", None), ("false", None), ("true", LoraSettings())])
def test_lora_can_be_switched(write_yaml: Any, toy_settings: dict[str, Any], value: str, expected: Any) -> None:
    assert read_settings(write_yaml(toy_settings), ["--lora", value]).lora == expected


def test_a_run_folder_reads_back_as_the_same_settings(
    tmp_path: Path, write_yaml: Any, toy_settings: dict[str, Any]
) -> None:
    settings = read_settings(write_yaml(toy_settings), ["--scale_rewards", "none", "--report_to", "none"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()), encoding="utf-8")
    assert read_run(str(tmp_path)) == settings


@pytest.mark.parametrize(
    ("extra", "arguments", "message"),
    [
        ({"learning_rat": 1}, [], "unknown field 'learning_rat' in .*: did you mean 'learning_rate'?"),
        (
            {},
            ["--num_generation", "4"],
            "unknown field 'num_generation' in the command line.*'num_generations'",
        ),
        ({}, ["--lora.rank", "4"], "unknown field 'lora.rank' in the command line"),
        ({}, ["--dataset.tsk=x"], "unknown field 'dataset.tsk'.*did you mean 'dataset.task'"),
        ({"lora": {"alhpa": 1}}, [], "unknown field 'alhpa' under 'lora'.*did you mean 'alpha'"),
        ({"max_steps": "many"}, [], "max_steps: 'many' is not a whole number"),
        ({}, ["--bf16", "perhaps"], "bf16: 'perhaps' is not true or false"),
        ({"dataset": {"task": "product"}}, [], "dataset.task must be one of .*did you mean 'products'"),
        ({"dataset": {"heldout": 3}}, [], "dataset needs either a task or a path"),
        (
            {"dataset": {"task": "products", "digits": "one"}},
            [],
            "dataset.digits: 'one' is not a whole number",
        ),
        ({"dataset": [1]}, [], "dataset: .* is neither a name nor a mapping"),
        ({"dataset": None}, [], "needs a 'dataset' field"),
        ({"model": None}, [], "needs a 'model' field"),
        ({"lora": 3}, [], "lora: 3 is neither a mapping nor null"),
        ({"lora": {"r": 0}}, [], "lora.r must be at least 1, got 0"),
        ({"heldout_samples": 0}, [], "heldout_samples must be at least 1, got 0"),
    ],
)
def test_wrong_settings_say_what_is_wrong(
    write_yaml: Any, toy_settings: dict[str, Any], extra: dict, arguments: list, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(write_yaml({**toy_settings, **extra}), arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [1\n", "is not valid YAML"),
        ("!!python/name:os.system x\n", "YAML"),
    ],
)
def test_files_that_are_no_run_files(write_yaml: Any, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(write_yaml(text))


def test_main_prints_the_error_and_returns_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert "grpo-ext: error: cannot read" in capsys.readouterr().err
    assert main(["train", EXAMPLE, "--learning_rates", "1"]) == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err
    assert main(["eval", str(tmp_path)]) == 2
    assert main(["plot", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["eval", "x", "--samples", "0"]])
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    assert "grpo-ext" in capsys.readouterr().err
