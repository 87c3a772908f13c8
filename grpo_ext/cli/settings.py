"""Read run files: the command's own fields, and every field of `GRPOConfig`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import yaml

from grpo_ext.cli.convert import SettingsError, convert, field_types, suggest
from grpo_ext.cli.run_files import CONFIG_FILE
from grpo_ext.tasks.arithmetic import TASKS


@dataclasses.dataclass
class DatasetSettings:
    """The dataset of a run.

    Attributes:
        task: the arithmetic task to generate: products, basic_arithmetic or chain_sum.
        path: a .jsonl or .json file with a ``prompt`` in each row, or a dataset's hub name.
        split: the split of a hub dataset to load.
        digits: digits of each operand of the task's questions.
        terms: operands in each of the task's questions.
        draws: the task's questions to draw, before duplicates are dropped.
        heldout: distinct questions to hold out; 0 trains on all of a file or hub dataset.
        seed: seed of the split into train and held-out; null = the run's seed.
    """

    task: str | None = None
    path: str | None = None
    split: str = "train"
    digits: int = 1
    terms: int = 2
    draws: int = 400
    heldout: int = 24
    seed: int | None = None


@dataclasses.dataclass
class LoraSettings:
    """The adapter.

    Attributes:
        r: rank of the adapter.
        alpha: scale of the adapter, before division by the rank; null = twice the rank.
        dropout: dropout probability of the adapter's input in training.
        target_modules: layers with an adapter: all-linear, or a list of names.
    """

    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclasses.dataclass
class RunSettings:
    """One run.

    Attributes:
        model: a packaged name, a folder, or a hub name.
        dtype: type of the weights: float32, bfloat16, float16, or auto: bfloat16 if the device multiplies it in
            hardware, else float32.
        dataset: the dataset's section, or one word for it: a task, a file or a hub name.
        reward_funcs: reward functions: ``number`` (the last number equals the row's ``answer``),
            ``package.module:function`` or ``file.py:function``.
        lora: the adapter's section; true = its defaults, null = train all weights.
        heldout_samples: answers sampled per held-out question, before and after training.
        trainer: the fields of `GRPOConfig` that were given.
    """

    model: str
    dataset: DatasetSettings
    dtype: str = "float32"
    reward_funcs: list[str] = dataclasses.field(default_factory=lambda: ["number"])
    lora: LoraSettings | None = None
    heldout_samples: int = 8
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The run's seed; 42 by default, as in transformers."""
        return int(self.trainer.get("seed", 42))

    def to_dict(self) -> dict[str, Any]:
        """The flat mapping that `from_mapping` reads."""
        flat = dataclasses.asdict(self)
        return flat | flat.pop("trainer")


def read_settings(path: str, arguments: Sequence[str] = ()) -> RunSettings:
    """Read a run file, and apply the ``--field value`` arguments of the command line.

    Raises:
        SettingsError: an unreadable file, an unknown field (with the nearest known name), or a wrong value.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold a mapping of field names to values")
    values = {str(key): value for key, value in values.items()}
    check_names(values, path)
    for name, value in parse_overrides(arguments).items():
        check_names({name: value}, "the command line")
        section, _, inner = name.partition(".")
        if inner:
            outer = values.get(section)
            # Expand a dataset given as one word to its mapping.
            outer = dataclasses.asdict(_dataset(outer)) if section == "dataset" and isinstance(outer, str) else outer
            values[section] = {**(outer or {}), inner: value}
        else:
            values[name] = value
    return from_mapping(values)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parse ``--field value``, ``--field=value`` and ``--section.field value``; a missing value means true."""
    overrides: dict[str, str] = {}
    waiting: str | None = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            overrides[name] = value if equals else "true"
            waiting = None if equals else name
        elif waiting is not None:
            overrides[waiting] = argument
            waiting = None
        else:
            raise SettingsError(f"unexpected argument {argument!r}: fields are given as --field value")
    return overrides


def check_names(values: dict[str, Any], where: str) -> None:
    """Raise a `SettingsError` for the first unknown field, with the nearest known name."""
    sections: dict[str, type] = {"dataset": DatasetSettings, "lora": LoraSettings}
    known = [*_own_fields(), *_trainer_fields()]
    dotted = [f"{name}.{inner}" for name, cls in sections.items() for inner in field_types(cls)]
    for name, value in values.items():
        if "." in name:
            if name not in dotted:
                raise SettingsError(f"unknown field {name!r} in {where}{suggest(name, dotted)}")
        elif name not in known:
            raise SettingsError(f"unknown field {name!r} in {where}{suggest(name, [*known, *dotted])}")
        elif name in sections and isinstance(value, dict):
            inner_names = field_types(sections[name])
            for inner in value:
                if inner not in inner_names:
                    raise SettingsError(
                        f"unknown field {inner!r} under {name!r} in {where}{suggest(str(inner), inner_names)}"
                    )


def from_mapping(values: dict[str, Any]) -> RunSettings:
    """Convert a flat mapping, with names checked by `check_names`, to typed settings.

    Raises:
        SettingsError: the model or dataset is missing, or a value has the wrong type.
    """
    for required in ("model", "dataset"):
        if not values.get(required):
            raise SettingsError(f"the run needs a {required!r} field")
    own: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    hints = field_types(RunSettings)
    trainer_hints = _trainer_fields()
    for name, value in values.items():
        if name == "dataset":
            own[name] = _dataset(value)
        elif name == "lora":
            own[name] = _lora(value)
        elif name in _own_fields():
            own[name] = convert(name, hints[name], value)
        else:
            trainer[name] = convert(name, trainer_hints[name], value)
    if "dtype" in own and "dtype" in trainer_hints:
        trainer["dtype"] = own["dtype"]
    settings = RunSettings(**own, trainer=trainer)
    if settings.heldout_samples < 1:
        raise SettingsError(f"heldout_samples must be at least 1, got {settings.heldout_samples}")
    return settings


def read_run(folder: str) -> RunSettings:
    """Read the settings of a run folder.

    Raises:
        SettingsError: not a run folder.
    """
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        raise SettingsError(f"{folder} is not a run folder: it has no {CONFIG_FILE}")
    return read_settings(path)


def _dataset(value: Any) -> DatasetSettings:
    if isinstance(value, str):
        value = {"task": value} if value in TASKS else {"path": value}
    if not isinstance(value, dict):
        raise SettingsError(f"dataset: {value!r} is neither a name nor a mapping")
    hints = field_types(DatasetSettings)
    dataset = DatasetSettings(**{name: convert(f"dataset.{name}", hints[name], v) for name, v in value.items()})
    if (dataset.task is None) == (dataset.path is None):
        raise SettingsError("dataset needs either a task or a path")
    if dataset.task is not None and dataset.task not in TASKS:
        raise SettingsError(
            f"dataset.task must be one of {', '.join(TASKS)}; got {dataset.task!r}{suggest(dataset.task, TASKS)}"
        )
    return dataset


def _lora(value: Any) -> LoraSettings | None:
    if isinstance(value, str):
        value = yaml.safe_load(value)
    if value is None or value is False:
        return None
    if value is True:
        return LoraSettings()
    if not isinstance(value, dict):
        raise SettingsError(f"lora: {value!r} is neither a mapping nor null")
    hints = field_types(LoraSettings)
    lora = LoraSettings(**{name: convert(f"lora.{name}", hints[name], v) for name, v in value.items()})
    if lora.r < 1:
        raise SettingsError(f"lora.r must be at least 1, got {lora.r}")
    return lora


def _own_fields() -> list[str]:
    return [name for name in field_types(RunSettings) if name != "trainer"]


def _trainer_fields() -> dict[str, Any]:
    from grpo_ext.trainer import GRPOConfig

    return field_types(GRPOConfig)
