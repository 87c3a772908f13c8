"""`VllmEngine`: synchronize vLLM's weights with the trainer's, then generate."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from grpo_ext.generation.engine import Completions, Done, SamplingParams
from grpo_ext.generation.errors import EngineError, PromptLengthError
from grpo_ext.generation.vllm.check import TOP, WeightCheck
from grpo_ext.generation.vllm.client import Answer, Answered, Client, Restartable
from grpo_ext.generation.vllm.parallel import Ranks
from grpo_ext.generation.vllm.sampling import sampling_fields
from grpo_ext.generation.vllm.weights import checkpoint_weights, trainable_version, write_adapter

#: Sampling fields of the weight check: one new token from the whole distribution.
PROBE_FIELDS: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "ignore_eos": True}

#: Spread of log probabilities, in nats, below which two temperatures are indistinguishable. In bf16 two equal requests
#: differ by up to 0.1 nats, which changes the ratio of the spreads over the probe's 160 values by 0.08.
SPREAD = 0.1


class VllmEngine:
    """A `GenerationEngine` that generates with vLLM.

    `generate` first compares the version of the model's parameters with the version at the last synchronization. It
    synchronizes if they differ, or if a server has restarted or does not report its start time: it loads the weights
    (or the adapter) into vLLM, empties the prefix cache, and checks vLLM's log probabilities against the trainer's.

    Args:
        client: the connection to vLLM.
        end_ids: ids that end a completion.
        update: ``weights`` loads all weights, with an adapter merged; ``adapter`` loads only the adapter.
        check: compares the log probabilities.
        folder: where adapters are written for the engine.
        step: returns the trainer's step; a new step requires synchronization.
        ranks: the trainer's processes.
        sleep_level: vLLM's sleep level between generations; 0 keeps it awake.
        writes: whether this process writes adapters to ``folder``.
    """

    def __init__(
        self,
        client: Client,
        end_ids: Sequence[int],
        update: Literal["weights", "adapter"],
        check: WeightCheck,
        folder: Path,
        step: Callable[[], int] = lambda: 0,
        ranks: Ranks | None = None,
        sleep_level: int = 0,
        writes: bool = True,
    ) -> None:
        self.client = client
        self.end_ids = list(end_ids)
        self.update = update
        self.check = check
        self.folder = folder
        self.step = step
        self.ranks = Ranks() if ranks is None else ranks
        self.sleep_level = sleep_level
        self.writes = writes
        self._held: tuple[str | None, int, int] | None = None
        self._start: str | None = None
        self._follows_temperature = False
        self._asleep = False
        self._adapters = 0
        self._metrics: dict[str, list[float]] = {}
        self._finalizer = weakref.finalize(self, client.close)

    def generate(
        self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams, done: Done | None = None
    ) -> Completions:
        """See `GenerationEngine.generate`.

        Raises:
            ValueError: vLLM does not have a sampling field.
            PromptLengthError: a prompt leaves no room for a completion; raised on every rank.
            EngineError: vLLM fails, or its log probabilities ignore the temperature; raised on every rank.
            WeightMismatchError: vLLM does not hold the trainer's weights; raised on every rank.
        """
        fields = sampling_fields(sampling, self.end_ids)
        self.ranks.jointly(lambda: self._check_lengths(prompt_ids, fields["max_tokens"]))
        engine_start = self._started()
        changed = engine_start is None or (engine_start, self.step(), trainable_version(model)) != self._held
        if self._asleep:
            self.ranks.jointly(lambda: self.client.wake(["weights"]))
            changed = changed or self.sleep_level == 2
        if changed:
            start = time.perf_counter()
            self._load(model)
            self._record("time/vllm_weights", time.perf_counter() - start)
        if self._asleep:
            self.ranks.jointly(lambda: self.client.wake(["kv_cache"]))
            self._asleep = False
        if changed:
            start = time.perf_counter()
            self.ranks.jointly(self.client.reset_cache)
            self.ranks.barrier()
            figure = self.ranks.jointly(lambda: self.check(model, self._probe))
            self._record("vllm/weight_check", figure)
            self._record("time/vllm_check", time.perf_counter() - start)
            # Read the version last: merging an adapter writes into weights, and thereby increases it.
            self._held = (engine_start, self.step(), trainable_version(model))
        prompts, own = self.ranks.gather_prompts(prompt_ids)
        with self.ranks.same_draws(self.step(), prompts):
            answers = self.ranks.jointly(lambda: self.client.complete(prompts, fields, 0, _own_answers(done, own)))[own]
        if self.sleep_level:
            self.ranks.barrier()  # a server's other clients may still be generating
            self.ranks.jointly(lambda: self.client.sleep(self.sleep_level))
            self._asleep = True
        ends = set(fields["stop_token_ids"])
        return Completions(
            [answer.ids for answer in answers],
            [answer.ids[-1] in ends for answer in answers],
            [answer.logps for answer in answers],
        )

    def pop_metrics(self) -> dict[str, float]:
        """Mean of each metric recorded since the last call."""
        result = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics = {}
        return result

    def close(self) -> None:
        """Stop the engine. A later call of `generate` raises."""
        self._finalizer()

    def _record(self, name: str, value: float) -> None:
        self._metrics.setdefault(name, []).append(value)

    def _check_lengths(self, prompt_ids: Sequence[Sequence[int]], max_tokens: int) -> None:
        limit = self.client.max_model_len
        for index, ids in enumerate(prompt_ids):
            if len(ids) + max_tokens > limit:
                raise PromptLengthError(
                    f"prompt {index} has {len(ids)} tokens; with max_completion_length={max_tokens} that exceeds the "
                    f"{limit} tokens of vLLM's context: raise vllm_max_model_length (--max-model-len of a server), "
                    f"set max_prompt_length={max(limit - max_tokens, 0)} (keeps the last tokens) or lower "
                    "max_completion_length"
                )

    def _started(self) -> str | None:
        """See `Restartable.started`; equal on every rank, and constant for vLLM in this process."""
        client = self.client
        start = self.ranks.shared(self.ranks.jointly(client.started)) if isinstance(client, Restartable) else ""
        if start is None or start != self._start:
            self._start, self._follows_temperature = start, False
        return start

    def _load(self, model: nn.Module) -> None:
        if self.update == "weights":
            self.ranks.jointly(lambda: self.client.load_weights(checkpoint_weights(model)))
            return
        previous = self._adapter_folder()
        self._adapters += 1
        write_adapter(model, self._adapter_folder(), write=self.writes)
        self.ranks.barrier()
        self.ranks.jointly(lambda: self.client.load_adapter(self._adapter_folder()))
        if self.writes:
            shutil.rmtree(previous, ignore_errors=True)

    def _adapter_folder(self) -> Path:
        return self.folder / f"adapter-{self._adapters}"

    def _probe(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        # vLLM in this process uses torch's generators: the check must not advance those of training.
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            answers = self.client.complete(prompts, PROBE_FIELDS, top=TOP)
            if not self._follows_temperature:  # once per start of vLLM
                warm = self.client.complete(prompts, PROBE_FIELDS | {"temperature": 2.0}, top=TOP)
                self._follows_temperature = _follows_temperature(answers, warm)
            return answers


def _follows_temperature(answers: Sequence[Answer], warm: Sequence[Answer]) -> bool:
    """Whether vLLM's log probabilities follow the temperature; False if the distributions are too flat to decide.

    Temperature 2 halves the differences between log probabilities. vLLM's default mode reports them before temperature.

    Args:
        answers: at temperature 1.
        warm: answers to the same prompts at temperature 2.

    Raises:
        EngineError: the log probabilities ignore the temperature.
    """
    squares, products, count = 0.0, 0.0, 0
    for one, two in zip(answers, warm, strict=True):
        tokens = [token for token in one.first.keys() & two.first.keys() if math.isfinite(one.first[token])]
        mean = sum(one.first[token] for token in tokens) / max(len(tokens), 1)
        squares += sum((one.first[token] - mean) ** 2 for token in tokens)
        products += sum((one.first[token] - mean) * two.first[token] for token in tokens)
        count += len(tokens)
    if not squares > count * SPREAD**2:
        return False
    if products / squares > 0.75:
        raise EngineError(
            "vLLM reports log probabilities before temperature and cuts, not those it samples from: "
            "importance weights at a temperature other than 1 would be wrong. Start the server with "
            "`--logprobs-mode processed_logprobs` (in this process: remove logprobs_mode from vllm_engine_kwargs)"
        )
    return True


def _own_answers(done: Done | None, own: slice) -> Answered | None:
    """Wrap ``done`` to report only this rank's answers, with indices relative to its first prompt."""
    if done is None:
        return None

    def answered(index: int, answer: Answer) -> None:
        if own.start <= index < own.stop:
            done(index - own.start, answer.ids)

    return answered


def close_quietly(engine: object) -> None:
    """Call an engine's ``close`` if it has one, and ignore errors."""
    with contextlib.suppress(Exception):
        close = getattr(engine, "close", None)
        if close is not None:
            close()
