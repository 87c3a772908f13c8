"""TRL's tools, environments and rollout functions with and without `patch()`: equal numbers, tool results masked."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trl_step import compare, patching
from trl_runs import WORDS, Recorder, fill_adapters, lora, settings, tiny_model, tiny_tokenizer, trl

import grpo_ext.integrations.trl as ours

#: One token each: the call of a tool with one of four places; no tool knows the last one.
CALLS = [f'{{"name":"look","arguments":{{"place":{place}}}}}' for place in range(4)]
CHAT_WORDS = [*WORDS[:3], "<user>", "<assistant>", "<tool>", "<call>", "</call>", *CALLS, *WORDS[3:]][: len(WORDS)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% for call in m.tool_calls or [] %} <call> {{ call.function | tojson }} </call>{% endfor %}"
    "{{ ' <eos> ' if m.role == 'assistant' else ' ' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer(CHAT_WORDS)
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSES
    return tokenizer


def found(place: int) -> str:
    if place == 3:
        raise ValueError("w50 w51")
    return " ".join(f"w{10 * place + i}" for i in range(1 + place))


def look(place: int) -> str:
    """Look what is at a place.

    Args:
        place: number of the place.
    """
    return found(place)


class Room:
    """An environment that counts what was seen, and rewards it."""

    def reset(self, **_: Any) -> str:
        self.seen = 0
        return " w60"

    def look(self, place: int) -> str:
        """Look what is at a place.

        Args:
            place: number of the place.
        """
        self.seen += 1 + place
        return found(place)

    def get_reward(self) -> float:
        return float(self.seen)


class Engine:
    """Write turns and their log probabilities at random: a word or two, then a call in three turns of five."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def sync_weights(self) -> None:
        pass

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def logps(self, length: int) -> list[Any]:
        values: list[Any] = (-4.5 + 0.7 * torch.randn(length, generator=self.generator)).tolist()
        return [None, *values[1:]] if self.draw(0, 8) == 0 else values

    def turns(self, count: int) -> tuple[list[list[int]], list[list[Any]]]:
        calls, first_word = CHAT_WORDS.index(CALLS[0]), CHAT_WORDS.index("w0")
        start, end = CHAT_WORDS.index("<call>"), CHAT_WORDS.index("</call>")
        ids = []
        for _ in range(count):
            words = [self.draw(first_word, len(CHAT_WORDS)) for _ in range(self.draw(1, 3))]
            call = [start, calls + self.draw(0, 4), end] if self.draw(0, 5) < 3 else []
            ids.append([*words, *call, *([0] if self.draw(0, 6) else [])])
        return ids, [self.logps(len(row)) for row in ids]

    def rollouts(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Two turns with an observation between them; the first rollout of a batch has no token of the model."""
        tokenizer = trainer.processing_class
        ids: list[list[int]] = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) for prompt in prompts
        ]
        rows: dict[str, Any] = {"prompt_ids": ids, "completion_ids": [], "logprobs": [], "env_mask": []}
        for row in range(len(prompts)):
            (one, two), logps = self.turns(2)
            seen = [self.draw(12, len(CHAT_WORDS)) for _ in range(self.draw(1, 6))]
            rows["completion_ids"].append(one + seen + two)
            rows["logprobs"].append(logps[0] + [0.0] * len(seen) + logps[1])
            own = int(row > 0)
            rows["env_mask"].append([own] * len(one) + [0] * len(seen) + [own] * len(two))
        return rows


def reward(completions: list[Any], prompts: list[Any], **_: Any) -> list[float]:
    """Equal for the completions of prompts that start with an even word: their advantages are 0."""
    return [
        0.5 if int(prompt[-1]["content"].split()[0][1:]) % 2 == 0 else sum(map(ord, str(messages))) % 17 / 17
        for messages, prompt in zip(completions, prompts, strict=True)
    ]


SOURCES: dict[str, dict[str, Any]] = {
    "tools": {"tools": [look]},
    "environment": {"environment_factory": Room},
    "environments": {"environment_factory": {"far": Room, "near": Room}, "tools": []},
    "rollouts": {},
}


def run(folder: Path, source: str, *, with_lora: bool = True, vllm: bool = True, **changes: Any) -> Any:
    """Logs of a run, the trained weights after it, and the tool masks of its generation batches."""
    engine, masks = Engine(), []

    class Trainer(trl.GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            ids, logps = engine.turns(len(prompt_ids))
            return ids, logps if vllm else None

        def _generate(self, prompts: Any) -> Any:
            out = super()._generate(prompts)
            masks.append(out[2])
            return out

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 16,
        "max_steps": 3,
        **changes,
    }
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": " ".join(f"w{(7 * i + j) % 80}" for j in range(2 + i % 3))}],
                "environment": ("far", "near")[i % 2],
            }
            for i in range(16)
        ]
    )
    recorder = Recorder()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            tiny_model(),
            reward,
            trl.GRPOConfig(**settings(str(folder), **arguments)),
            rows,
            processing_class=chat_tokenizer(),
            peft_config=lora() if with_lora else None,
            callbacks=[recorder],
            rollout_func=engine.rollouts if source == "rollouts" else None,
            **SOURCES[source],
        )
        if vllm:  # set after construction, because the constructor would start an engine
            trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
            trainer.vllm_generation = engine
        if with_lora:
            fill_adapters(trainer.model)
        trainer.train()
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return recorder.steps, trained, masks


def check_masks(source: str, stock: Any) -> None:
    """Check that every generation batch has tokens of the model and of tools, and calls that fail."""
    generations = [logs for logs in stock[0] if "num_tokens" in logs]
    assert len(generations) == len(stock[2])
    for logs, masks in zip(generations, stock[2], strict=True):
        assert {0, 1} == set(itertools.chain(*masks))
        assert source == "rollouts" or 0 < logs["tools/failure_frequency"] < 1 < 2 * logs["tools/call_frequency"]


def run_patched(
    folder: Path, stock: Any, patch: dict[str, bool], source: str, **arguments: Any
) -> tuple[Any, ours.Status]:
    with patching(**patch):
        steps, trained, masks = run(folder, source, **arguments)
        status = ours.status()
    assert masks == stock[2]
    assert not status.handed_back
    assert not status.losses_handed_back
    return (steps, trained), status


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tools": ("tools", {"vllm_importance_sampling_mode": "token_mask"}),
    "tools-without-vllm": ("tools", {"vllm": False}),
    "tools-sequence": (
        "tools",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "vllm_importance_sampling_mode": "sequence_truncate",
            "mask_truncated_completions": True,
            "with_lora": False,
        },
    ),
    "environment": ("environment", {"vllm_importance_sampling_mode": "token_truncate", "loss_type": "bnpo"}),
    "environments": ("environments", {"beta": 0.05, "num_iterations": 2, "epsilon": 0.01}),
    "rollouts": ("rollouts", {"vllm_importance_sampling_mode": "token_mask"}),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(name: str, tmp_path: Path) -> None:
    source, changes = CASES[name]
    stock = run(tmp_path / "stock", source, **changes)
    check_masks(source, stock)
    sampled = "sampling/importance_sampling_ratio/mean" in stock[0][0]
    assert sampled == ("vllm" not in changes)
    for fuse_loss in (False, True):
        mine, status = run_patched(tmp_path / "ours", stock, {"fuse_loss": fuse_loss}, source, **changes)
        compare(stock[:2], mine)
        assert status.parts["one_forward"].served == (3 if sampled and "num_iterations" not in changes else 0)
        assert status.parts["trim"].served > 0
        assert status.losses_served == (6 if fuse_loss else 0)


@pytest.mark.parametrize("source", ["tools", "rollouts"])
def test_filled_micro_batches(source: str, tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 4, "max_steps": 2, "vllm_importance_sampling_mode": "token_truncate"}
    stock = run(tmp_path / "stock", source, **changes)
    check_masks(source, stock)
    for fuse_loss in (False, True):
        patch = {"fill_micro_batches": True, "fuse_loss": fuse_loss}
        mine, status = run_patched(tmp_path / "ours", stock, patch, source, **changes)
        compare(stock[:2], mine, names=("loss", "grad_norm", "sampling/importance_sampling_ratio/mean"), tolerance=2e-4)
        assert status.parts["fill_micro_batches"].served == 2
