"""Every rule of LossConfig and its error message."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from grpo_ext.config import IMPORTANCE_MODES, LEVELS, LOSS_TYPES, LossConfig


def test_defaults_are_those_of_the_specification() -> None:
    c = LossConfig()
    expected = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "beta": 0.0,
        "use_bias_correction_kl": False,
        "entropy_coef": 0.0,
        "temperature": 1.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2,
        "vespo_lambda_pos": 3,
        "vespo_k_neg": 3,
        "vespo_lambda_neg": 2,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_cap": 2.0,
    }
    assert {name: getattr(c, name) for name in expected} == expected


def test_known_names() -> None:
    # In this order, which the compiled code numbers them by; others may follow.
    assert LOSS_TYPES[:8] == ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
    assert LEVELS == ("token", "sequence")
    for loss_type in LOSS_TYPES:
        for level in LEVELS:
            LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=1)
    for mode in IMPORTANCE_MODES:
        assert LossConfig(vllm_importance_sampling_mode=mode).vllm_importance_sampling_mode == mode


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo.*'ppo'"),
        ({"loss_type": None}, "loss_type must be one of"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token, sequence"),
        ({"vllm_importance_sampling_mode": "clip"}, "vllm_importance_sampling_mode must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"logit_softcap": 0.0}, "logit_softcap must be positive"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"delta": math.inf}, "delta must be positive and finite"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be positive"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg must be positive"),
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
        ({"epsilon_high": -0.1}, "epsilon_high must be at least 0"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"beta": math.nan}, "beta must be at least 0 and finite"),
        ({"epsilon": None}, "epsilon must be a number, got None"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"beta": "0.1"}, "beta must be a number, got '0.1'"),
        ({"top_entropy_quantile": None}, "top_entropy_quantile must be a number, got None"),
        ({"vllm_importance_sampling_cap": None}, "vllm_importance_sampling_cap must be a number, got None"),
        ({"vllm_importance_sampling_clip_min": -1.0}, "vllm_importance_sampling_clip_min must be at least 0"),
        ({"logit_scale": math.inf}, "logit_scale must be finite"),
        ({"logit_scale": 0.0}, "logit_scale must not be 0"),
        ({"entropy_coef": math.nan}, "entropy_coef must be finite"),
        ({"off_policy_mask_threshold": math.inf}, "off_policy_mask_threshold must be finite"),
        ({"vespo_k_pos": math.nan}, "vespo_k_pos must be finite"),
        ({"vespo_lambda_neg": math.inf}, "vespo_lambda_neg must be finite"),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must be in \(0, 1\], got 0.0"),
        ({"top_entropy_quantile": 1.1}, "top_entropy_quantile must be in"),
        ({"top_entropy_quantile": math.nan}, "top_entropy_quantile must be finite, got nan"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"loss_type": "dr_grpo"}, "dr_grpo.*pass max_completion_length"),
        ({"vllm_importance_sampling_cap": 0.0}, "vllm_importance_sampling_cap must be positive"),
        ({"vllm_importance_sampling_clip_max": -2.0}, "must be positive"),
        (
            {"temperature": 1e-45},
            r"temperature must be positive and finite, got 1e-45 \(float32 holds 1.2e-38 to 3.4e38",
        ),
        ({"temperature": 10**400}, "temperature must be positive and finite, got 1000"),
        ({"logit_scale": 1e30, "temperature": 1e-30}, "logit_scale / temperature must be positive and finite, got 1e"),
        ({"logit_scale": 1e30, "logit_softcap": 1e-30}, "logit_scale / logit_softcap must be positive and finite"),
        ({"logit_softcap": 1e30, "temperature": 1e-30}, "logit_softcap / temperature must be positive and finite"),
        ({"sapo_temperature_neg": 1e-45}, "sapo_temperature_neg must be positive and finite, got 1e-45"),
        ({"epsilon": 1e39}, "epsilon must be at least 0 and finite, got 1e"),
        ({"epsilon": math.inf}, "epsilon must be at least 0 and finite, got inf"),
        ({"epsilon": True}, "epsilon must be a number, got True: pass a float or an int"),
        ({"epsilon_high": "0.3"}, "epsilon_high must be a number or None, got '0.3'"),
        ({"delta": 1 + 2j}, "delta must be a number or None, got"),
        ({"use_bias_correction_kl": "false"}, "use_bias_correction_kl must be True or False, got 'false': pass a bool"),
        (
            {"vllm_importance_sampling_correction": 0},
            "vllm_importance_sampling_correction must be True or False, got 0",
        ),
        ({"max_completion_length": 2.5}, "max_completion_length must be a whole number or None, got 2.5: pass an int"),
        ({"max_completion_length": True}, "max_completion_length must be a whole number or None, got True"),
        ({"vllm_importance_sampling_cap": -1.0}, "vllm_importance_sampling_cap must be positive"),
        ({"vllm_importance_sampling_clip_min": 3.0}, r"clip_min \(3.0\) exceeds the cap \(2.0\)"),
    ],
)
def test_complaints(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_numbers_of_numpy_and_torch_become_plain() -> None:
    fields: dict = {
        "epsilon": np.float32(0.25),
        "beta": torch.tensor(0.5),
        "max_completion_length": np.int64(7),
        "use_bias_correction_kl": np.bool_(True),
    }
    config = LossConfig(**fields)
    assert config == LossConfig(epsilon=0.25, beta=0.5, max_completion_length=7, use_bias_correction_kl=True)
    assert [type(getattr(config, name)) for name in fields] == [float, float, int, bool]


def test_a_cispo_cap_below_one_warns() -> None:
    with pytest.warns(UserWarning, match="absolute cap"):
        LossConfig(loss_type="cispo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossConfig(loss_type="cispo", epsilon_high=5.0)


def test_a_narrow_delta_warns() -> None:
    with pytest.warns(UserWarning, match=r"delta=1.2 is not above 1 \+ epsilon_high = 1.2"):
        LossConfig(delta=1.2)
    with pytest.warns(UserWarning, match="delta=1.2"):
        LossConfig(delta=1.2, epsilon_high=0.28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossConfig(delta=1.3)
        LossConfig(delta=1.2, loss_type="cispo", epsilon_high=5.0)


def test_derived_values() -> None:
    assert LossConfig().clip_high == 0.2
    assert LossConfig(epsilon_high=0.28).clip_high == 0.28
    assert LossConfig().importance_cap == 2.0
    assert LossConfig(vllm_importance_sampling_clip_max=3.0).importance_cap == 3.0
    assert LossConfig().importance_min == 0.0
    assert LossConfig(vllm_importance_sampling_clip_min=0.5).importance_min == 0.5


def test_frozen_and_replace() -> None:
    c = LossConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.beta = 1.0  # type: ignore[misc]
    assert c.replace(beta=0.1).beta == 0.1
    assert c.beta == 0.0
    with pytest.raises(ValueError, match="beta"):
        c.replace(beta=-1.0)
    assert hash(c) == hash(LossConfig())
