"""TRL's other trainers: equal numbers when patched, and `status()` counts the calls of our kernels."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl_runs import (
    WORDS,
    Recorder,
    compared,
    fill_adapters,
    largest_difference,
    lora,
    patched,
    prompts,
    reward,
    settings,
    tiny_model,
    tiny_tokenizer,
)

import grpo_ext.integrations.trl as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl

patching = contextlib.contextmanager(patched)
Run = Callable[..., list[dict[str, float]]]


def train(
    trainer_class: Any, config: Any, data: Dataset, *arguments: Any, with_lora: bool = False, **options: Any
) -> list[dict[str, float]]:
    recorder = Recorder()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            tiny_model(), *arguments, args=config, train_dataset=data, processing_class=tiny_tokenizer(),
            peft_config=lora() if with_lora else None, callbacks=[recorder], **options,
        )  # fmt: skip
        if with_lora:
            fill_adapters(trainer.model)
        trainer.train()
    assert len(recorder.steps) >= config.max_steps
    return recorder.steps


@functools.cache
def words(start: int, count: int, first: int = 0) -> str:
    """Words ``first`` to ``first + count`` of a text; every other word is the untrained model's most likely one."""
    model = tiny_model()
    ids = [WORDS.index(f"w{start}")]
    while len(ids) < first + count:
        likely = model(torch.tensor([ids])).logits[0, -1, 3:].argmax()
        ids.append(3 + (int(likely) if len(ids) % 2 else (start + 5 * len(ids)) % 94))
    return " ".join(WORDS[i] for i in ids[first:])


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


def options(folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    return settings(folder, **{"per_device_train_batch_size": 4, "max_length": 16, "max_steps": 3, **changes})


def sft(folder: str, with_lora: bool = False, **changes: Any) -> list[dict[str, float]]:
    data = Dataset.from_list([{"text": words(i, 3 + i % 4)} for i in range(16)])
    evaluated = {"eval_dataset": data.select(range(6))} if "eval_steps" in changes else {}
    config = trl.SFTConfig(**options(folder, changes))
    return train(trl.SFTTrainer, config, data, with_lora=with_lora, **evaluated)


def dpo(folder: str, with_lora: bool = False, **changes: Any) -> list[dict[str, float]]:
    rows = [
        {"prompt": words(i, 2), "chosen": " " + words(i, 3, 2), "rejected": " " + words(i, 4, 3)} for i in range(16)
    ]
    reference = {} if with_lora else {"ref_model": tiny_model(seed=1)}
    config = trl.DPOConfig(**options(folder, changes))
    return train(trl.DPOTrainer, config, Dataset.from_list(rows), with_lora=with_lora, **reference)


def kto(folder: str, with_lora: bool = False, **changes: Any) -> list[dict[str, float]]:
    rows = [{"prompt": words(i, 2), "completion": " " + words(i, 3 + i % 2, 2), "label": i % 2 == 0} for i in range(16)]
    reference = {} if with_lora else {"ref_model": tiny_model(seed=1)}
    config = trl.KTOConfig(**options(folder, changes))
    return train(trl.KTOTrainer, config, Dataset.from_list(rows), with_lora=with_lora, **reference)


#: Names of metrics that each trainer must log, besides the loss.
METRICS: dict[Run, set[str]] = {
    rloo: {"entropy", "grad_norm"},
    sft: {"entropy", "grad_norm", "mean_token_accuracy"},
    dpo: {"entropy", "grad_norm", "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen"},
    kto: {"entropy", "grad_norm", "kl", "logits/chosen", "logits/rejected", "logps/chosen", "rewards/margins"},
}


#: TRL checkpoints by default.
LORA = {"with_lora": True, "gradient_checkpointing": True}

CASES: list[tuple[Run, dict[str, Any], dict[str, int]]] = [
    # num_iterations=2: both steps learn from one batch, whose old log probabilities take one call more.
    (rloo, {}, {"with gradient": 2, "without gradient": 1}),
    (sft, {}, {"with gradient": 3}),
    (sft, {**LORA, "gradient_accumulation_steps": 2}, {"with gradient": 6}),
    (sft, {"loss_type": "dft"}, {"with gradient": 3}),
    # The full logits are the label smoother's; the fused head brings the metrics.
    (sft, {"label_smoothing_factor": 0.1}, {"without gradient": 3}),
    (sft, {"eval_strategy": "steps", "eval_steps": 1}, {"with gradient": 3, "without gradient": 3}),
    (dpo, {}, {"with gradient": 3, "without gradient": 3}),
    (dpo, LORA, {"with gradient": 3, "without gradient": 3}),
    (dpo, {"use_weighting": True, "loss_type": ["ipo", "sigmoid"]}, {"with gradient": 3, "without gradient": 3}),
    (dpo, {"precompute_ref_log_probs": True}, {"with gradient": 3, "without gradient": 4}),
    # A step is the policy's call, the reference model's, and one of each without a gradient for the KL estimate.
    (kto, {}, {"with gradient": 3, "without gradient": 9}),
    (kto, {**LORA, "loss_type": "apo_zero_unpaired"}, {"with gradient": 3, "without gradient": 3}),
]


@pytest.mark.parametrize(
    ("run", "changes", "served"), CASES, ids=["-".join([run.__name__, *changes]) for run, changes, _ in CASES]
)
def test_trainer(run: Run, changes: dict[str, Any], served: dict[str, int], tmp_path: Path) -> None:
    stock = run(str(tmp_path / "stock"), **changes)
    with patching():
        mine = run(str(tmp_path / "ours"), **changes)
        status = ours.status()
    assert METRICS[run] <= compared(stock[0]).keys()
    assert all(0 < step.get("mean_token_accuracy", 0.5) < 1 for step in stock)
    worst, where = largest_difference(stock, mine)
    assert worst <= 5e-5, where
    assert status.served == served
    assert not status.handed_back
    for name, runs in (("layers", 1), ("checkpointing", int("gradient_checkpointing" in changes))):
        assert (status.parts[name].served, status.parts[name].handed_back) == (runs, {})


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("run", [sft, dpo, kto])
def test_bf16_is_no_worse_than_stock(run: Run, with_lora: bool, device: torch.device, tmp_path: Path) -> None:
    """Compare all numbers of all steps with an fp32 run: at most twice the error of TRL's own bf16 run."""
    changes = {"with_lora": with_lora, "use_cpu": device.type == "cpu", "max_steps": 8}
    exact = run(str(tmp_path / "exact"), **changes)
    stock = run(str(tmp_path / "stock"), **changes, bf16=True)
    with patching():
        mine = run(str(tmp_path / "ours"), **changes, bf16=True)
        status = ours.status()
    assert status.served["with gradient"] == 8
    assert not status.handed_back
    (error, wrong), (of_stock, wrong_in_stock) = errors(mine, exact), errors(stock, exact)
    assert of_stock > 1e-3
    assert error <= 2 * of_stock
    assert wrong <= 2 * wrong_in_stock + 0.1  # a step has 16 to 23 tokens: near-ties that rounding decides


def errors(run: list[dict[str, float]], exact: list[dict[str, float]]) -> tuple[float, float]:
    """Root of the mean square, each number relative to the larger of itself and 1e-2; sum for the token accuracy.

    Without the share of 4 pairs whose margin, which is compared, is above 0.
    """
    squares, wrong = [], 0.0
    for found, wanted in zip(run, exact, strict=True):
        for name, value in compared(wanted).items():
            if name == "mean_token_accuracy":
                wrong += abs(found[name] - value)
            elif name != "rewards/accuracies":
                squares.append(((found[name] - value) / max(abs(value), 1e-2)) ** 2)
    return math.sqrt(sum(squares) / len(squares)), wrong
