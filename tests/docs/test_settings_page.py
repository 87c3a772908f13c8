"""The page of all settings is generated from the code, complete, and correct about TRL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from grpo_ext.cli import fields
from grpo_ext.cli.settings import DatasetSettings, LoraSettings, RunSettings
from grpo_ext.config import LossConfig
from grpo_ext.trainer import GRPOConfig

PAGE = Path(__file__).parents[2] / "docs/settings/fields.md"
TRAINER = [setting for group in fields.trainer_settings().values() for setting in group]
ALL = [*fields.run_settings(), *TRAINER, *fields.inherited_settings(), *fields.loss_settings()]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == fields.page(), (
        "run: python -m grpo_ext.cli.fields docs/settings/fields.md"
    )


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.name)
def test_every_setting_has_a_short_help(setting: fields.Setting) -> None:
    assert 2 <= len(setting.help.split()) <= 30, setting.help
    assert "\n" not in setting.help


def names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def test_every_field_is_there() -> None:
    base = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = [f.name for f in dataclasses.fields(GRPOConfig) if f.name not in base or f.default != base[f.name]]
    assert [setting.name for setting in TRAINER] == ours
    assert [setting.name for setting in fields.loss_settings()] == names(LossConfig)
    run = [
        *names(RunSettings),
        *(f"dataset.{n}" for n in names(DatasetSettings)),
        *(f"lora.{n}" for n in names(LoraSettings)),
    ]
    assert [setting.name for setting in fields.run_settings()] == [name for name in run if name != "trainer"]


def test_what_it_says_about_trl() -> None:
    trl = pytest.importorskip("trl")
    theirs: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    for setting in [*TRAINER, *fields.inherited_settings()]:
        if setting.name in theirs:
            said = setting.default if setting.trl == fields.SAME else setting.trl
            value = theirs[setting.name]
            assert said == f"`{getattr(value, 'value', value)!r}`", setting.name
        else:
            assert setting.name in fields.NOT_IN_TRL, setting.name
