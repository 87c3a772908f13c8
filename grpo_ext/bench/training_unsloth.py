"""Run a case of `grpo_ext.bench.training phase` with Unsloth's GRPO trainer, in a process of its own.

Unsloth changes torch, transformers and TRL when it is imported, so `training_setup.run_candidate` starts this module as
``python -m grpo_ext.bench.training_unsloth FOLDER``. It reads ``given.pickle`` and writes ``found.pickle`` there. Needs
a GPU and unsloth (measured: 2026.10.9 with TRL 1.15); LoRA with Unsloth's gradient checkpointing.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
import unsloth  # type: ignore[import-not-found]  # isort: skip  # must precede the packages that it patches
import dataclasses
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset

import grpo_ext.integrations.unsloth as integration
from grpo_ext.bench import common, training_setup
from grpo_ext.bench.training_case import Case
from grpo_ext.bench.training_workload import Workload, build_tokenizer

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(case: Case, tokenizer: Any) -> Any:
    """Build the case's model, and load it with Unsloth and an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        case.build().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        training_setup.release_memory(torch.device("cuda"))
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder, max_seq_length=2048, dtype=common.DTYPES[case.dtype], load_in_4bit=False, fast_inference=False
        )
    return unsloth.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, target_modules=LAYERS,
        use_gradient_checkpointing="unsloth" if case.checkpointing else False,
    )  # fmt: skip


def measure(case: Case, workload: Workload, patch: dict[str, Any] | None) -> training_setup.Measured:
    """Train ``case.steps`` steps on the prepared completions.

    Args:
        patch: arguments of `grpo_ext.integrations.unsloth.patch`; None does not patch.
    """
    if patch is not None:
        integration.patch(**patch)
    tokenizer = build_tokenizer(case.shape.vocabulary)
    model = load(case, tokenizer)

    class Served(trl.GRPOTrainer):
        """Returns the prepared completions instead of generating."""

        def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **options: Any) -> Any:
            return workload.serve(prompt_ids)

    known = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    config = trl.GRPOConfig(**{name: value for name, value in case.arguments(workload).items() if name in known})
    config.mask_truncated_completions = False  # Unsloth sets True for dapo, which would mask all completions
    watch = training_setup.StepWatch(torch.device("cuda"))
    dataset = Dataset.from_list(workload.dataset())
    trainer = Served(model, workload.reward, config, dataset, None, tokenizer, callbacks=[watch])
    trainer.use_vllm = True  # so that the trainer corrects for the prepared log probabilities
    trainer._generate = watch.as_rollout(trainer._generate)
    training_setup.start_adapter(trainer.model)
    training_setup.backbone(trainer.model).register_forward_pre_hook(watch.count_forward)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    status = integration.status()
    if patch is not None and not any("served" in name for name in status):
        raise RuntimeError(f"the patched Unsloth never called this package's code: {status}")
    note = f"unsloth {unsloth.__version__}, trl {trl.__version__}" + (f", {status}" if patch is not None else "")
    return training_setup.Measured(
        watch.seconds, watch.rollout, watch.losses, watch.grad_norms, watch.forwards,
        trainer.args.gradient_accumulation_steps, torch.cuda.max_memory_allocated(), before, note,
    )  # fmt: skip


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "found.pickle").write_bytes(pickle.dumps(measure(*pickle.loads((place / "given.pickle").read_bytes()))))
