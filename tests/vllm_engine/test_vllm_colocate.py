"""vLLM in this process: the same tokens and log probabilities as the trainer, before and after updates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_toys import (
    CONTEXT,
    EOS,
    PAD,
    VOCABULARY,
    build_model,
    change_weights,
    engine_around,
    logps_of,
    needs_vllm,
    start_client,
    with_adapter,
)

from grpo_ext.generation.engine import SamplingParams, TransformersEngine
from grpo_ext.generation.vllm import EngineError, WeightMismatchError
from grpo_ext.generation.vllm import engine as engine_module
from grpo_ext.generation.vllm.colocate import ColocatedClient, cached_folder
from grpo_ext.generation.vllm.weights import write_config

pytestmark = needs_vllm

PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], list(range(3, 40)) * 4]
GREEDY = SamplingParams(8, temperature=0.0)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColocatedClient]:
    model = build_model()
    before = torch.get_rng_state()
    client = start_client(tmp_path_factory.mktemp("vllm"), model)
    # Starting an engine in the trainer's process leaves the trainer's random numbers and thread setting alone.
    assert torch.equal(before, torch.get_rng_state())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    yield client
    client.close()
    with pytest.raises(EngineError, match="was closed"):
        client.complete([[5]], {"max_tokens": 1})


def test_the_same_config_has_the_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's cache of compiled models goes by the path of the model."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))

    def keep(name: str, **changes: int) -> Path:
        write_config(build_model(**changes), tmp_path / name)
        return cached_folder(tmp_path / name)

    first = keep("first")
    assert first.is_relative_to(tmp_path / "cache")
    assert (first / "config.json").read_text() == (tmp_path / "first" / "config.json").read_text()
    assert keep("second") == first
    other = keep("other", num_hidden_layers=3)
    assert other != first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, other.name])
    (first / "config.json").unlink()  # somebody has tidied up
    assert keep("third") == first
    assert (first / "config.json").exists()
    (first / "config.json").rename(first / "other.json")
    assert keep("fourth") == tmp_path / "fourth"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "first" / "config.json"))  # no folder can be made in there
    assert keep("fifth") == tmp_path / "fifth"


def test_closing_leaves_what_is_kept(tmp_path: Path) -> None:
    client = ColocatedClient.__new__(ColocatedClient)
    client.folder, client.scratch = tmp_path / "kept", tmp_path / "scratch"
    for folder in (client.folder, client.scratch):
        folder.mkdir()
    client.close()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_greedy_tokens_and_log_probabilities(client: ColocatedClient, tmp_path: Path) -> None:
    model, engine = build_model(), engine_around(client, tmp_path)
    ours = engine.generate(model, PROMPTS, GREEDY)
    theirs = TransformersEngine([EOS], PAD).generate(model, PROMPTS, GREEDY)
    assert ours.ids == theirs.ids
    assert ours.finished == theirs.finished
    metrics = engine.pop_metrics()
    assert metrics["vllm/weight_check"] < 1e-5
    assert engine.pop_metrics() == {}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probabilities_are_the_trainers(
    client: ColocatedClient, tmp_path: Path, temperature: float
) -> None:
    model = build_model(1)
    done = engine_around(client, tmp_path).generate(model, PROMPTS, SamplingParams(12, temperature))
    assert done.sampling_logps is not None
    assert len({tuple(ids) for ids in done.ids}) > 2
    for prompt, ids, logps in zip(PROMPTS, done.ids, done.sampling_logps, strict=True):
        torch.testing.assert_close(torch.tensor(logps), logps_of(model, prompt, ids, temperature), atol=2e-5, rtol=0)


CUTS = {
    "top_p": SamplingParams(1, 1.3, top_p=0.6),
    "top_k": SamplingParams(1, 1.3, top_k=5),
    "min_p": SamplingParams(1, 1.3, min_p=0.2),
    "penalty": SamplingParams(1, 1.3, repetition_penalty=1.7),
    "all": SamplingParams(1, 0.8, 0.9, 20, 0.01, 1.2),
    "several": SamplingParams(1, 1.3, top_p=0.9, top_k=20, min_p=0.1),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_means_the_same_to_both_engines(client: ColocatedClient, tmp_path: Path, name: str) -> None:
    """400 draws: the same tokens can come, and vLLM reports what transformers' processed scores say."""
    model, sampling, prompt = build_model(2), CUTS[name], [5, 9, 5, 30, 9, 12]
    done = engine_around(client, tmp_path).generate(model, [prompt] * 400, sampling)
    config, cuts = TransformersEngine([EOS], PAD)._config(sampling)
    config.output_scores = config.return_dict_in_generate = True
    ids = torch.tensor([prompt])
    scores = model.generate(input_ids=ids, generation_config=config, logits_processor=cuts).scores[0][0]
    expected = scores.float().log_softmax(-1)
    assert done.sampling_logps is not None
    for ids, logps in zip(done.ids, done.sampling_logps, strict=True):
        assert logps[0] == pytest.approx(float(expected[ids[0]]), abs=1e-4)
    likely = {int(token) for token in (expected.exp() > 0.03).nonzero()}
    assert likely <= {ids[0] for ids in done.ids}
    if name != "penalty":
        assert int(expected.isfinite().sum()) < VOCABULARY  # the cut cut something


def test_every_end_token_ends(client: ColocatedClient, tmp_path: Path) -> None:
    engine = engine_around(client, tmp_path)
    engine.end_ids = list(range(0, VOCABULARY, 2))
    done = engine.generate(build_model(), [[5, 6]] * 20, SamplingParams(4))
    for ids, finished in zip(done.ids, done.finished, strict=True):
        assert finished == (ids[-1] % 2 == 0)
        assert all(token % 2 for token in ids[:-1])
    assert any(done.finished)
    assert not all(done.finished)


def test_answers_are_told_one_by_one_and_are_the_same(client: ColocatedClient, tmp_path: Path) -> None:
    """The loop that tells of each answer draws what `LLM.generate` draws, and tells before the end."""
    model, engine = build_model(8), engine_around(client, tmp_path)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    engine.end_ids = list(range(0, VOCABULARY, 8))
    sampling = SamplingParams(20, 1.0)
    engine.generate(model, prompts, sampling)  # the weights are there: both runs below draw from the same state
    torch.manual_seed(11)
    alone = engine.generate(model, prompts, sampling)
    told: list[tuple[int, list[int]]] = []
    at_step: list[int] = []
    steps, step = [0], client.llm.llm_engine.step

    def counted() -> Any:
        steps[0] += 1
        return step()

    client.llm.llm_engine.step = counted
    torch.manual_seed(11)
    got = engine.generate(model, prompts, sampling, lambda i, ids: (told.append((i, ids)), at_step.append(steps[0])))  # type: ignore[func-returns-value]
    del client.llm.llm_engine.step
    assert got == alone
    assert sorted(told) == list(enumerate(got.ids))
    assert [i for i, _ in told] != sorted(i for i, _ in told)
    assert at_step[0] < at_step[-1] <= steps[0]


def test_weights_are_handed_over_when_they_changed(client: ColocatedClient, tmp_path: Path) -> None:
    model, engine = build_model(3), engine_around(client, tmp_path)
    engine.generate(model, PROMPTS, GREEDY)
    assert "vllm/weight_check" in engine.pop_metrics()
    engine.generate(model, PROMPTS, GREEDY)
    assert engine.pop_metrics() == {}  # nothing changed
    change_weights(model)
    ours = engine.generate(model, PROMPTS, GREEDY)
    assert ours.ids == TransformersEngine([EOS], PAD).generate(model, PROMPTS, GREEDY).ids
    assert engine.pop_metrics()["vllm/weight_check"] < 1e-5


def test_stale_prefix_cache_is_caught(client: ColocatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = build_model(4), engine_around(client, tmp_path)
    engine.generate(model, PROMPTS, GREEDY)
    monkeypatch.setattr(client, "reset_cache", lambda: None)
    change_weights(model)
    with pytest.raises(WeightMismatchError, match="does not hold the trainer's weights"):
        engine.generate(model, PROMPTS, GREEDY)


def test_half_loaded_qkv_is_caught(client: ColocatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine_module.checkpoint_weights

    def without_keys(model: Any) -> Any:
        return ((name, tensor) for name, tensor in whole(model) if "layers.1.self_attn.k_proj" not in name)

    model, engine = build_model(5), engine_around(client, tmp_path)
    engine.generate(model, PROMPTS, GREEDY)
    monkeypatch.setattr(engine_module, "checkpoint_weights", without_keys)
    change_weights(model)
    with pytest.raises(WeightMismatchError, match="does not hold the trainer's weights"):
        engine.generate(model, PROMPTS, GREEDY)


def test_an_engine_that_stands_still_is_caught(
    client: ColocatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update far below the bound: only the comparison with the step before shows it."""
    model, engine = build_model(6), engine_around(client, tmp_path)
    engine.generate(model, PROMPTS, GREEDY)
    monkeypatch.setattr(client, "load_weights", lambda weights: list(weights))
    change_weights(model, 1e-5)
    with pytest.raises(WeightMismatchError, match="still holds older weights"):
        engine.generate(model, PROMPTS, GREEDY)


def test_a_sleep_that_drops_the_weights_is_followed_by_all_of_them(
    client: ColocatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level 2 as the engine drives it; the CPU has no sleep, so the weights are spoilt by hand instead."""
    calls: list[Any] = []

    def sleep(level: int) -> None:
        calls.append(level)
        client.load_weights((name, torch.zeros_like(t)) for name, t in build_model().state_dict().items())

    monkeypatch.setattr(client, "sleep", sleep)
    monkeypatch.setattr(client, "wake", calls.append)
    model, engine = build_model(6), engine_around(client, tmp_path)
    engine.sleep_level = 2
    expected = TransformersEngine([EOS], PAD).generate(model, PROMPTS, GREEDY).ids
    for _ in range(2):
        assert engine.generate(model, PROMPTS, GREEDY).ids == expected
    assert calls == [2, ["weights"], ["kv_cache"], 2]


def test_merged_adapter(client: ColocatedClient, tmp_path: Path) -> None:
    model, engine = with_adapter(build_model(7)), engine_around(client, tmp_path)
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ours = engine.generate(model, PROMPTS, GREEDY)
        assert engine.pop_metrics()["vllm/weight_check"] < 1e-5
        assert ours.ids == TransformersEngine([EOS], PAD).generate(model, PROMPTS, GREEDY).ids
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        engine.generate(model, PROMPTS, GREEDY)
        assert engine.pop_metrics() == {}  # merging leaves no trace that looks like an update
        change_weights(model)


def test_a_prompt_too_long_says_what_to_do(client: ColocatedClient, tmp_path: Path) -> None:
    engine = engine_around(client, tmp_path)
    with pytest.raises(
        ValueError, match=r"prompt 1 has 250 tokens.*raise vllm_max_model_length.*max_prompt_length=248"
    ):
        engine.generate(build_model(), [[5], [5] * 250], GREEDY)
    assert CONTEXT - GREEDY.max_new_tokens == 248


def test_an_engine_that_dies_says_what_to_do(
    client: ColocatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no memory for the cache")

    engine = engine_around(client, tmp_path)
    monkeypatch.setattr(client.llm, "generate", die)
    with pytest.raises(EngineError, match=r"failed while generating: MemoryError: no memory(.|\n)*vllm_gpu_memory"):
        engine.generate(build_model(), PROMPTS, GREEDY)
