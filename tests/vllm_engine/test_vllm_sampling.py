"""Sampling parameters in vLLM's words, the warnings, and the check of the weights: no vLLM needed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from vllm_toys import CONTEXT, EOS, VOCABULARY, build_model, build_tokenizer, change_weights, needs_vllm

from grpo_ext.generation.engine import SamplingParams
from grpo_ext.generation.vllm import EngineError, WeightMismatchError
from grpo_ext.generation.vllm.check import LENGTH, TOP, WeightCheck
from grpo_ext.generation.vllm.client import Answer
from grpo_ext.generation.vllm.sampling import sampling_fields, warn_of_bias
from grpo_ext.trainer import GRPOConfig
from grpo_ext.trainer.engine import build_engine

IDS = list(range(3, VOCABULARY))


def test_fields() -> None:
    assert sampling_fields(SamplingParams(7, 0.5, 0.9, 3, 0.1, 1.2), [0, 4]) == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop_token_ids": [0, 4],
        "ignore_eos": True,
    }
    plain = sampling_fields(SamplingParams(7), [0])
    assert (plain["top_p"], plain["top_k"], plain["min_p"]) == (1.0, 0, 0.0)
    greedy = sampling_fields(SamplingParams(7, 0.0, 0.9, 3, 0.1), [0])
    assert (greedy["temperature"], greedy["top_p"], greedy["top_k"], greedy["min_p"]) == (0.0, 1.0, 0, 0.0)


def test_generation_kwargs() -> None:
    extra = {"min_new_tokens": 2, "eos_token_id": 5, "do_sample": True, "top_k": None}
    fields = sampling_fields(SamplingParams(7, top_k=4, extra=extra), [0])
    assert (fields["min_tokens"], fields["stop_token_ids"], fields["top_k"]) == (2, [5], 4)
    assert sampling_fields(SamplingParams(7, extra={"do_sample": False}), [0])["temperature"] == 0.0
    with pytest.raises(
        ValueError, match=r"generation_kwargs has 'num_beams', which vLLM does not know.*use_vllm=False"
    ):
        sampling_fields(SamplingParams(7, extra={"num_beams": 2}), [0])


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_a_cut_warns_of_the_bias(name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{name}=.* cuts off the tail.*ratio"):
        warn_of_bias(SamplingParams(7, **{name: {"top_p": 0.9, "top_k": 3, "min_p": 0.1}[name]}))


def test_a_penalty_warns_and_plain_sampling_does_not() -> None:
    with pytest.warns(UserWarning, match=r"repetition_penalty=1.1 changes vLLM.s distribution"):
        warn_of_bias(SamplingParams(7, repetition_penalty=1.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_bias(SamplingParams(7, 0.7))


@needs_vllm
def test_the_engine_is_built_with_the_warning(tmp_path: Path) -> None:
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", use_vllm=True, vllm_mode="server", top_p=0.9,
        vllm_server_base_url="http://127.0.0.1:1", vllm_server_timeout=0.1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"top_p=0.9 cuts off the tail"), pytest.raises(EngineError):
        build_engine(args, build_model(), build_tokenizer(), Accelerator(cpu=True), [EOS], lambda: 0)


class FakeEngine:
    """Answers from a model of its own, with noise."""

    def __init__(self, model: Any, noise: float = 0.0, shift: float = 0.0) -> None:
        self.model, self.noise, self.shift = model, noise, shift

    @torch.no_grad()
    def __call__(self, prompts: Any) -> list[Answer]:
        answers = []
        for prompt in prompts:
            rows = self.model.eval()(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            values, ids = rows.topk(TOP)
            values = values + self.noise * torch.randn(TOP) + self.shift
            answers.append(
                Answer([int(ids[0])], [float(values[0])], dict(zip(ids.tolist(), values.tolist(), strict=True)))
            )
        return answers


def test_check_compares_long_prefixes() -> None:
    check = WeightCheck(IDS, CONTEXT, torch.float32)
    assert max(check.lengths) == LENGTH
    assert min(check.lengths) > 128  # a block of the prefix cache on the CPU
    assert check(build_model(), FakeEngine(build_model())) < 1e-6
    assert check.prompt == WeightCheck(IDS, CONTEXT, torch.float32).prompt
    assert WeightCheck(IDS, 3, torch.float32).lengths == [1, 2]


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_rounding_passes_and_other_weights_do_not(dtype: torch.dtype, noise: float) -> None:
    model = build_model()
    check = WeightCheck(IDS, CONTEXT, dtype)
    for _ in range(20):  # many small updates that the engine follows, under the noise of its type
        check(model, FakeEngine(model, noise))
        change_weights(model, 1e-3)
    change_weights(model, 0.1)
    with pytest.raises(WeightMismatchError, match=r"differ from the trainer's by"):
        check(model, FakeEngine(build_model(), noise))


def test_bf16_sees_an_engine_that_stands_still() -> None:
    """A change well under the bound of bf16: the engine's values are exactly those of the step before."""
    model, other = build_model(), build_model()
    check = WeightCheck(IDS, CONTEXT, torch.bfloat16)
    check(model, FakeEngine(other))
    change_weights(model, 0.01)
    with pytest.raises(WeightMismatchError, match=r"still holds older weights"):
        check(model, FakeEngine(other))


def test_bf16_sees_an_engine_that_stands_still_while_steps_are_small() -> None:
    """Each step moves less than rounding does; ten together do not."""
    model, other = build_model(), build_model()
    check = WeightCheck(IDS, CONTEXT, torch.bfloat16)

    def train() -> None:
        for _ in range(60):
            check(model, FakeEngine(other))
            change_weights(model, 5e-4)

    with pytest.raises(WeightMismatchError, match=r"still holds older weights"):
        train()


def test_an_engine_that_follows_small_steps_passes() -> None:
    model = build_model()
    check = WeightCheck(IDS, CONTEXT, torch.bfloat16)
    for _ in range(60):
        check(model, FakeEngine(model, 0.01))
        change_weights(model, 5e-4)


def test_a_bound_of_the_user() -> None:
    model = build_model()
    with pytest.raises(WeightMismatchError, match=r"by 0.02 nats on average \(bound 0.01\)"):
        WeightCheck(IDS, CONTEXT, torch.float32, 0.01)(model, FakeEngine(model, shift=0.02))
    assert WeightCheck(IDS, CONTEXT, torch.float32, float("inf"))(model, FakeEngine(model, shift=9.0)) == pytest.approx(
        9
    )
    with pytest.raises(WeightMismatchError, match=r"by nan nats"):
        WeightCheck(IDS, CONTEXT, torch.float32)(model, FakeEngine(model, shift=float("nan")))
