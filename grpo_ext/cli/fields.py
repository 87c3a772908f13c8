"""Generate docs/settings/fields.md: every setting with its default, type, help, and name in TRL and Unsloth.

python -m grpo_ext.cli.fields docs/settings/fields.md
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from grpo_ext.cli.settings import DatasetSettings, LoraSettings, RunSettings
from grpo_ext.config import LossConfig
from grpo_ext.trainer import GRPOConfig

SAME, NONE = "same", "–"

#: First field of each group of `GRPOConfig`; a group ends where the next one starts.
GROUPS = {
    "learning_rate": "Optimizer and log",
    "model_init_kwargs": "Model",
    "loss_type": "Loss",
    "use_fused_head": "Speed and memory",
    "skip_zero_gradient_sequences": "Safety and reference model",
    "reward_weights": "Rewards",
    "num_generations": "Generation",
    "steps_per_generation": "Batches",
    "use_vllm": "vLLM",
    "vllm_importance_sampling_correction": "Importance weights",
    "num_generations_eval": "Evaluation",
    "log_completions": "Records",
}

#: Fields of `GRPOConfig` that TRL 1.16 does not have, and TRL's alternative.
NOT_IN_TRL = {
    "dtype": "`model_init_kwargs`",
    "max_prompt_length": NONE,
    "use_fused_head": NONE,
    "head_memory_budget": NONE,
    "use_fused_lora": NONE,
    "use_fused_norm": NONE,
    "skip_zero_gradient_sequences": NONE,
    "max_nonfinite_steps": NONE,
    "score_while_generating": NONE,
    "shuffle_completions": NONE,
    "length_sorted_batches": NONE,
    "fill_micro_batches": NONE,
    "padding_free": NONE,
    "share_prompts": NONE,
    "vllm_lora_mode": NONE,
    "vllm_sleep_level": NONE,
    "vllm_enforce_eager": NONE,
    "vllm_engine_kwargs": NONE,
    "vllm_weight_check_bound": NONE,
    "vllm_server_allow_remote": NONE,
    "vllm_request_timeout": NONE,
    "vllm_sync_dir": NONE,
    "eval_temperature": NONE,
    "save_completions": NONE,
}

#: Defaults of TRL 1.16 that differ from ours.
TRL_DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "logging_nan_inf_filter": True,
    "bf16": None,
    "gradient_checkpointing": True,
    "use_bias_correction_kl": True,
    "top_k": 0,
    "vllm_server_host": "0.0.0.0",
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_cap": None,
    "vllm_importance_sampling_clip_max": 3.0,
    "num_generations_eval": None,
    "num_completions_to_print": None,
}

#: Settings that are arguments of TRL's trainer constructor, also in Unsloth unless `UNSLOTH_NAMES` renames them.
CONSTRUCTOR = {
    "model": "`model`",
    "dtype": "`model_init_kwargs`",
    "dataset": "`train_dataset`",
    "reward_funcs": "`reward_funcs`",
    "lora": "`peft_config`",
}

#: Unsloth's names for settings outside GRPOConfig: arguments of ``FastLanguageModel.from_pretrained`` by default.
UNSLOTH_NAMES = {
    "model": "`model_name`",
    "dtype": "`dtype`",
    "use_vllm": "`fast_inference`",
    "vllm_gpu_memory_utilization": "`gpu_memory_utilization`",
    "vllm_max_model_length": "`max_seq_length`",
    "lora": "`get_peft_model`",
    "lora.r": "`get_peft_model(r)`",
    "lora.alpha": "`get_peft_model(lora_alpha)`",
    "lora.dropout": "`get_peft_model(lora_dropout)`",
    "lora.target_modules": "`get_peft_model(target_modules)`",
}

#: Defaults that differ between Unsloth's GRPOConfig and TRL's (Unsloth of August 2026).
UNSLOTH_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "loss_type": "bnpo",
    "beta": 0.001,
    "vllm_importance_sampling_correction": False,
    "top_k": None,
    "generation_kwargs": {},
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
    "weight_decay": 0.001,
    "warmup_steps": 0.1,
    "seed": 3407,
    "optim": "adamw_8bit",
    "bf16": False,
}

#: The fields of `transformers.TrainingArguments` that GRPO runs set most often.
INHERITED = {
    "output_dir": "Folder for checkpoints, metrics.jsonl and completions.",
    "per_device_train_batch_size": "Completions, not prompts, of a micro-batch on one device.",
    "gradient_accumulation_steps": "Micro-batches of an optimizer step.",
    "num_train_epochs": "Passes over the prompts, if max_steps is not set.",
    "max_steps": "Optimizer steps of the run; -1 = as many as num_train_epochs takes.",
    "lr_scheduler_type": "Shape of the learning rate over the run.",
    "warmup_steps": "Optimizer steps until the full learning rate; a number below 1 is a share of all steps.",
    "weight_decay": "Weight decay of the optimizer.",
    "max_grad_norm": "Gradients with a larger norm are scaled down to it.",
    "optim": "The optimizer.",
    "bf16": "Compute the forward in bfloat16 (autocast); the weights keep their type.",
    "fp16": "Compute the forward in float16 with a gradient scaler; the weights keep their type.",
    "gradient_checkpointing": "Keep a layer's input only and compute the layer again in backward: less memory.",
    "gradient_checkpointing_kwargs": "Arguments of the checkpointing; your own replace this package's cheaper way.",
    "seed": "Seed of the order of prompts, of sampling, and of a new adapter.",
    "eval_strategy": "When to evaluate: no, steps or epoch.",
    "eval_steps": "Optimizer steps between two evaluations.",
    "per_device_eval_batch_size": "Completions generated at a time in evaluation.",
    "save_strategy": "When to save a checkpoint: no, steps, epoch or best.",
    "save_steps": "Optimizer steps between two checkpoints.",
    "save_total_limit": "Checkpoints to keep; older ones are deleted.",
    "load_best_model_at_end": "Load the checkpoint with the best metric_for_best_model (default: reward) at the end.",
    "report_to": "Loggers of transformers that get the metrics, such as tensorboard or wandb.",
    "resume_from_checkpoint": "On the command line: continue from this checkpoint; true = the newest of the folder.",
    "ddp_timeout": "Seconds that processes wait for each other before the run fails.",
    "fsdp": "Shard the model over processes (FSDP): true, or an option of transformers.",
    "deepspeed": "File or mapping with a DeepSpeed configuration (ZeRO).",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: the name in YAML; the command line adds two dashes.
        default: the Python value; empty if the setting is required.
        type: the annotation in words.
        help: one or two sentences.
        trl, unsloth: ``same``, another name, a different default, or a dash.
    """

    name: str
    default: str
    type: str
    help: str
    trl: str = SAME
    unsloth: str = SAME


def run_settings() -> Iterator[Setting]:
    """The settings of a run file that are not fields of `GRPOConfig`."""
    for prefix, cls in (("", RunSettings), ("dataset.", DatasetSettings), ("lora.", LoraSettings)):
        for field in dataclasses.fields(cls):
            if prefix or field.name != "trainer":  # `trainer` contains the fields of GRPOConfig
                name = prefix + field.name
                trl = CONSTRUCTOR.get(name, NONE)
                yield _setting(field, cls, name, trl=trl, unsloth=UNSLOTH_NAMES.get(name, trl))


def trainer_settings() -> dict[str, list[Setting]]:
    """The fields that `GRPOConfig` defines, by group."""
    groups: dict[str, list[Setting]] = {}
    title = ""
    for field in dataclasses.fields(GRPOConfig):
        if "help" in field.metadata and field.name in GRPOConfig.__annotations__:
            title = GROUPS.get(field.name, title)
            groups.setdefault(title, []).append(_setting(field, GRPOConfig))
    # Fields that TrainingArguments also defines come first in `fields`: restore the order of GROUPS.
    return {title: groups[title] for title in GROUPS.values()}


def inherited_settings() -> Iterator[Setting]:
    """The most used fields of `transformers.TrainingArguments`."""
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for name, text in INHERITED.items():
        yield _setting(fields[name], GRPOConfig, help_text=text)


def loss_settings() -> Iterator[Setting]:
    """The fields of `LossConfig`."""
    for field in dataclasses.fields(LossConfig):
        yield _setting(field, LossConfig)


def page() -> str:
    """The text of docs/settings/fields.md."""
    parts = [HEAD, "## The run file\n", RUN_FILE, _table(run_settings())]
    parts += ["## GRPOConfig\n", CONFIG]
    for title, settings in trainer_settings().items():
        parts += [f"### {title}\n", _table(settings)]
    parts += ["## Inherited from TrainingArguments\n", TRANSFORMERS, _table(inherited_settings())]
    parts += ["## LossConfig\n", LOSS, _table(loss_settings(), elsewhere=False)]
    return "\n".join(parts)


HEAD = """# All settings

<!-- Generated: python -m grpo_ext.cli.fields docs/settings/fields.md -->

Looking for the setting that cures a symptom? See [choosing settings](choosing.md).

A field has the same name in `GRPOConfig(...)`, in a run's YAML file and, as `--field value`, on the command line.
The columns *TRL* and *Unsloth* compare with `GRPOConfig` of TRL 1.16 and with Unsloth of August 2026:

- *same*: same name and same default;
- a value: same name, that default;
- a name: the setting goes by that name;
- –: no such setting.
"""

RUN_FILE = """These fields belong to `grpo-ext train`, not to `GRPOConfig`. A field of a section is indented in YAML and
has a dot on the command line: `--lora.r 8`. Values may be written as YAML or as a command line gives them: `2e-4`,
`true`, `null`, and lists with commas. A name that does not exist is an error that suggests the nearest one.

In TRL you write these as arguments of the trainer's constructor. The *Unsloth* column names arguments of
`FastLanguageModel.from_pretrained`, or of the function it gives.
"""

CONFIG = """The fields that this package defines, or whose default it changes.
"""

TRANSFORMERS = """`GRPOConfig` accepts every field of `transformers.TrainingArguments`. These are set most often.

`grpo-ext train` changes three defaults: `output_dir` is `runs/NAME-OF-THE-FILE`, numbered if it exists; `report_to` is
`tensorboard`; `save_strategy` is `no`.
"""

LOSS = """The constants of a loss call without the trainer. `GRPOConfig.loss_config()` fills them from the fields of the
same names.
"""


def _setting(
    field: dataclasses.Field[Any],
    cls: type,
    name: str | None = None,
    *,
    help_text: str | None = None,
    trl: str | None = None,
    unsloth: str | None = None,
) -> Setting:
    text = help_text or field.metadata.get("help") or _attributes(cls).get(field.name, "")
    trl = trl or NOT_IN_TRL.get(field.name) or _other_default(field.name, TRL_DEFAULTS)
    if unsloth is None:
        inherited = NONE if field.name in NOT_IN_TRL else trl  # Unsloth's class derives from TRL's
        own = _other_default(field.name, UNSLOTH_DEFAULTS) if field.name in UNSLOTH_DEFAULTS else inherited
        unsloth = UNSLOTH_NAMES.get(field.name, own)
    default = _default(field)
    return Setting(
        name or field.name,
        default,
        _type(field.type),
        text,
        SAME if trl == default else trl,
        SAME if unsloth == default else unsloth,
    )


def _other_default(name: str, defaults: dict[str, Any]) -> str:
    return f"`{defaults[name]!r}`" if name in defaults else SAME


def _type(annotation: Any) -> str:
    """An annotation in words: without module names and aliases, with sections of the run file as mappings."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"Literal\[.*True.*?\]", "str | bool", text)
    text = re.sub(r"\b[a-z_]\w*\.", "", text.replace("NoneType", "None"))
    text = re.sub(r"\b(LossType|Level|ImportanceMode|SchedulerType|OptimizerNames|\w+Strategy)\b", "str", text)
    text = re.sub(r"\b(\w+Settings|dict)\b(\[.*?\])?", "mapping", text)
    return " or ".join(dict.fromkeys(text.split(" | ")))


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return ""
    return f"`{(value.value if isinstance(value, Enum) else value)!r}`"


def _attributes(cls: type) -> dict[str, str]:
    """Parse the ``Attributes`` of a docstring to a dict; several names may share a text."""
    section = (cls.__doc__ or "").partition("Attributes:\n")[2]
    section = re.split(r"\n\s*\n", section)[0]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _table(settings: Iterator[Setting] | list[Setting], elsewhere: bool = True) -> str:
    lines = []
    for setting in settings:
        default = f"{setting.default} ({setting.type})" if setting.default else f"required ({setting.type})"
        cells = [f"`{setting.name}`", default, _sentence(setting.help)]
        lines.append("| " + " | ".join(cells + ([setting.trl, setting.unsloth] if elsewhere else [])) + " |")
    head = ["field", "default (type)", "meaning"] + (["TRL", "Unsloth"] if elsewhere else [])
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines, ""])


def _sentence(text: str) -> str:
    text = text.replace("``", "`").replace("|", "\\|").rstrip(".")
    is_word = re.match(r"[a-z]+ ", text) is not None  # not a name such as token_truncate
    return f"{text[:1].upper() if is_word else text[:1]}{text[1:]}." if text else ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
