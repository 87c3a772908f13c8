"""Encoding, padding, the cut after the first end token, sampling parameters, shared prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import EOS, PAD, WORDS, build_model, build_tokenizer

from grpo_ext.generation.engine import PromptEncoder, SamplingParams, TransformersEngine, cut_after_end, end_token_ids
from grpo_ext.modules.prompt_cache import position_ids, shared_prompt_cache
from grpo_ext.update.micro_batch import left_pad, right_pad, unique_rows


def test_cut_where_pad_is_eos() -> None:
    tokens = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8], [5, 6, 7, 0]])
    ids, finished = cut_after_end(tokens, [EOS])
    assert ids == [[5, 6, 0], [0], [5, 6, 7, 8], [5, 6, 7, 0]]
    assert finished == [True, True, False, True]


def test_cut_with_several_end_tokens() -> None:
    ids, finished = cut_after_end(torch.tensor([[5, 9, 0, 1], [5, 6, 7, 8]]), [0, 9])
    assert ids == [[5, 9], [5, 6, 7, 8]]
    assert finished == [True, False]


def test_padding_and_positions() -> None:
    ids, mask = left_pad([[5, 6, 7], [8]], PAD)
    assert ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    ids, mask = right_pad([[5, 6, 7], [8]], EOS)
    assert ids.tolist() == [[5, 6, 7], [8, EOS, EOS]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_unique_rows() -> None:
    assert unique_rows([[1], [1], [2, 3], [1]]) == ([0, 2], [0, 0, 1, 0])


def test_encode_text_and_chat() -> None:
    encoder = PromptEncoder(build_tokenizer())
    text, chat = encoder.encode(["add 3 =", [{"role": "user", "content": "add 3"}]])
    words = {word: i for i, word in enumerate(WORDS)}
    assert text == [words["add"], words["3"], words["="]]
    assert chat == [words["user:"], words["add"], words["3"], words["assistant:"]]
    assert encoder.decode([[words["3"], EOS], [words["="]]]) == ["3", "="]


def test_long_prompt_keeps_its_end() -> None:
    ids = PromptEncoder(build_tokenizer(), max_prompt_length=2).encode(["add 3 ="])[0]
    assert ids == [WORDS.index("3"), WORDS.index("=")]


def test_prompt_beyond_the_context() -> None:
    encoder = PromptEncoder(build_tokenizer(), context_length=8, max_completion_length=5)
    assert encoder.encode(["add 1 ="])
    message = r"prompt 1 has 4 tokens; with max_completion_length=5 that exceeds the model's context of 8.*=3 "
    with pytest.raises(ValueError, match=message):
        encoder.encode(["add 1", "add 1 = ="])


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt 0 has no tokens"),
        (7, TypeError, "prompt 0 is int: pass text, or a list of chat messages"),
        ([], TypeError, "prompt 0 is list"),
        (["add"], TypeError, "prompt 0 is list"),
    ],
)
def test_prompt_that_cannot_be_encoded(prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PromptEncoder(build_tokenizer()).encode([prompt])


def test_end_tokens_of_model_and_tokenizer() -> None:
    model = build_model()
    model.generation_config.eos_token_id = [4, 9]
    assert end_token_ids(model, build_tokenizer()) == [EOS, 4, 9]


PROMPTS = [[5, 8, 6], [5, 8, 6], [5, 9], [5, 8, 6], [7], [5, 9]]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_shared_prefill_gives_the_same_tokens(kind: str) -> None:
    model = build_model(kind)
    shared, plain = (TransformersEngine([EOS], PAD, share).generate(model, PROMPTS, GREEDY) for share in (True, False))
    assert shared == plain
    assert plain.ids[0] == plain.ids[1]


def test_row_does_not_depend_on_the_padding() -> None:
    model, engine = build_model(), TransformersEngine([EOS], PAD)
    alone = [engine.generate(model, [prompt], GREEDY).ids[0] for prompt in PROMPTS]
    assert engine.generate(model, PROMPTS, GREEDY).ids == alone


def test_shared_cache_is_refused_for_sliding_windows() -> None:
    model = build_model(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    ids, mask = left_pad([[5, 8, 6], [5, 9, 6]], PAD)
    assert shared_prompt_cache(model, ids, mask, torch.tensor([0, 0, 1])) is None
    engine = TransformersEngine([EOS], PAD)
    engine.generate(model, PROMPTS, GREEDY)
    assert engine.share_prompts is False


def test_model_mode_and_settings_are_restored() -> None:
    model = build_model()
    model.train()
    before = model.generation_config
    TransformersEngine([EOS], PAD).generate(model, PROMPTS, GREEDY)
    assert model.training
    assert model.generation_config is before


def test_settings_shipped_with_the_model_do_not_leak_in() -> None:
    model, engine = build_model(), TransformersEngine([EOS], PAD)
    sampling = SamplingParams(max_new_tokens=6)
    torch.manual_seed(1)
    expected = engine.generate(model, PROMPTS, sampling)
    model.generation_config.update(top_k=1, top_p=0.1, min_p=0.9, no_repeat_ngram_size=1, max_new_tokens=1)
    torch.manual_seed(1)
    assert engine.generate(model, PROMPTS, sampling) == expected


@pytest.mark.parametrize(
    "strict", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}, {"extra": {"top_k": 1}}]
)
def test_sampling_parameters_reach_the_model(strict: dict[str, Any]) -> None:
    model, engine = build_model(), TransformersEngine([EOS], PAD)
    greedy = engine.generate(model, PROMPTS, GREEDY)
    torch.manual_seed(0)
    assert engine.generate(model, PROMPTS, SamplingParams(6)) != greedy
    assert engine.generate(model, PROMPTS, SamplingParams(6, **strict)) == greedy


def test_repetition_penalty_reaches_the_model() -> None:
    engine = TransformersEngine([EOS], PAD)
    ids = engine.generate(build_model(), [[5, 8]], SamplingParams(8, 0.0, repetition_penalty=1e6)).ids[0]
    assert len(set(ids)) == len(ids)


def test_completion_lengths() -> None:
    done = TransformersEngine(list(range(len(WORDS))), PAD).generate(build_model(), PROMPTS, GREEDY)
    assert [len(ids) for ids in done.ids] == [1] * 6
    assert all(done.finished)
    cut = TransformersEngine([10_000], PAD).generate(build_model(), PROMPTS, GREEDY)
    assert [len(ids) for ids in cut.ids] == [6] * 6
    assert not any(cut.finished)


def test_end_tokens_of_the_generation_kwargs() -> None:
    """Rows that end at them are cut there, and are finished: what follows is padding."""
    ends, told = list(range(2, 12)), {}
    sampling = SamplingParams(12, extra={"eos_token_id": ends})
    done = TransformersEngine([EOS], PAD).generate(
        build_model(), [[5, 8, 6]] * 8, sampling, lambda row, ids: told.update({row: ids})
    )
    assert sum(done.finished) >= 4
    for row, (ids, finished) in enumerate(zip(done.ids, done.finished, strict=True)):
        assert finished == (ids[-1] in ends)
        assert not any(i in ends for i in ids[:-1])
        assert told[row] == ids
    one = TransformersEngine([EOS], PAD).generate(
        build_model(), [[5, 8, 6]] * 8, SamplingParams(3, extra={"eos_token_id": 7})
    )
    assert all(len(ids) == 3 or ids[-1] == 7 for ids in one.ids)


def test_a_field_that_transformers_does_not_know() -> None:
    with pytest.raises(
        ValueError, match="generation_kwargs has 'min_tokens', which transformers' GenerationConfig does"
    ):
        TransformersEngine([EOS], PAD).generate(build_model(), [[5]], SamplingParams(3, extra={"min_tokens": 2}))
