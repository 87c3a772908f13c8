"""`GRPOTrainer` with `use_vllm=True`: the engine follows the training, and a failure leaves a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_toys import VOCABULARY, build_model, build_tokenizer, needs_vllm

from grpo_ext.generation.vllm import EngineError
from grpo_ext.generation.vllm.engine import close_quietly
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

pytestmark = needs_vllm

ROWS = [{"prompt": " ".join(f"w{3 + (i * 7 + j) % (VOCABULARY - 3)}" for j in range(4 + i))} for i in range(6)]


def even_share(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., GRPOTrainer]]:
    made: list[GRPOTrainer] = []

    def make(**changes: Any) -> GRPOTrainer:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_vllm": True,
        }
        args = GRPOConfig(**(fields | changes))
        trainer = GRPOTrainer(build_model(), even_share, args, ROWS, ROWS[:3], processing_class=build_tokenizer())
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        close_quietly(trainer.rollouts.engine)


def test_training_full_weights_dies_and_resumes(
    make: Callable[..., GRPOTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    client: Any = trainer.rollouts.engine.client  # type: ignore[attr-defined]
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 4
    for line in logs:
        assert line["vllm/weight_check"] < 1e-5
        # On-policy and in fp32 the engine's probabilities are the trainer's: no weight away from 1.
        assert line["ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert trainer.evaluate()["eval_reward"] >= 0

    # The same engine, another run; it dies before the third step.
    generate, calls = client.llm.generate, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:  # a check and a generation per step, and once a question for the temperature
            raise RuntimeError("engine core died")
        return generate(*args, **kwargs)

    monkeypatch.setattr("grpo_ext.trainer.engine.ColocatedClient", lambda *_: client)
    second = make(output_dir=str(tmp_path / "second"))
    monkeypatch.setattr(client.llm, "generate", dying)
    with pytest.raises(EngineError, match=r"engine core died(.|\n)*after step 2 is saved.*checkpoint-2"):
        second.train()
    monkeypatch.setattr(client.llm, "generate", generate)
    checkpoint = tmp_path / "second" / "checkpoint-2"
    third = make(output_dir=str(tmp_path / "third"))
    third.train(resume_from_checkpoint=str(checkpoint))
    rewards = [line["reward"] for line in third.state.log_history if "loss" in line]
    # The engine in this process draws from torch's generator, which a checkpoint keeps: the same completions.
    assert rewards == [line["reward"] for line in logs]


def test_log_probabilities_from_before_the_temperature(make: Callable[..., GRPOTrainer]) -> None:
    """vLLM's default, which the engine in this process is told to leave: at temperature 1 they are the same."""
    trainer = make(vllm_engine_kwargs={"logprobs_mode": "raw_logprobs"}, temperature=0.7)
    with pytest.raises(EngineError, match=r"--logprobs-mode processed_logprobs(.|\n)*No step was taken"):
        trainer.train()


def test_sleep_needs_a_gpu(make: Callable[..., GRPOTrainer]) -> None:
    with pytest.raises(ValueError, match="vllm_enable_sleep_mode=True needs a GPU"):
        make(vllm_enable_sleep_mode=True)


def test_lengths_that_do_not_fit(make: Callable[..., GRPOTrainer]) -> None:
    with pytest.raises(ValueError, match="vllm_max_model_length=1000 exceeds the model's context of 256"):
        make(vllm_max_model_length=1000)
    with pytest.raises(ValueError, match="max_completion_length=6 leaves no room for a prompt in the 5 tokens"):
        make(vllm_max_model_length=5)


def test_adapter_mode_needs_an_adapter(make: Callable[..., GRPOTrainer]) -> None:
    with pytest.raises(ValueError, match="vllm_lora_mode='adapter' needs an adapter"):
        make(vllm_lora_mode="adapter")
