"""What stands between a run's settings and its first step: the folder, the type of the weights, the trainer's
configuration and the adapter's."""

from __future__ import annotations

import os
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.run_files import CONFIG_FILE, METRICS_FILE
from grpo_ext.cli.settings import LoraSettings, RunSettings, read_run
from grpo_ext.tasks import fast_dtype


def resume_from(settings: RunSettings) -> str | bool | None:
    """Takes the checkpoint to go on from out of the settings: a folder, True for the run's newest, or None."""
    value = settings.trainer.pop("resume_from_checkpoint", None)
    if value is None or str(value).lower() in ("false", ""):
        return None
    return True if str(value).lower() == "true" else value


def run_folder(settings: RunSettings, config: str, resuming: bool) -> str:
    """Where the run goes: ``output_dir``, or ``runs/<name of the file>``, numbered when that is taken.

    Raises:
        SettingsError: output_dir already holds a run that is not being resumed, or a resumed run names none.
    """
    given = settings.trainer.get("output_dir")
    if given:
        if not resuming and os.path.exists(os.path.join(given, METRICS_FILE)):
            raise SettingsError(
                f"{given} already holds a run: choose another output_dir"
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


#: What a resumed run shares with the run that began in its folder.
FIXED = ("model", "dataset", "reward_funcs", "lora", "seed", "data_seed", "shuffle_dataset", "dtype")


def check_same_run(settings: RunSettings, folder: str) -> None:
    """Refuse to resume another run than the one whose config.yaml the folder holds.

    The model, dtype, dataset, reward functions, LoRA settings, ``seed``, ``data_seed`` and ``shuffle_dataset`` stay.
    Everything else may change: the length of the run, learning rate, loss, sampling, batch sizes (with a warning that
    other prompts follow), logging, saving and devices. A folder without a config.yaml is not checked.

    Raises:
        SettingsError: naming each field that differs, with both values.
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
        raise SettingsError(f"{folder} holds another run: {listed}; choose another output_dir, or resume it as it was")


def _same(before: Any, now: Any) -> bool:
    """Whether two values are equal, or two paths to one file or folder."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        return all(_same(before[name], now[name]) for name in before)
    if isinstance(before, str) and isinstance(now, str) and os.path.exists(before) and os.path.exists(now):
        return os.path.samefile(before, now)
    return bool(before == now)


def choose_dtype(settings: RunSettings, resumed: str | None) -> str | None:
    """Put a type in the place of ``dtype: auto``, and return the line to print about it (None: there was no choice).

    Args:
        settings: of the run; changed in place.
        resumed: folder of the run to continue, whose type stays, or None.
    """
    if settings.dtype != "auto":
        return None
    if resumed is not None and os.path.isfile(os.path.join(resumed, CONFIG_FILE)):
        dtype, reason = read_run(resumed).dtype, "the run began with it"
    else:
        dtype, reason = fast_dtype("cpu" if settings.trainer.get("use_cpu") else None)
    settings.dtype = settings.trainer["dtype"] = dtype
    return f"dtype auto: {dtype} ({reason})"


def make_config(settings: RunSettings, folder: str) -> Any:
    """The `GRPOConfig` of the run, with a TensorBoard log unless ``report_to`` says otherwise.

    Several processes on a machine without an accelerator train together on the CPU: left to itself accelerate would let
    each train alone.

    Raises:
        SettingsError: a value that GRPOConfig refuses, or processes that would not train together.
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
        elif "accelerator_config" not in values:  # by which a program may have set up its processes
            raise SettingsError("deepspeed needs GPUs, and torch sees none: its processes would wait for ever")
    try:
        args = GRPOConfig(**values | {"output_dir": folder})
    except (ImportError, ValueError, TypeError) as error:
        raise SettingsError(str(error)) from error
    if args.world_size < started:
        raise SettingsError(
            f"{started} processes were started, but each would train by itself: torch sees no GPU for them"
        )
    return args


def on_one_process(settings: RunSettings) -> None:
    """Take out of the settings what fits only the processes that trained: a measurement needs one, and any will do."""
    for name in ("fsdp", "fsdp_config", "deepspeed", "vllm_tensor_parallel_size", "generation_batch_size"):
        settings.trainer.pop(name, None)


def lora_config(settings: LoraSettings | None) -> Any:
    """The PEFT configuration, or None for all the weights."""
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
