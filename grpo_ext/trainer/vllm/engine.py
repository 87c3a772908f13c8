"""`VllmEngine`: completions from vLLM, after seeing to it that vLLM holds the trainer's weights."""

from __future__ import annotations

import contextlib
import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from grpo_ext.trainer.errors import PromptLengthError
from grpo_ext.trainer.generation import Completions, Done, SamplingParams
from grpo_ext.trainer.vllm.check import TOP, WeightCheck
from grpo_ext.trainer.vllm.client import Answer, Answered, Client
from grpo_ext.trainer.vllm.parallel import Ranks
from grpo_ext.trainer.vllm.sampling import sampling_fields
from grpo_ext.trainer.vllm.weights import checkpoint_weights, trainable_version, write_adapter

#: One new token, from the whole distribution: what the check asks for.
PROBE_FIELDS: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "ignore_eos": True}


class VllmEngine:
    """A `GenerationEngine`.

    Before it generates it compares a version of the model's parameters with that of the last hand-over. When they
    differ it hands over the weights (or the adapter), empties the prefix cache and checks the engine's log
    probabilities against the trainer's.

    Args:
        client: the vLLM.
        end_ids: ids that end a completion.
        update: ``weights`` hands over all of them, an adapter merged in; ``adapter`` the adapter alone.
        check: compares the two.
        folder: for adapters on their way to the engine.
        step: the trainer's step: another one means other weights.
        ranks: the trainer's processes.
        sleep_level: 0 keeps the engine awake between generations.
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
        self._held: tuple[int, int] | None = None
        self._asleep = False
        self._adapters = 0
        self._metrics: dict[str, list[float]] = {}
        self._finalizer = weakref.finalize(self, client.close)

    def generate(
        self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams, done: Done | None = None
    ) -> Completions:
        """See `GenerationEngine.generate`.

        Raises:
            ValueError: for a sampling field vLLM does not have.
            PromptLengthError: for a prompt that leaves no room for a completion, on every rank.
            EngineError: when vLLM fails, on every rank.
            WeightMismatchError: when it does not hold the trainer's weights.
        """
        fields = sampling_fields(sampling, self.end_ids)
        self.ranks.jointly(lambda: self._check_lengths(prompt_ids, fields["max_tokens"]))
        version = (self.step(), trainable_version(model))
        changed = version != self._held
        if self._asleep:
            self.ranks.jointly(lambda: self.client.wake(["weights"]))
            changed = changed or self.sleep_level == 2
        if changed:
            start = time.perf_counter()
            self._hand_over(model)
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
            # Merging writes into weights and restores them: only now is the version that of what is held.
            self._held = (self.step(), trainable_version(model))
        prompts, own = self.ranks.gather_prompts(prompt_ids)
        with self.ranks.same_draws():
            answers = self.ranks.jointly(lambda: self.client.complete(prompts, fields, 0, _told(done, own)))[own]
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
        """Means of what was recorded since the last call."""
        result = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics = {}
        return result

    def close(self) -> None:
        """Stop the engine; the next call of `generate` is an error."""
        self._finalizer()

    def _record(self, name: str, value: float) -> None:
        self._metrics.setdefault(name, []).append(value)

    def _check_lengths(self, prompt_ids: Sequence[Sequence[int]], max_tokens: int) -> None:
        limit = self.client.max_model_len
        for index, ids in enumerate(prompt_ids):
            if len(ids) + max_tokens > limit:
                raise PromptLengthError(
                    f"prompt {index} has {len(ids)} tokens; with max_completion_length={max_tokens} that exceeds the "
                    f"{limit} tokens vLLM was started with: raise vllm_max_model_length (--max-model-len of a server), "
                    f"set max_prompt_length={max(limit - max_tokens, 0)} (keeps the last tokens) or lower "
                    "max_completion_length"
                )

    def _hand_over(self, model: nn.Module) -> None:
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
        # An engine in this process draws from torch's generators: the check takes no number away from the training.
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            return self.client.complete(prompts, PROBE_FIELDS, top=TOP)


def _told(done: Done | None, own: slice) -> Answered | None:
    """``done`` for the answers of this rank, counted from its first."""
    if done is None:
        return None

    def answered(index: int, answer: Answer) -> None:
        if own.start <= index < own.stop:
            done(index - own.start, answer.ids)

    return answered


def close_quietly(engine: object) -> None:
    """Stop an engine that has a ``close``, whatever it says."""
    with contextlib.suppress(Exception):
        close = getattr(engine, "close", None)
        if close is not None:
            close()
