"""The held-out measurement on the toy model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from grpo_ext.generation.engine import SamplingParams
from grpo_ext.tasks import arithmetic_datasets, load_model, number_reward
from grpo_ext.tasks.heldout import heldout_reward
from grpo_ext.trainer import RewardError

FIVE = SamplingParams(max_new_tokens=5)


@pytest.fixture(scope="module")
def model_and_tokenizer(toy_model: Path) -> Any:
    return load_model(str(toy_model))


@pytest.fixture(scope="module")
def questions() -> Dataset:
    return arithmetic_datasets("products", heldout=3)[1]


def test_folder_model_is_ready_for_batches(model_and_tokenizer: Any) -> None:
    model, tokenizer = model_and_tokenizer
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<end>"


def test_mean_over_questions_and_samples(model_and_tokenizer: Any, questions: Dataset) -> None:
    seen: dict[str, Any] = {}

    def index_reward(prompts: list, completions: list, completion_ids: list, answer: list) -> list[float]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer)
        return [float(index // 4) for index in range(len(completions))]

    model, tokenizer = model_and_tokenizer
    result = heldout_reward(model, tokenizer, questions, index_reward, FIVE, samples=4, batch_size=5)
    assert result.reward == 1.0  # questions score 0, 1 and 2
    assert result.stderr == pytest.approx(1 / math.sqrt(3))
    assert [sample["reward"] for sample in result.samples] == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert seen["answer"] == [answer for answer in questions["answer"] for _ in range(4)]
    assert seen["completions"][0][0]["role"] == "assistant"
    assert all(1 <= len(ids) <= 5 and 1 not in ids[:-1] for ids in seen["ids"])


def test_same_seed_same_answers_and_nothing_else_changes(model_and_tokenizer: Any, questions: Dataset) -> None:
    model, tokenizer = model_and_tokenizer
    model.train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (
        heldout_reward(model, tokenizer, questions, number_reward, FIVE, samples=2, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.samples != other.samples
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_weights_none_and_async_rewards(model_and_tokenizer: Any, questions: Dataset) -> None:
    model, tokenizer = model_and_tokenizer

    async def first_question_only(completions: list, **columns: Any) -> list[float | None]:
        return [2.0 if index < 2 else None for index in range(len(completions))]

    def nan(completions: list, **columns: Any) -> list[float]:
        return [math.nan] * len(completions)

    result = heldout_reward(
        model, tokenizer, questions, [first_question_only, nan], FIVE, reward_weights=[0.5, 1.0], samples=2
    )
    assert result.reward == 1.0
    assert [sample["reward"] for sample in result.samples] == [1.0, 1.0, None, None, None, None]


def test_text_prompts_give_text_completions(model_and_tokenizer: Any) -> None:
    model, tokenizer = model_and_tokenizer
    rows = Dataset.from_list([{"prompt": "7 * 8 ="}, {"prompt": "a longer question"}])

    def is_text(completions: list, **columns: Any) -> list[float]:
        return [float(isinstance(completion, str)) for completion in completions]

    assert heldout_reward(model, tokenizer, rows, is_text, FIVE, samples=1).reward == 1.0


def test_bad_calls(model_and_tokenizer: Any, questions: Dataset) -> None:
    model, tokenizer = model_and_tokenizer

    def short(completions: list, **columns: Any) -> list[float]:
        return [0.0]

    with pytest.raises(ValueError, match="held-out dataset is empty"):
        heldout_reward(model, tokenizer, questions.select([]), number_reward, FIVE)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        heldout_reward(model, tokenizer, questions, number_reward, FIVE, samples=0)
    with pytest.raises(RewardError, match="'short' returned 1 value"):
        heldout_reward(model, tokenizer, questions, short, FIVE, samples=2)


def test_prompts_are_cut_and_measured_as_in_training(model_and_tokenizer: Any, questions: Dataset) -> None:
    model, tokenizer = model_and_tokenizer
    length = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"exceeds the model's context of {length}"):
        heldout_reward(model, tokenizer, questions, number_reward, SamplingParams(max_new_tokens=length))
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, ids, _o: seen.append(ids[0].shape[1]))
    heldout_reward(model, tokenizer, questions, number_reward, FIVE, samples=1, max_prompt_length=3)
    hook.remove()
    assert seen[0] == 2  # cut to three tokens the prompts are alike: the prefill they share is all but the last


def test_progress_counts_the_answers(
    model_and_tokenizer: Any, questions: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    for progress in (False, True):
        model, tokenizer = model_and_tokenizer
        heldout_reward(model, tokenizer, questions, number_reward, FIVE, samples=2, batch_size=4, progress=progress)
        assert ("6/6" in capsys.readouterr().err) is progress
