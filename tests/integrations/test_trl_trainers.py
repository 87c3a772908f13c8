"""TRL's other trainers: equal numbers when patched, and `status()` counts the calls of our kernels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl_runs import Recorder, largest_difference, patched, prompts, reward, settings, tiny_model, tiny_tokenizer

import grpo_ext.integrations.trl as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl

patching = contextlib.contextmanager(patched)
Run = Callable[[str], list[dict[str, float]]]


def train(trainer_class: Any, config: Any, data: Dataset, *arguments: Any, **options: Any) -> list[dict[str, float]]:
    recorder = Recorder()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            tiny_model(), *arguments, args=config, train_dataset=data, processing_class=tiny_tokenizer(),
            callbacks=[recorder], **options,
        )  # fmt: skip
        trainer.train()
    assert len(recorder.steps) == 2
    return recorder.steps


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start + 5 * i) % 94}" for i in range(count))


def rloo(folder: str) -> list[dict[str, float]]:
    config = trl.RLOOConfig(
        **settings(
            folder,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            beta=0.0,
            num_iterations=2,
        )
    )
    return train(trl.RLOOTrainer, config, prompts(), reward)


def sft(folder: str) -> list[dict[str, float]]:
    data = Dataset.from_list([{"text": words(i, 3 + i % 4)} for i in range(16)])
    return train(trl.SFTTrainer, trl.SFTConfig(**settings(folder, per_device_train_batch_size=4, max_length=16)), data)


def dpo(folder: str) -> list[dict[str, float]]:
    rows = [{"prompt": words(i, 2), "chosen": words(i + 9, 3), "rejected": words(i + 31, 4)} for i in range(16)]
    config = trl.DPOConfig(**settings(folder, per_device_train_batch_size=4, max_length=16))
    return train(trl.DPOTrainer, config, Dataset.from_list(rows), ref_model=tiny_model(seed=1))


def kto(folder: str) -> list[dict[str, float]]:
    rows = [{"prompt": words(i, 2), "completion": words(i + 9, 3 + i % 2), "label": i % 2 == 0} for i in range(16)]
    config = trl.KTOConfig(**settings(folder, per_device_train_batch_size=4, max_length=16))
    return train(trl.KTOTrainer, config, Dataset.from_list(rows), ref_model=tiny_model(seed=1))


@pytest.mark.parametrize(
    ("run", "served", "handed_back"),
    [
        # num_iterations=2: both steps learn from one batch, whose old log probabilities take one call more.
        (rloo, {"with gradient": 2, "without gradient": 1}, set()),
        # The accuracy of each token is a metric that TRL's class computes on the way.
        (sft, {}, {"TRL needs is_top1"}),
        # So it is for DPO's policy; the reference model's calls are ours.
        (dpo, {"without gradient": 2}, {"TRL needs is_top1"}),
        # A step is the policy's call, the reference model's, and one of each without a gradient for the KL estimate;
        # the policy's ask for mean logits too.
        (kto, {"with gradient": 2, "without gradient": 6}, set()),
    ],
    ids=["rloo", "sft", "dpo", "kto"],
)
def test_trainer(run: Run, served: dict[str, int], handed_back: set[str], tmp_path: Path) -> None:
    stock = run(str(tmp_path / "stock"))
    with patching():
        mine = run(str(tmp_path / "ours"))
        status = ours.status()
    worst, where = largest_difference(stock, mine)
    assert worst <= 5e-5, where
    assert status.served == served
    assert set(status.handed_back) == handed_back
