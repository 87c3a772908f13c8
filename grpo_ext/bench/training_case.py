"""Cases of the training benchmarks: models with random weights, and arguments common to both trainers."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from grpo_ext.bench import common
from grpo_ext.bench.training_workload import Workload


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model; the weights are random."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    vocabulary: int = 151936


SHAPES = {
    "tiny": Shape(32, 2, 64, 4, 2, 8, True, 512),
    "0.6b": Shape(1024, 28, 3072, 16, 8, 128, True),
    "1.7b": Shape(2048, 28, 6144, 16, 8, 128, True),
    "8b": Shape(4096, 36, 12288, 32, 8, 128, False),
}

#: Settings with which both trainers compute the same importance weights: each token's ratio of trainer to engine,
#: truncated at 2. TRL runs an extra forward for these weights in every mode.
CORRECTION = {
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 2.0,
    "use_bias_correction_kl": False,  # with beta; TRL's default is True
}


def build_model(
    shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0, layers: int | None = None
) -> Any:
    """Build a model; every call on the same device gives the same random weights."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=layers or shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=262144,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")


@dataclasses.dataclass(frozen=True)
class Case:
    """Model and training settings, the same for every candidate."""

    model: str = "0.6b"
    trained: str = "lora"
    micro_batch: int = 8
    steps: int = 4
    beta: float = 0.0
    dtype: str = "bf16"
    device: str = "cpu"
    learning_rate: float = 1e-6
    layers: int | None = None
    vocabulary: int | None = None
    checkpointing: bool = True

    @property
    def shape(self) -> Shape:
        shape = SHAPES[self.model]
        return shape if self.vocabulary is None else dataclasses.replace(shape, vocabulary=self.vocabulary)

    def build(self) -> Any:
        return build_model(self.shape, torch.device(self.device), common.DTYPES[self.dtype], layers=self.layers)

    def arguments(self, workload: Workload, world: int = 1) -> dict[str, Any]:
        """Arguments with the same names in both trainers; the workload is one optimizer step of all processes."""
        return {
            "output_dir": tempfile.mkdtemp(prefix="bench_training_"),
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": max(1, workload.rows // (self.micro_batch * world)),
            "num_generations": workload.group,
            "max_completion_length": workload.tokens,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "beta": self.beta,
            "loss_type": "dapo",
            "gradient_checkpointing": self.checkpointing,
            "bf16": self.dtype == "bf16",
            "use_cpu": self.device == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
            **CORRECTION,
        }


def lora_config(case: Case) -> Any:
    if case.trained == "full":
        return None
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
