"""Short runs of TRL's trainers on a tiny random model: cases, and the logged numbers of a run."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import grpo_ext.integrations.trl as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about versions of engines that nothing here uses
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'grpo-ext[trl]'; it needs Python 3.11")

WORDS = ["<eos>", "<pad>", "<unk>", *[f"w{i}" for i in range(94)]]
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def tiny_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", padding_side="left"
    )


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "bos_token_id": None,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_list(
        [{"prompt": " ".join(f"w{(7 * i + j) % 94}" for j in range(2 + i % 3))} for i in range(count)]
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Differs between completions of one prompt."""
    return [sum(map(ord, text)) % 17 / 17 for text in completions]


class Recorder(TrainerCallback):
    """What the trainer logs at every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and ("loss" in logs or "eval_loss" in logs):
            self.steps.append(dict(logs))


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    loss_type: str = "dapo"
    level: str = "token"
    lora: bool = False
    beta: float = 0.0
    num_iterations: int = 1
    accumulation: int = 1

    def __str__(self) -> str:
        kind = "lora" if self.lora else "full"
        return f"{self.loss_type}-{self.level}-{kind}-beta{self.beta}-it{self.num_iterations}-acc{self.accumulation}"


AXES: tuple[tuple[Any, ...], ...] = (LOSS_TYPES, ("token", "sequence"), (False, True), (0.0, 0.05), (1, 2), (1, 2))


def grid() -> list[Case]:
    return [Case(*values) for values in itertools.product(*AXES)]


def pairwise() -> list[Case]:
    """A small part of the grid in which every pair of values of two axes occurs; greedy, the same every time."""
    missing = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(AXES)), 2)
        for a in AXES[i]
        for b in AXES[j]
    }  # fmt: skip

    def pairs(values: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(values), 2))

    every = list(itertools.product(*AXES))
    chosen = []
    while missing:
        best = max(every, key=lambda values: len(pairs(values) & missing))
        chosen.append(Case(*best))
        missing -= pairs(best)
    return chosen


def settings(output_dir: str, **changes: Any) -> dict[str, Any]:
    """Arguments that all of TRL's configs take."""
    return {
        "output_dir": output_dir,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "seed": 3,
        "gradient_checkpointing": False,
        **changes,
    }


def run_grpo(
    case: Case, output_dir: str, *, model: Any = None, tokenizer: Any = None, **changes: Any
) -> list[dict[str, float]]:
    """The logs of a GRPO run; the same for the same arguments."""
    args = trl.GRPOConfig(
        **settings(
            output_dir,
            **{
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": case.accumulation,
                "num_generations": 4,
                "max_completion_length": 6,
                "loss_type": case.loss_type,
                "importance_sampling_level": case.level,
                # Narrow: after one step some ratios are outside. cispo's bound is a cap of the ratio itself.
                "epsilon": 0.01,
                "epsilon_high": 1.002 if case.loss_type == "cispo" else 0.01,
                "beta": case.beta,
                "num_iterations": case.num_iterations,
                "max_steps": 2 * case.num_iterations,
                **changes,
            },
        )
    )
    recorder = Recorder()
    if model is None:
        model = tiny_model()
        if case.beta and not case.lora:  # TRL loads the reference model from where the model's config points
            reference = tiny_model(seed=1)
            reference.save_pretrained(f"{output_dir}/reference")
            model.config._name_or_path = f"{output_dir}/reference"
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model,
            reward,
            args,
            prompts(),
            processing_class=tiny_tokenizer() if tokenizer is None else tokenizer,
            peft_config=lora() if case.lora else None,
            callbacks=[recorder],
        )
        if case.lora:  # adapters that start at zero leave the KL term and half of the gradients at zero
            fill_adapters(trainer.model)
        trainer.train()
    assert len(recorder.steps) == args.max_steps
    return recorder.steps


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def fill_adapters(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def compared(logs: dict[str, float]) -> dict[str, float]:
    """The numbers of one step that follow from the loss."""
    names = ("loss", "grad_norm", "kl", "entropy", "cispo_clip_ratio", "vespo/phi_seq_mean", "mean_token_accuracy")
    prefixes = ("clip_ratio/", "logits/", "logps/", "rewards/", "eval_")
    return {k: v for k, v in logs.items() if k in names or (k.startswith(prefixes) and not k.endswith(CLOCKS))}


#: Ends of the names of numbers that are times.
CLOCKS = ("_runtime", "_per_second")


def largest_difference(first: list[dict[str, float]], second: list[dict[str, float]]) -> tuple[float, str]:
    """Over all steps and names, relative to the larger of the value and 1e-2; and where it is."""
    worst, where = 0.0, "nowhere"
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        one, two = compared(a), compared(b)
        assert one.keys() == two.keys()
        for name, value in one.items():
            same = value == two[name] or (value != value and two[name] != two[name])
            difference = 0.0 if same else abs(value - two[name]) / max(abs(value), 1e-2)
            if not difference <= worst:
                worst, where = difference, f"{name} at step {step}: {value} and {two[name]}"
    return worst, where


def patched(fuse_loss: bool = False, **switches: bool) -> Iterator[None]:
    """For a context manager or fixture: TRL on our kernels, and as it was afterwards."""
    ours.patch(fuse_loss=fuse_loss, **switches)
    try:
        yield
    finally:
        ours.unpatch()
