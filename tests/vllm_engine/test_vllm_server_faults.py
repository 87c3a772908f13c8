"""What a server does without a word: other log probabilities, other weights after a restart, sleep that never ends.

The server is a stand-in (`vllm_fake_server`) that does what `vllm serve` was seen to do; it needs no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_fake_server import FakeServer, serving
from vllm_toys import EOS, PAD, build_model, change_weights, engine_around, logps_of, with_adapter

from grpo_ext.generation.engine import SamplingParams, TransformersEngine
from grpo_ext.generation.vllm import EngineError
from grpo_ext.generation.vllm.client import Answer
from grpo_ext.generation.vllm.engine import VllmEngine, _follows_temperature
from grpo_ext.generation.vllm.server import ServerClient

PROMPTS = [[5, 6, 7, 8], [9, 10], list(range(3, 40))]
GREEDY = SamplingParams(6, temperature=0.0)

Connect = Callable[..., VllmEngine]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """A new run's engine around a server that already runs, or not yet."""
    addresses: dict[int, str] = {}
    with ExitStack() as stack:

        def connect(fake: FakeServer, update: str = "weights", sleep_level: int = 0, pushes: bool = True) -> VllmEngine:
            if id(fake) not in addresses:
                addresses[id(fake)] = stack.enter_context(serving(fake))
            folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            client = ServerClient(addresses[id(fake)], folder, 5, 20, run=folder.name, pushes=pushes)
            engine = engine_around(client, folder, update)
            engine.sleep_level = sleep_level
            return engine

        yield connect


def expected(model: Any) -> list[list[int]]:
    return TransformersEngine([EOS], PAD).generate(model, PROMPTS, GREEDY).ids


def test_log_probabilities_are_those_of_the_temperature(connect: Connect) -> None:
    model = build_model(1)
    fake = FakeServer(build_model())
    done = connect(fake).generate(model, PROMPTS, SamplingParams(6, temperature=0.5))
    assert done.sampling_logps is not None
    for prompt, ids, logps in zip(PROMPTS, done.ids, done.sampling_logps, strict=True):
        torch.testing.assert_close(torch.tensor(logps), logps_of(model, prompt, ids, 0.5), atol=2e-5, rtol=0)
    assert fake.calls.count("/v1/completions") == 3  # the check, the question for the temperature, the completions


def test_a_server_with_raw_log_probabilities(connect: Connect) -> None:
    """At temperature 1, which the check asks for, they are the same: the importance weights alone would be wrong."""
    engine = connect(FakeServer(build_model(), raw=True))
    with pytest.raises(EngineError, match="Start the server with `--logprobs-mode processed_logprobs`"):
        engine.generate(build_model(1), PROMPTS, SamplingParams(6, temperature=0.5))


def test_a_server_that_takes_no_weights(connect: Connect) -> None:
    engine = connect(FakeServer(build_model(), takes_weights=False))
    with pytest.raises(EngineError, match=r"gate_up_proj(.|\n)*--enable-lora(.|\n)*vllm_lora_mode='adapter'"):
        engine.generate(build_model(1), PROMPTS, GREEDY)
    engine = connect(FakeServer(build_model(), dev_mode=False))
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1") as error:
        engine.generate(build_model(1), PROMPTS, GREEDY)
    assert "--enable-lora vLLM 0" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*has restarted")
def test_a_server_started_anew_with_raw_log_probabilities(connect: Connect) -> None:
    model, fake = build_model(1), FakeServer(build_model())
    engine = connect(fake)
    engine.generate(model, PROMPTS, GREEDY)
    fake.raw = True
    fake.restart()
    for _ in range(2):  # an error leaves no state that the next call takes for a hand-over
        with pytest.raises(EngineError, match="processed_logprobs"):
            engine.generate(model, PROMPTS, GREEDY)


def test_temperatures_of_an_even_distribution_cannot_be_told_apart() -> None:
    flat = [Answer([1], [-3.0], {token: -3.0 + 1e-3 * token for token in range(20)})]
    assert not _follows_temperature(flat, flat)
    assert not _follows_temperature([Answer([1], [-3.0], {})], flat)
    nan = [Answer([1], [float("nan")], dict.fromkeys(range(20), float("nan")))]
    assert not _follows_temperature(nan, nan)
    # Differences that bf16 makes, 0.1 nats, do not hide which of the two it is.
    torch.manual_seed(0)
    values = (torch.randn(8, 20) * 0.2).tolist()
    one = [Answer([0], [0.0], dict(enumerate(row))) for row in values]
    halved = [Answer([0], [0.0], {t: v / 2 + 0.1 * (-1) ** t for t, v in enumerate(row)}) for row in values]
    assert _follows_temperature(one, halved)
    noisy = [Answer([0], [0.0], {t: v + 0.1 * (-1) ** t for t, v in enumerate(row)}) for row in values]
    with pytest.raises(EngineError, match="not those it samples from"):
        _follows_temperature(one, noisy)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_server_started_anew_between_two_batches_of_one_step(connect: Connect, adapter: bool) -> None:
    """Its own weights are back, the trainer's are as they were: without a hand-over it answers from the former."""
    model = with_adapter(build_model(1)) if adapter else build_model(1)  # with an adapter: merged
    fake = FakeServer(build_model())
    engine = connect(fake)
    assert engine.generate(model, PROMPTS, GREEDY).ids == expected(model)
    assert expected(fake.original) != expected(model)
    fake.restart()
    with pytest.warns(UserWarning, match="has restarted"):
        again = engine.generate(model, PROMPTS, GREEDY)
    assert again.ids == expected(model)
    calls = len(fake.calls)
    assert engine.generate(model, PROMPTS, GREEDY).ids == expected(model)
    assert fake.calls[calls:] == ["/v1/completions"]  # nothing changed since: no hand-over, no check


def test_a_server_that_does_not_say_when_it_started(connect: Connect) -> None:
    model, fake = build_model(1), FakeServer(build_model(), says_start=False)
    engine = connect(fake)
    for _ in range(2):
        assert engine.generate(model, PROMPTS, GREEDY).ids == expected(model)
        fake.restart()
    assert fake.calls.count("/collective_rpc") == 2


def test_a_restart_takes_the_adapters_along(connect: Connect) -> None:
    """The adapter of the step before is not there to be unloaded."""
    fake = FakeServer(build_model())
    engine = connect(fake, "adapter")
    engine.check = lambda *_: 0.0  # type: ignore[assignment]  # the stand-in applies no adapter
    model = with_adapter(build_model())
    engine.generate(model, PROMPTS, GREEDY)
    engine.generate(model, PROMPTS, GREEDY)
    assert fake.adapters == ["grpo-ext-run-0-1"]
    fake.restart()
    with pytest.warns(UserWarning, match="has restarted"):
        engine.generate(model, PROMPTS, GREEDY)
    assert fake.adapters == ["grpo-ext-run-0-2"]
    assert "/v1/unload_lora_adapter" not in fake.calls
    change_weights(model)
    engine.generate(model, PROMPTS, GREEDY)
    assert fake.adapters == ["grpo-ext-run-0-3"]


@pytest.mark.parametrize("level", [1, 2])
def test_the_end_of_a_run_leaves_the_server_awake(connect: Connect, level: int) -> None:
    model, fake = build_model(1), FakeServer(build_model())
    engine = connect(fake, sleep_level=level)
    for _ in range(2):
        assert engine.generate(model, PROMPTS, GREEDY).ids == expected(model)
        assert fake.asleep
    folder = engine.folder
    engine.client.close()
    assert fake.asleep == set()
    assert expected(fake.model) == expected(model)  # level 2 drops the weights: they were given once more
    assert not folder.exists()
    calls = len(fake.calls)
    engine.client.close()
    assert fake.calls[calls:] == []


@pytest.mark.parametrize("tags", [{"weights", "kv_cache"}, {"kv_cache"}])
def test_a_server_that_was_left_asleep(connect: Connect, tags: set[str]) -> None:
    """As a run leaves it that is killed."""
    model, fake = build_model(1), FakeServer(build_model())
    fake.asleep = set(tags)
    engine = connect(fake, pushes=False)
    assert fake.asleep == tags  # rank 0 wakes it
    engine = connect(fake)
    assert engine.generate(model, PROMPTS, GREEDY).ids == expected(model)


def test_a_server_asleep_that_is_started_anew(connect: Connect) -> None:
    model, fake = build_model(1), FakeServer(build_model())
    engine = connect(fake, sleep_level=1)
    engine.generate(model, PROMPTS, GREEDY)
    fake.restart()
    with pytest.warns(UserWarning, match="has restarted"):
        assert engine.generate(model, PROMPTS, GREEDY).ids == expected(model)
    assert fake.asleep


def test_a_server_without_development_mode(connect: Connect) -> None:
    """There is no /is_sleeping then, so connecting works; what the caches need is named."""
    engine = connect(FakeServer(build_model(), dev_mode=False), "adapter")
    with pytest.raises(EngineError, match=r"does not offer POST .*/reset_prefix_cache: start it with VLLM_SERVER_DEV"):
        engine.generate(with_adapter(build_model()), PROMPTS, GREEDY)
