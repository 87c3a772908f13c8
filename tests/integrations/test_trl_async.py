"""TRL's AsyncGRPOTrainer with and without `patch()`: equal numbers at every step."""

from __future__ import annotations

import queue
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl_step import compare, patching
from torch import Tensor
from trl_runs import WORDS, Recorder, fill_adapters, lora, prompts, settings, tiny_model, tiny_tokenizer

import grpo_ext.integrations.trl as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    packing = pytest.importorskip("trl.experimental.async_grpo.packing", reason="packed async GRPO needs TRL 1.16")
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer


class Worker:
    """A queue of finished rollouts: groups of four with a common prompt, each with tokens of a tool."""

    def __init__(self, count: int) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        generator = torch.Generator().manual_seed(2)

        def draw(low: int, high: int, count: int) -> list[int]:
            return torch.randint(low, high, (count,), generator=generator).tolist()

        for row in range(count):
            if row % 4 == 0:
                prompt, shared = draw(3, len(WORDS), 3 + row % 3), draw(3, len(WORDS), 2)
            own = draw(3, len(WORDS), *draw(4, 9, 1))
            mask = [0] * len(prompt) + [1] * 3 + [0] * 2 + [1] * (len(own) - 3)
            logps = -4.5 + 0.7 * torch.randn(len(mask), generator=generator)
            self.rollout_buffer.put(
                async_grpo_trainer.RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=torch.tensor(prompt + shared + own).numpy(),
                    completion_mask=torch.tensor(mask).numpy(),
                    old_log_probs=(logps * torch.tensor(mask)).numpy(),
                    advantage=float(torch.randn((), generator=generator)) if row % 8 else 0.0,
                    model_version=0,
                    group_id=row // 4,
                    metrics={"reward": float(row % 3)},
                )
            )

    def nothing(self, *_: Any) -> None:
        pass

    start = stop = update_model_version = check_health = nothing
    init_weight_transfer = pause = resume = destroy = nothing  # the trainer's weight transfer, too

    def send_weights(self, weights: Any) -> None:
        for _ in weights:
            pass


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, *_: Any, softmax_scale: float, **__: Any
) -> Tensor:
    """Causal attention of packed segments, aligned at their ends; the FlashAttention 3 kernel needs a GPU."""
    parts = []
    for (q0, q1), (k0, k1) in zip(
        *(list(zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True)) for ends in (ends_q, ends_k)), strict=True
    ):
        q, k, v = query[q0:q1].transpose(0, 1), key[k0:k1].transpose(0, 1), value[k0:k1].transpose(0, 1)
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
        parts.append(found.transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = types.SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernels)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)


def run(folder: Path, *, with_lora: bool, **changes: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "temperature": 0.8,
        "token_budget": 0,
        **changes,
    }
    tiny_model().save_pretrained(folder / "model")
    recorder, worker = Recorder(), Worker(40)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = AsyncGRPOTrainer(
            str(folder / "model"),
            args=AsyncGRPOConfig(**settings(str(folder), **arguments)),
            train_dataset=prompts(),
            processing_class=tiny_tokenizer(),
            peft_config=lora() if with_lora else None,
            callbacks=[recorder],
            rollout_worker=worker,
            weight_transfer=worker,
        )
        if with_lora:
            fill_adapters(trainer.model)
        trainer.train()
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return recorder.steps, trained


def is_number(name: str) -> bool:
    """Whether a logged value follows from the training, not from the clock."""
    return not name.startswith("perf/") and name not in ("sample/time_in_queue_s", "step_time", "epoch")


@pytest.mark.parametrize(
    "changes",
    [
        {"with_lora": False},
        {"with_lora": True, "gradient_checkpointing": True},
        {"with_lora": True, "token_budget": 40, "epsilon": 0.05},
    ],
    ids=["full", "lora-checkpointing", "lora-budget"],
)
def test_equal_to_stock(changes: dict[str, Any], tmp_path: Path) -> None:
    stock = run(tmp_path / "stock", **changes)
    with patching(fuse_loss=True):
        mine = run(tmp_path / "ours", **changes)
        status = ours.status()
    numbers = tuple(filter(is_number, stock[0][0]))
    assert {"loss", "grad_norm", "kl", "entropy", "ratio", "clip_ratio/region_mean"} <= set(numbers)
    assert all(logs["clip_ratio/region_mean"] > 0 and logs["batch/packing_ratio"] > 1 for logs in stock[0])
    compare(stock, mine, names=numbers)
    assert status.served == {"with gradient": 6}
    assert not status.handed_back
    assert status.parts["layers"].served == 1
    assert status.parts["checkpointing"].served == ("gradient_checkpointing" in changes)
    assert not any(part.handed_back for part in status.parts.values()), str(status)
    # TRL packs these micro-batches itself and takes old log probabilities from the engine; the loss is TRL's.
    assert status.losses_served == status.parts["trim"].served == status.parts["one_forward"].served == 0
