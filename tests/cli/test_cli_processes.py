"""`grpo-ext train` started by torchrun on two processes: one run, whose files are written once."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo_ext.cli.main import main
from grpo_ext.cli.settings import read_settings
from grpo_ext.trainer import GRPOConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
REWARD = """
def digits(completions):
    return [sum(c in "0123456789" for c in reply[0]["content"]) / 6 for reply in completions]
"""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Path:
    """The toy model's tokenizer and another architecture."""
    folder = tmp_path_factory.mktemp("qwen")
    shutil.copytree(toy_model, folder, dirs_exist_ok=True)
    llama = AutoConfig.from_pretrained(toy_model).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id", "bos_token_id")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**{name: llama[name] for name in names})).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, qwen: Path, toy_settings: dict[str, Any], write_yaml: Any) -> str:
    """Two steps with rewards that differ."""
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    changes = {"model": str(qwen), "reward_funcs": [f"{tmp_path / 'mine.py'}:digits"], "learning_rate": "3e-2"}
    return write_yaml({k: v for k, v in (toy_settings | changes).items() if k != "use_cpu"})


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def on_two(folder: Path, *runs: tuple[str, list[str]], launch: list[str] = TORCHRUN, **environment: str) -> str:
    """Run the command on two processes, once for each kind and arguments; what they printed."""
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    worker = Path(__file__).with_name("cli_processes_worker.py")
    done = subprocess.run(
        [sys.executable, *launch, str(worker), str(folder / "runs.json")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def check(run: Path, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One set of files, the same answers before training as in a run of one process, and the trained model's after."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["processes"], summary["steps"]) == (2, 2)
    assert summary["step_seconds"] > 0
    assert len(list((run / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert (run / "reward.png").stat().st_size > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]
    for step in (1, 2):
        made = (run / "completions" / f"step-00000{step}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(made) == 16  # of both processes
    before, after = ((run / f"heldout_{name}.jsonl").read_text(encoding="utf-8") for name in ("before", "after"))
    assert before == (one / "heldout_before.jsonl").read_text(encoding="utf-8")
    mean = sum(json.loads(line)["reward"] for line in after.splitlines()) / 8
    assert summary["heldout_reward_after"] == pytest.approx(mean, abs=1e-4)
    of_one = json.loads((one / "summary.json").read_text(encoding="utf-8"))
    for name in ("heldout_reward_before", "best_constant_reward", "heldout_questions"):
        assert summary[name] == of_one[name], name
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 28
    assert all(weight.abs().max() > 0 for weight in weights.values())
    # One process finds in the folder what the two left.
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0, capsys.readouterr().err
    assert (run / "eval.jsonl").read_text(encoding="utf-8") == after
    assert after != before


def check_ddp_and_fsdp2(folder: Path, config: str, capsys: pytest.CaptureFixture[str], **environment: str) -> None:
    sharded = ["--fsdp", "true", "--fsdp_config", str(EXAMPLES / "fsdp2.json"), "--output_dir", "runs/sharded"]
    said = on_two(folder, ("ddp", ["train", config]), ("fsdp2", ["train", config, *sharded]), **environment)
    # Without output_dir the folder has a number where its name is taken: the processes must not take each other's.
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["sharded", "toy"]
    for line in ("run folder", "held-out reward before training", "held-out reward after training", " 2 steps, "):
        assert said.count(line) == 2, f"{line}: once for each run\n{said}"
    assert said.count("ddp: in pieces False") == said.count("fsdp2: in pieces True") == 2  # the second process asks
    for name in ("toy", "sharded"):
        check(folder / "runs" / name, folder / "one", capsys)


def test_one_run_of_two_processes(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", config, "--output_dir", str(tmp_path / "one"), "--use_cpu", "true"]) == 0
    check_ddp_and_fsdp2(tmp_path, config, capsys, CUDA_VISIBLE_DEVICES="")


def test_started_by_accelerate(tmp_path: Path, config: str) -> None:
    """Under it processes have ended by SIGABRT: gloo's threads still had tensors to give back (`exit_barrier`). The
    long switch interval made that 11 of 20 runs."""
    said = on_two(
        tmp_path, ("ddp", ["train", config]), launch=ACCELERATE, CUDA_VISIBLE_DEVICES="", SWITCH_SECONDS="1000"
    )
    assert said.count("run folder") == 1
    summary = json.loads((tmp_path / "runs" / "toy" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["processes"], summary["steps"]) == (2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(300)
def test_one_run_of_two_gpus(tmp_path: Path, config: str, write_yaml: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As on the CPU, with questions of its own: reasoning-gym need not be there."""
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} * {b}?"}], "answer": str(a * b)}
        for a in range(2, 10)
        for b in range(2, 10)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    config = write_yaml(settings | {"dataset": {"path": str(questions), "heldout": 4}})
    train = [sys.executable, "-m", "grpo_ext.cli.main", "train", config, "--output_dir", str(tmp_path / "one")]
    subprocess.run(train, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"})
    check_ddp_and_fsdp2(tmp_path, config, capsys)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed: make peers installs it beside .venv")
def test_weights_in_pieces_before_training(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", config, "--output_dir", str(tmp_path / "one"), "--use_cpu", "true"]) == 0
    values = json.loads((EXAMPLES / "zero3.json").read_text(encoding="utf-8"))
    # Its own Adam would have to be compiled.
    values |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    (tmp_path / "zero3.json").write_text(json.dumps(values), encoding="utf-8")
    arguments = ["train", config, "--deepspeed", str(tmp_path / "zero3.json")]
    said = on_two(tmp_path, ("zero3", arguments), CUDA_VISIBLE_DEVICES="")
    assert said.count("held-out reward before training") == said.count("held-out reward after training") == 1
    assert said.count("zero3: in pieces True") == 2
    check(tmp_path / "runs" / "toy", tmp_path / "one", capsys)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2", "phi3", "qwen3_moe"])
def test_fsdp2_finds_the_layers_of_any_architecture(architecture: str, write_yaml: Any) -> None:
    arguments = ["--model", "m", "--dataset", "products", "--fsdp", "true", "--fsdp_config"]
    fields = read_settings(write_yaml({}), [*arguments, str(EXAMPLES / "fsdp2.json")]).trainer
    plugin = FullyShardedDataParallelPlugin(**GRPOConfig(output_dir="unused", use_cpu=True, **fields).fsdp_plugin_args)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, num_hidden_layers=2))
    divided = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert divided is not None
    assert sum(divided(module) for module in model.modules()) == 2


def test_processes_that_would_train_alone_are_an_error(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)  # then nobody turns to the CPU by himself
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["train", config]) == 2
    assert "2 processes were started, but each would train its own copy" in capsys.readouterr().err
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert main(["train", config, "--deepspeed", str(EXAMPLES / "zero3.json")]) == 2
    assert "deepspeed needs GPUs" in capsys.readouterr().err


def test_zero3_is_a_config_that_leaves_the_numbers_to_the_run() -> None:
    values = json.loads((EXAMPLES / "zero3.json").read_text(encoding="utf-8"))
    assert values["zero_optimization"]["stage"] == 3
    # Else save_model leaves no weights of a run without LoRA.
    assert values["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    numbers = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert all(values[name] == "auto" for name in numbers)
