"""Prepare a run from its settings: folder, dtype of the weights, `GRPOConfig`, and LoRA configuration."""

from __future__ import annotations

import os
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.run_files import CONFIG_FILE, METRICS_FILE
from grpo_ext.cli.settings import LoraSettings, RunSettings, read_run
from grpo_ext.tasks import fast_dtype


def resume_from(settings: RunSettings) -> str | bool | None:
    """Remove ``resume_from_checkpoint`` from the settings and return it: a folder, True (the newest) or None."""
    value = settings.trainer.pop("resume_from_checkpoint", None)
    if value is None or str(value).lower() in ("false", ""):
        return None
    return True if str(value).lower() == "true" else value


def run_folder(settings: RunSettings, config: str, resuming: bool) -> str:
    """The run folder: ``output_dir``, or ``runs/<name of the file>`` with a number if it exists.

    Raises:
        SettingsError: output_dir already contains a run that is not resumed, or a resumed run has no output_dir.
    """
    given = settings.trainer.get("output_dir")
    if given:
        given = os.path.expanduser(given)
        if not resuming and os.path.exists(os.path.join(given, METRICS_FILE)):
            raise SettingsError(
                f"{given} already contains a run: choose another output_dir"
                + (", or continue it with --resume_from_checkpoint true" if get_last_checkpoint(given) else "")
            )
        return given
    if resuming:
        raise SettingsError("resume_from_checkpoint needs output_dir: the folder of the run to continue")
    base = os.path.join("runs", os.path.splitext(os.path.basename(config))[0])
    number = 1
    folder = base
    while os.path.exists(folder):
        number += 1
        folder = f"{base}-{number}"
    return folder


#: Fields that must be equal when a run is resumed.
FIXED = ("model", "dataset", "reward_funcs", "lora", "seed", "data_seed", "shuffle_dataset", "dtype")


def check_same_run(settings: RunSettings, folder: str) -> None:
    """Check that the settings resume the run in the folder, not a different one.

    The fields `FIXED` must equal those of the folder's config.yaml. Everything else may change: the length of the run,
    learning rate, loss, sampling, batch sizes (with a warning that other prompts follow), logging, saving and devices.
    A folder without a config.yaml is not checked.

    Raises:
        SettingsError: a field differs; the message names each one with both values.
    """
    if not os.path.isfile(os.path.join(folder, CONFIG_FILE)):
        return
    run = read_run(folder)
    before, now = (
        {"data_seed": None, "shuffle_dataset": True} | of.to_dict() | {"seed": of.seed} for of in (run, settings)
    )
    changed = [name for name in FIXED if not _same(before[name], now[name])]
    if changed:
        listed = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in changed)
        raise SettingsError(f"{folder} contains another run: {listed}; choose another output_dir, or restore them")


def _same(before: Any, now: Any) -> bool:
    """Whether two values are equal, or are paths of the same file or folder."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        return all(_same(before[name], now[name]) for name in before)
    if isinstance(before, str) and isinstance(now, str) and os.path.exists(before) and os.path.exists(now):
        return os.path.samefile(before, now)
    return bool(before == now)


def choose_dtype(settings: RunSettings, resumed: str | None) -> str | None:
    """Replace ``dtype: auto`` by a dtype, and return a line that gives the reason; None if dtype was not auto.

    Args:
        settings: settings of the run, modified in place.
        resumed: folder of the run to resume, which keeps its dtype; or None.
    """
    if settings.dtype != "auto":
        return None
    if resumed is not None and os.path.isfile(os.path.join(resumed, CONFIG_FILE)):
        dtype, reason = read_run(resumed).dtype, "as in the resumed run"
    else:
        dtype, reason = fast_dtype("cpu" if settings.trainer.get("use_cpu") else None)
    settings.dtype = settings.trainer["dtype"] = dtype
    return f"dtype auto: {dtype} ({reason})"


def make_config(settings: RunSettings, folder: str) -> Any:
    """Create the run's `GRPOConfig`, with a TensorBoard log by default.

    Several processes without an accelerator get ``use_cpu``: otherwise accelerate would not connect them, and each
    would train its own copy.

    Raises:
        SettingsError: GRPOConfig rejects a value, or the processes would not train together.
    """
    import torch

    from grpo_ext.trainer import GRPOConfig

    values: dict[str, Any] = {
        "seed": settings.seed,
        "report_to": ["tensorboard"],
        "save_strategy": "no",
    } | settings.trainer
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and not torch.accelerator.is_available():
        if not values.get("deepspeed"):
            values.setdefault("use_cpu", True)
        elif "accelerator_config" not in values:  # a program may set up its processes through this field
            raise SettingsError("deepspeed needs GPUs, and torch sees none: its processes would hang")
    try:
        args = GRPOConfig(**values | {"output_dir": folder})
    except (ImportError, ValueError, TypeError) as error:
        raise SettingsError(str(error)) from error
    if args.world_size < started:
        raise SettingsError(
            f"{started} processes were started, but each would train its own copy: torch sees no GPU for them"
        )
    return args


def drop_multi_process_settings(settings: RunSettings) -> None:
    """Remove the settings that require several processes, so that one process can evaluate."""
    for name in ("fsdp", "fsdp_config", "deepspeed", "vllm_tensor_parallel_size", "generation_batch_size"):
        settings.trainer.pop(name, None)


def lora_config(settings: LoraSettings | None) -> Any:
    """The PEFT configuration; None to train all weights."""
    if settings is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=2 * settings.r if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
