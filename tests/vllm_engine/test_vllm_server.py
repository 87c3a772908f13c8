"""`vllm_mode="server"`: adapters and weights pushed into a real server over its own interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from vllm_toys import CONTEXT, EOS, PAD, VOCABULARY, build_model, build_tokenizer, needs_vllm

from grpo_ext.generation.engine import SamplingParams, TransformersEngine
from grpo_ext.generation.vllm import EngineError
from grpo_ext.generation.vllm.server import ServerClient
from grpo_ext.generation.vllm.weights import write_config, write_weights
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

ROWS = [{"prompt": " ".join(f"w{3 + (i * 7 + j) % (VOCABULARY - 3)}" for j in range(4 + i))} for i in range(6)]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """The documented command, on a free port of this machine; ``vllm serve`` is this module's other name."""
    folder = tmp_path_factory.mktemp("served")
    write_config(build_model(), folder, build_tokenizer())
    write_weights(iter(build_model().state_dict().items()), folder)
    port, log = free_port(), folder / "server.log"
    command = f"-m vllm.entrypoints.openai.api_server --model {folder} --host 127.0.0.1 --port {port} --dtype float32"
    command += " --logprobs-mode processed_logprobs --generation-config vllm --enable-lora --max-lora-rank 8"
    command += f" --max-model-len {CONTEXT} --enforce-eager"
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command.split()], env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process, port, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def make(tmp_path: Path, server: tuple[subprocess.Popen[bytes], int, Path]) -> Callable[..., GRPOTrainer]:
    def make(peft_config: Any = None, reward: Any = None, **changes: Any) -> GRPOTrainer:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 3,
            "learning_rate": 3e-3,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_port": server[1],
            "vllm_server_timeout": 240,
        }
        return GRPOTrainer(
            build_model(),
            reward or even_share,
            GRPOConfig(**(fields | changes)),
            ROWS,
            processing_class=build_tokenizer(),
            peft_config=peft_config,
        )

    return make


def even_share(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def adapters(port: int) -> list[str]:
    import json

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        return [card["id"] for card in json.load(answer)["data"] if card["parent"]]


@needs_vllm
@pytest.mark.timeout(400)
def test_server(
    server: tuple[subprocess.Popen[bytes], int, Path], make: Callable[..., GRPOTrainer], tmp_path: Path
) -> None:
    process, port, log = server
    try:
        trainer = make(LORA)
    except EngineError:
        print(log.read_text()[-5000:])
        raise
    trainer.train()
    check_run(trainer)
    engine: Any = trainer.rollouts.engine
    assert len(adapters(port)) == 1  # the last step's; the ones before were unloaded
    prompts = [[5, 6, 7], list(range(3, 40)) * 4]
    greedy = SamplingParams(6, temperature=0.0)
    expected = TransformersEngine([EOS], PAD).generate(trainer.model, prompts, greedy)
    assert engine.generate(trainer.model, prompts, greedy).ids == expected.ids
    start = engine.client.started()
    assert float(start) > 0  # what tells a server that was started anew
    assert engine.client.started() == start
    engine.close()
    assert adapters(port) == []
    assert not engine.folder.exists()

    merged = make(LORA, vllm_lora_mode="merged")
    merged.train()
    check_run(merged)
    assert adapters(port) == []
    expected = TransformersEngine([EOS], PAD).generate(merged.model, prompts, greedy)
    assert merged.rollouts.engine.generate(merged.model, prompts, greedy).ids == expected.ids

    full = make(score_while_generating=True)
    full.train()
    check_run(full)
    assert all(line["time/rewards_hidden"] > 0 for line in full.state.log_history if "loss" in line)
    told: list[tuple[int, list[int]]] = []
    many = [prompt for prompt in ([5, 6, 7], [8, 9]) for _ in range(3)]
    answers = full.rollouts.engine.generate(full.model, many, SamplingParams(6), lambda i, ids: told.append((i, ids)))
    assert sorted(told) == list(enumerate(answers.ids))
    expected = TransformersEngine([EOS], PAD).generate(full.model, prompts, greedy)
    assert full.rollouts.engine.generate(full.model, prompts, greedy).ids == expected.ids

    # The base weights on the server are now those of the run above, which an adapter does not replace.
    with pytest.raises(EngineError, match=r"does not hold the trainer's weights(.|\n)*No step was taken"):
        make(LORA).train()

    def kill(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        if dying.state.global_step == 1:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return even_share(completions, completion_ids)

    dying = make(reward=kill)
    with pytest.raises(EngineError, match=r"does not answer(.|\n)*VLLM_SERVER_DEV_MODE=1(.|\n)*after step 2 is saved"):
        dying.train()
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").exists()


def check_run(trainer: GRPOTrainer) -> None:
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 3
    assert all(line["vllm/weight_check"] < 1e-5 for line in logs)


def test_no_server(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(
        EngineError, match=rf"no vLLM server answered at http://127.0.0.1:{port} within 0.1 s(.|\n)*Start"
    ):
        ServerClient(f"http://127.0.0.1:{port}", tmp_path, 0.1, 1.0)


def test_a_server_that_hangs(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        client = ServerClient.__new__(ServerClient)
        client.scheme, client.host, client.port, client.prefix = "http", "127.0.0.1", listening.getsockname()[1], ""
        client.url, client.request_timeout, client.name, client._key = "http://127.0.0.1", 0.2, "m", None
        with pytest.raises(EngineError, match=r"did not answer POST .* within 0.2 s \(vllm_request_timeout\)"):
            client.complete([[5]], {})


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vllm_server_base_url must look like"):
        ServerClient("ftp://x", tmp_path, 0.1, 1.0)
