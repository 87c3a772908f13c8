"""Fixtures of the trainer's tests; what they are made of is in toys.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from toys import build_model, build_tokenizer, reward_number
from transformers import PreTrainedTokenizerFast

from grpo_ext.trainer import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "poison"))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def dataset() -> list[dict[str, Any]]:
    return [{"prompt": f"add {i} " + "= " * (i % 3 + 1), "answer": str(i)} for i in range(20)]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., GRPOConfig]:
    def make(**changes: Any) -> GRPOConfig:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 6,
            "num_generations": 2,
            "max_completion_length": 5,
            "max_steps": 2,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            **changes,
        }
        return GRPOConfig(**fields)

    return make


@pytest.fixture
def make_trainer(
    make_config: Callable[..., GRPOConfig], dataset: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., GRPOTrainer]:
    """A trainer of a tiny model; ``engine`` replaces generation, the other names are fields of the config."""

    def make(
        *,
        model: nn.Module | None = None,
        reward_funcs: Any = reward_number,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        engine: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        **changes: Any,
    ) -> GRPOTrainer:
        trainer = GRPOTrainer(
            build_model() if model is None else model,
            reward_funcs,
            make_config(**changes),
            dataset if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        if engine is not None:
            trainer.rollouts.engine = engine
        return trainer

    return make


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
