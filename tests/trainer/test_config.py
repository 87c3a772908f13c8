"""Defaults of SPEC section 6 and the message of every rule."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from grpo_ext import LossConfig
from grpo_ext.trainer import GRPOConfig

DEFAULTS = {
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "reward_weights": None,
    "scale_rewards": "group",
    "loss_type": "dapo",
    "mask_truncated_completions": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_cap": 2.0,
    "top_entropy_quantile": 1.0,
    "use_bias_correction_kl": False,
    "off_policy_mask_threshold": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2,
    "vespo_lambda_pos": 3,
    "vespo_k_neg": 3,
    "vespo_lambda_neg": 2,
    "entropy_coef": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "num_generations": 8,
    "max_prompt_length": None,
    "max_completion_length": 512,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "use_vllm": False,
    "vllm_mode": "colocate",
}

Make = Callable[..., GRPOConfig]


def own_fields() -> list[dataclasses.Field[Any]]:
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    return [f for f in dataclasses.fields(GRPOConfig) if f.name not in inherited]


def test_defaults_of_the_specification() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    assert {name: fields[name] for name in DEFAULTS} == DEFAULTS


def test_every_field_has_one_help_text() -> None:
    for field in own_fields():
        assert field.metadata.get("help", "").endswith("."), field.name


def test_every_loss_constant_is_a_field() -> None:
    names = {f.name for f in dataclasses.fields(GRPOConfig)}
    # these belong to the model: its forward applies them before the logits arrive
    assert {f.name for f in dataclasses.fields(LossConfig)} - names == {"logit_softcap", "logit_scale"}


def test_loss_config_takes_over_the_fields(make_config: Make) -> None:
    config = make_config(loss_type="dr_grpo", epsilon_high=0.28, temperature=0.7, beta=0.04).loss_config()
    assert config == LossConfig(
        loss_type="dr_grpo", epsilon_high=0.28, temperature=0.7, beta=0.04, max_completion_length=5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_k": -1}, r"top_k must be at least 0 \(0 or None = off\), got -1"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, got 0.0"),
        ({"eval_temperature": -1.0}, r"eval_temperature must be 0 \(greedy\) or between .*, got -1.0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_generations_eval": 0}, "num_generations_eval must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32; got 'int8'"),
        ({"scale_rewards": "row"}, "scale_rewards must be one of group, batch, none, True or False; got 'row'"),
        ({"vllm_mode": "cloud"}, "vllm_mode must be one of colocate, server; got 'cloud'"),
        ({"vllm_mode": "remote"}, "vllm_mode must be one of colocate, server; got 'remote'"),
        ({"vllm_lora_mode": "hot"}, "vllm_lora_mode must be one of None, adapter, merged; got 'hot'"),
        ({"vllm_sleep_level": 3}, "vllm_sleep_level must be one of 1, 2; got 3"),
        ({"vllm_gpu_memory_utilization": 0}, r"vllm_gpu_memory_utilization must be in \(0, 1\], got 0"),
        ({"vllm_max_model_length": 0}, "vllm_max_model_length must be at least 1, got 0"),
        ({"vllm_request_timeout": -1}, "vllm_request_timeout must be positive, got -1"),
        ({"vllm_mode": "server", "vllm_tensor_parallel_size": 2}, "start a server with --tensor-parallel-size instead"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, r"must divide the number of processes \(1\)"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo, dr_grpo, dapo, .*; got 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token, sequence"),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must be in \(0, 1\], got 0.0"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"head_memory_budget": 0}, "head_memory_budget must be at least 1, got 0"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps must be at least 1, got 0"),
        ({"beta": 0.1, "ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1, got 0"),
        ({"ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha must be in \(0, 1\], got 1.5"),
        ({"sync_ref_model": True}, "sync_ref_model=True needs a reference model, and beta=0 loads none"),
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
        ({"steps_per_generation": 2, "generation_batch_size": 12}, "set only one of them"),
        ({"use_fused_head": "false"}, "use_fused_head must be True or False or None, got 'false': pass a bool"),
        ({"shuffle_dataset": "no"}, "shuffle_dataset must be True or False, got 'no'"),
        ({"use_bias_correction_kl": 1}, "use_bias_correction_kl must be True or False, got 1"),
        ({"logging_nan_inf_filter": "false"}, "logging_nan_inf_filter must be True or False, got 'false'"),
        ({"max_completion_length": 2.5}, "max_completion_length must be a whole number, got 2.5: pass an int"),
        ({"num_generations": True}, "num_generations must be a whole number, got True"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size must be a whole number or None, got 2.5"),
        ({"epsilon": "0.2"}, "epsilon must be a number, got '0.2': pass a float or an int"),
        ({"learning_rate": "1e-6"}, "learning_rate must be a number, got '1e-6'"),
        ({"temperature": 1e-45}, "temperature must be positive and finite, got 1e-45"),
        ({"eval_temperature": 1e-45}, "eval_temperature must be 0 .* between 1.2e-38 and 3.4e38, got 1e-45"),
        ({"eval_temperature": math.nan}, "eval_temperature must be a number, got nan"),
        ({"vllm_server_timeout": math.nan}, "vllm_server_timeout must be a number, got nan"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be positive and finite, got inf"),
        ({"reward_weights": [1.0, "2"]}, "reward_weights must be a number, got '2'"),
        ({"reward_weights": [1.0, math.nan]}, r"reward_weights must be finite, got \[1.0, nan\]"),
        ({"generation_kwargs": {"top_p": "0.9"}}, r"generation_kwargs\['top_p'\] must be a number, got '0.9'"),
        ({"generation_batch_size": 10}, r"generation_batch_size \(10\) must be divisible by per_device_train"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, r"\(3\) and gradient_accumulation_steps \(2\)"),
    ],
)
def test_rule(make_config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_text_of_a_command_line_or_a_file_is_converted_before(tmp_path: Path) -> None:
    """`HfArgumentParser` and YAML convert true, false and numbers to values that the strict fields accept."""
    parser = HfArgumentParser(GRPOConfig)
    words = "--beta 0.1 --shuffle_dataset false --use_fused_head no --max_completion_length 7 --reward_weights 1 0.5"
    words += f" --scale_rewards true --use_cpu true --output_dir {tmp_path}"
    (parsed,) = parser.parse_args_into_dataclasses(words.split())
    text = "{beta: 0.1, shuffle_dataset: false, use_fused_head: no, max_completion_length: 7, reward_weights: [1, 0.5]}"
    (read,) = parser.parse_dict({**yaml.safe_load(text), "output_dir": str(tmp_path), "use_cpu": True})
    for config in (parsed, read):
        assert (config.beta, config.shuffle_dataset, config.use_fused_head) == (0.1, False, False)
        assert (config.max_completion_length, config.reward_weights) == (7, [1.0, 0.5])


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("", "group"),
        ("--scale_rewards batch", "batch"),
        ("--scale_rewards False", "none"),
        ("--scale_rewards true", "group"),
    ],
)
def test_a_command_line_of_transformers_needs_no_more_than_a_folder(tmp_path: Path, words: str, kept: str) -> None:
    parser = HfArgumentParser((GRPOConfig,))
    (config,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *words.split()])
    assert config.scale_rewards == kept


def test_numbers_of_numpy_become_plain(make_config: Make) -> None:
    config = make_config(beta=np.float32(0.5), max_completion_length=np.int64(7), save_completions=np.bool_(False))
    assert (config.beta, config.max_completion_length, config.save_completions) == (0.5, 7, False)
    assert type(config.max_completion_length) is int
    json.dumps(config.to_dict())


def test_delta_inside_the_clip_range_warns(make_config: Make) -> None:
    with pytest.warns(UserWarning, match=r"delta=1.1 is not above 1 \+ epsilon_high = 1.2"):
        make_config(delta=1.1)


def test_batch_raised_to_the_group(make_config: Make) -> None:
    with pytest.warns(UserWarning, match="per_device_train_batch_size is raised from 3 to 4"):
        config = make_config(per_device_train_batch_size=3, num_generations=4)
    assert config.per_device_train_batch_size == 4
    assert config.batch_plan.per_device_batch_size == 4


def test_few_prompts_warn(make_config: Make) -> None:
    with pytest.warns(UserWarning, match="only 2 different prompt"):
        make_config(per_device_train_batch_size=4)


def test_greedy_repeats_warn(make_config: Make) -> None:
    with pytest.warns(UserWarning, match="num_generations_eval=2 with eval_temperature=0 repeats") as caught:
        make_config(num_generations_eval=2)
    assert sum("repeats" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(("given", "kept"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_booleans(make_config: Make, given: str | bool, kept: str) -> None:
    assert make_config(scale_rewards=given).scale_rewards == kept


def test_best_model_is_the_one_of_the_highest_reward(make_config: Make) -> None:
    config = make_config(
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    assert config.metric_for_best_model == "reward"
    assert config.greater_is_better is True


def test_survives_a_round_trip(make_config: Make) -> None:
    config = make_config(generation_batch_size=12)
    fields = {k: v for k, v in config.to_dict().items() if k in {f.name for f in own_fields()}}
    assert make_config(**fields).batch_plan == config.batch_plan


def test_fsdp_from_a_command_line(tmp_path: Path) -> None:
    args = GRPOConfig(str(tmp_path), fsdp="true", fsdp_config={"transformer_layer_cls_to_wrap": ["A"]}, use_cpu=True)
    assert args.fsdp is True
    assert args.fsdp_plugin_args["fsdp_version"] == 2
    assert GRPOConfig(str(tmp_path), fsdp="false", use_cpu=True).fsdp_plugin_args is None


def test_generation_kwargs_with_fields_of_their_own(make_config: Make) -> None:
    config = make_config(
        top_p=0.5, generation_kwargs={"top_p": 0.9, "min_p": 0.1, "do_sample": True, "min_new_tokens": 2}
    )
    assert (config.top_p, config.min_p, config.generation_kwargs) == (0.9, 0.1, {"min_new_tokens": 2})
    assert make_config(generation_kwargs='{"top_k": 3}').top_k == 3
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 2"):
        make_config(generation_kwargs={"top_p": 2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, "has temperature=0.5: set temperature, by which the loss divides too"),
        ({"seed": 1}, "has seed=1: set the field seed; a seed in each request makes all completions of a prompt equal"),
        ({"num_return_sequences": 2}, "set num_generations"),
        ({"num_beams": 2}, "completions must be sampled from the policy"),
        ({"do_sample": False}, "greedy completions of a prompt are all equal"),
    ],
)
def test_generation_kwargs_that_the_trainer_must_know(make_config: Make, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(generation_kwargs=given)
