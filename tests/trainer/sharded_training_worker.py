"""Three optimizer steps with the weights sharded by FSDP2, through transformers' own integration."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from toys import build_model, build_tokenizer, reward_number
from two_process_worker import HashEngine

from grpo_ext.trainer import GRPOConfig, GRPOTrainer


def run(folder: Path, world_size: int) -> dict[str, Any]:
    """The weights after three steps, whole, and the losses."""
    sharded: dict[str, Any] = {}
    if world_size > 1:
        sharded = {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
        }
    args = GRPOConfig(
        output_dir=str(folder / f"sharded-{world_size}"),
        per_device_train_batch_size=8 // world_size,
        num_generations=2,
        max_completion_length=5,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **sharded,
    )
    rows = [{"prompt": f"add {i} " + "= " * (i % 3 + 1)} for i in range(20)]
    trainer = GRPOTrainer(build_model(), reward_number, args, rows, processing_class=build_tokenizer())
    trainer.rollouts.engine = HashEngine()
    trainer.train()
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    kinds = {type(p).__name__ for p in model.parameters()}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    whole = {n: getattr(p, "full_tensor", lambda p=p: p)().clone() for n, p in weights.items()}
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"weights": whole, "losses": losses, "kinds": kinds}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    result = run(Path(sys.argv[1]), 2)
    if torch.distributed.get_rank() == 0:
        torch.save(result, Path(sys.argv[1]) / "sharded.pt")
