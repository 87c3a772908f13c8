"""`grpo-ext eval`: measure a finished run again on its held-out questions."""

from __future__ import annotations

import os
from typing import Any

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.data import load_datasets, load_reward
from grpo_ext.cli.prepare import drop_multi_process_settings, make_config
from grpo_ext.cli.run_files import ADAPTER_FOLDER, MODEL_FOLDER, write_json, write_samples
from grpo_ext.cli.settings import read_run
from grpo_ext.cli.train import measure_heldout
from grpo_ext.tasks import load_model
from grpo_ext.tasks.heldout import best_constant_reward


def eval_command(folder: str, samples: int | None = None, seed: int | None = None) -> dict[str, Any]:
    """Measure the held-out reward of a run's adapter (or model), and write eval.json and eval.jsonl to its folder.

    Args:
        folder: the run folder.
        samples: answers per question; None = as in training.
        seed: seed of the sampling; None = the run's seed.

    Returns:
        heldout_reward, stderr, best_constant_reward, questions, samples, seed.

    Raises:
        SettingsError: several processes, not a run folder, no held-out questions, or no trained weights.
    """
    settings = read_run(folder)
    drop_multi_process_settings(settings)
    args = make_config(settings, folder)
    if args.world_size > 1:
        raise SettingsError("eval measures in one process: start it without torchrun or accelerate launch")
    rewards = [load_reward(name) for name in settings.reward_funcs]
    _, heldout = load_datasets(settings.dataset, settings.seed)
    if heldout is None:
        raise SettingsError(f"{folder} was trained without held-out questions (dataset.heldout is 0)")
    model, tokenizer = load_trained(folder, settings.model, settings.dtype, settings.lora is not None)
    model.to(args.device)
    result = measure_heldout(model, tokenizer, settings, args, heldout, rewards, samples=samples, seed=seed)
    report = {
        "heldout_reward": round(result.reward, 4),
        "stderr": round(result.stderr, 4),
        "best_constant_reward": best_constant_reward(heldout, rewards, reward_weights=args.reward_weights),
        "questions": len(heldout),
        "samples": samples or settings.heldout_samples,
        "seed": args.seed if seed is None else seed,
    }
    write_json(os.path.join(folder, "eval.json"), report)
    write_samples(os.path.join(folder, "eval.jsonl"), result.samples)
    return report


def load_trained(folder: str, model_name: str, dtype: str, lora: bool) -> tuple[Any, Any]:
    """Load the trained model of a run and its tokenizer.

    Raises:
        SettingsError: the folder contains no trained weights.
    """
    weights = os.path.join(folder, ADAPTER_FOLDER if lora else MODEL_FOLDER)
    if not os.path.isdir(weights):
        raise SettingsError(f"{folder} contains no {os.path.basename(weights)}/: resume the unfinished run first")
    try:
        model, tokenizer = load_model(model_name if lora else weights, dtype)
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SettingsError(str(error)) from error
    if lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, weights)
    return model, tokenizer
