"""vLLM and the trainer on one GPU: weights, adapter, sleep levels, memory share. Skipped without a GPU or vLLM.

Needs vLLM 0.24 or later in the same environment: python -m pytest -x -s tests/cuda/test_vllm_gpu.py
Starts six engines and two servers one after the other, without compilation, each in its own process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grpo_ext.generation.vllm.engine import close_quietly
from grpo_ext.generation.vllm.weights import write_config, write_weights
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install vllm"),
]

VOCABULARY = 2048
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
ROWS = [{"prompt": " ".join(f"w{3 + (i * 7 + j) % (VOCABULARY - 3)}" for j in range(20 + i))} for i in range(8)]


def build() -> tuple[Any, PreTrainedTokenizerFast]:
    words = ["<eos>", "<pad>", "<unk>", *[f"w{i}" for i in range(3, VOCABULARY)]]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16), tokenizer


def even_share(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make(folder: Path, peft_config: Any = None, **changes: Any) -> GRPOTrainer:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 32,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "bf16": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_vllm": True,
        "vllm_gpu_memory_utilization": 0.05,
        "vllm_enforce_eager": True,
    }
    model, tokenizer = build()
    args = GRPOConfig(**(fields | changes))
    return GRPOTrainer(model, even_share, args, ROWS, processing_class=tokenizer, peft_config=peft_config)


def in_a_process_of_its_own(work: Callable[..., Any], *args: Any) -> Any:
    """vLLM's sleep mode takes one engine per process, and only the end of it gives everything back."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def train_and_measure(trainer: GRPOTrainer, engine: Any) -> tuple[list[float], float]:
    """The check's figures of the steps, and how far the weights have moved, in nats."""
    before = engine.check.trainer_rows(trainer.model)
    trainer.train()
    figures = [line["vllm/weight_check"] for line in trainer.state.log_history if "loss" in line]
    return figures, float((engine.check.trainer_rows(trainer.model) - before).abs().mean())


def follow(folder: Path, peft_config: Any, mode: str | None, sleep_level: int) -> tuple[list[float], float, bool]:
    """The check's figures of four steps, how far the weights have moved, in nats, and whether they were just copied."""
    trainer = make(
        folder,
        peft_config,
        vllm_lora_mode=mode,
        vllm_enable_sleep_mode=sleep_level > 0,
        vllm_sleep_level=max(sleep_level, 1),
        score_while_generating=sleep_level == 0,
        learning_rate=1e-3 if peft_config is None else 3e-2,
    )
    engine: Any = trainer.rollouts.engine
    try:
        return *train_and_measure(trainer, engine), engine.client._loader.placement is not None
    finally:
        close_quietly(engine)


# Every way of handing over, with every level that does something of its own to it: 2 drops the weights, which a
# hot-loaded adapter does not bring back.
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("peft_config", "mode", "sleep_level"),
    [
        (None, None, 0),
        (None, None, 2),
        (LORA, "merged", 1),
        (LORA, "adapter", 0),
        (LORA, "adapter", 1),
    ],
    ids=lambda value: None if isinstance(value, int) else "lora" if value is LORA else str(value),
)
def test_engine_follows_the_training(tmp_path: Path, peft_config: Any, mode: str | None, sleep_level: int) -> None:
    """bf16: the check's figure stays at rounding while the weights move by more than that."""
    figures, moved, copied = in_a_process_of_its_own(follow, tmp_path, peft_config, mode, sleep_level)
    print(f"moved {moved:.3f} nats, check {figures}")
    assert len(figures) == 4
    assert copied == (mode != "adapter" and sleep_level < 2)
    assert max(figures) < 0.1, figures
    assert moved > 3 * max(figures)


def take_and_sleep(folder: Path) -> tuple[float, bool, int]:
    """Share of the GPU's memory that the engine took, whether it sleeps after a step, bytes that it then gave back."""
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    trainer = make(
        folder, vllm_enable_sleep_mode=True, vllm_sleep_level=2, max_steps=1, vllm_gpu_memory_utilization=0.1
    )
    engine: Any = trainer.rollouts.engine
    try:
        free_awake = torch.cuda.mem_get_info()[0]
        trainer.train()
        torch.cuda.empty_cache()
        return (free_before - free_awake) / total, engine._asleep, torch.cuda.mem_get_info()[0] - free_awake
    finally:
        close_quietly(engine)


@pytest.mark.timeout(120)
def test_share_of_the_memory_and_sleep(tmp_path: Path) -> None:
    """vLLM takes the share it is given, less what was in use; asleep it gives nearly all of it back."""
    taken, asleep, freed = in_a_process_of_its_own(take_and_sleep, tmp_path)
    print(f"took {taken:.3f} of the memory, freed {freed / 2**30:.1f} GiB")
    assert asleep
    assert taken < 0.13
    assert freed > 2**30


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[int, Path]]:
    """Port and log of a server, started by the documented command with sleep mode and a tenth of the GPU's memory."""
    folder.mkdir()
    model, tokenizer = build()
    write_config(model, folder, tokenizer)
    write_weights(iter(model.state_dict().items()), folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    command = f"-m vllm.entrypoints.openai.api_server --model {folder} --host 127.0.0.1 --port {port} --dtype bfloat16"
    command += " --logprobs-mode processed_logprobs --generation-config vllm"
    command += " --max-model-len 1024 --gpu-memory-utilization 0.1 --enforce-eager --enable-sleep-mode"
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command.split(), *options],
            env=os.environ | environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield port, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("options", "runs"),
    [
        (("--enable-lora", "--max-lora-rank", "16"), [(LORA, "adapter", 1)]),
        ((), [(LORA, "merged", 1), (None, None, 2)]),
    ],
    ids=["lora", "weights"],
)
def test_server_follows_the_training_and_sleeps(tmp_path: Path, options: tuple[str, ...], runs: list[Any]) -> None:
    with serving(tmp_path / "served", *options) as (port, log):
        for peft_config, mode, level in runs:
            try:
                follow_server(tmp_path / f"{mode}{level}", port, peft_config, mode, level)
            except BaseException:
                print(log.read_text()[-5000:])
                raise


def follow_server(folder: Path, port: int, peft_config: Any, mode: str | None, sleep_level: int) -> None:
    trainer = make(
        folder,
        peft_config,
        vllm_mode="server",
        vllm_server_port=port,
        vllm_server_timeout=200,
        vllm_lora_mode=mode,
        vllm_enable_sleep_mode=True,
        vllm_sleep_level=sleep_level,
        learning_rate=1e-3 if peft_config is None else 3e-2,
    )
    engine: Any = trainer.rollouts.engine
    try:
        figures, moved = train_and_measure(trainer, engine)
        print(f"server, {mode}, level {sleep_level}: moved {moved:.3f} nats, check {figures}")
        assert engine._asleep
        assert engine.client._is_sleeping()
        assert len(figures) == 4
        assert max(figures) < 0.1, figures
        assert moved > 3 * max(figures)
    finally:
        close_quietly(engine)
