"""Our replacements in Unsloth's step: values, gradients, and fallbacks, tested with a fake unsloth_zoo module.

If unsloth_zoo is installed (`make peers`), its own functions are compared with ours in a separate process: importing
unsloth_zoo changes transformers.
"""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_ext.integrations.unsloth as ours
from grpo_ext import reference
from grpo_ext.integrations.unsloth import head as head_module
from grpo_ext.integrations.unsloth import step


def example() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 8, generator=generator).requires_grad_()
    head = torch.randn(67, 8, generator=generator).requires_grad_()
    return hidden, head, torch.randint(0, 67, (2, 5), generator=generator)


@pytest.mark.parametrize(
    ("options", "processed"),
    [
        ({}, {}),
        ({"temperature": 0.7, "chunks": 2}, {"temperature": 0.7}),
        ({"logit_scale_multiply": 0.5, "logit_softcapping": 9.0}, {"logit_scale": 0.5, "logit_softcap": 9.0}),
        ({"logit_scale_divide": 4.0}, {"logit_scale": 0.25}),
        ({"lm_head_bias": torch.linspace(-1, 1, 67), "max_rows_per_chunk": 3}, {"bias": torch.linspace(-1, 1, 67)}),
    ],
)
def test_equals_the_reference(options: dict[str, Any], processed: dict[str, Any]) -> None:
    hidden, head, index = example()
    found = ours.hidden_states_logps(hidden, head, index, **options)
    wanted = reference.linear_selective_log_softmax(hidden, head, index, **processed)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(index.shape)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (hidden, head)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hidden_states_take_the_dtype_of_the_head() -> None:
    hidden, head, index = example()
    found = ours.hidden_states_logps(hidden, head.bfloat16(), index)
    wanted = ours.hidden_states_logps(hidden.bfloat16(), head.bfloat16(), index)
    assert torch.equal(found, wanted)
    assert found.dtype == torch.float32


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def stand_in(
        hidden_states: Any, lm_head: Any, index: Any, chunks: int = 4, support_top_p: float = 1.0, **kwargs: Any
    ) -> str:
        return "Unsloth"

    package, replacements = types.ModuleType("unsloth_zoo"), types.ModuleType("unsloth_zoo.rl_replacements")
    replacements.chunked_hidden_states_selective_log_softmax = stand_in  # type: ignore[attr-defined]
    replacements.grpo_chunked_hidden_states_logprobs = stand_in  # type: ignore[attr-defined]
    package.rl_replacements = replacements  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth_zoo", package)
    monkeypatch.setitem(sys.modules, "unsloth_zoo.rl_replacements", replacements)
    yield replacements
    ours.unpatch()


def test_patch_serves_counts_and_hands_back(module: Any) -> None:
    original = module.chunked_hidden_states_selective_log_softmax
    ours.patch(one_forward=False, trim=False, dense=False)
    ours.patch()
    for name in ours.SYMBOLS:
        function = getattr(module, name)
        assert inspect.signature(function) == inspect.signature(original)
        hidden, head, index = example()
        neutral = {"lm_head_bias": None, "fp32_lm_head": False, "support_top_k": 0, "fused_linear": True}
        logps = function(hidden, head, index, 2, 1.0, temperature=0.5, **neutral)
        assert torch.equal(logps, ours.hidden_states_logps(hidden, head, index, temperature=0.5))
        for more in ({"support": torch.ones(3)}, {"support_top_p": 0.9}, {"support_top_k": 50}, {"fp32_lm_head": True}):
            assert function(hidden, head, index, **more) == "Unsloth"
        assert function(hidden, head, index, 4, 0.9) == "Unsloth"
    handed_back = {"support": 2, "support_top_p": 4, "support_top_k": 2, "fp32_lm_head": 2}
    assert ours.status() == {
        "patched": True, "served": 2, **{f"handed back: {name}": count for name, count in handed_back.items()}
    }  # fmt: skip
    ours.unpatch()
    assert module.chunked_hidden_states_selective_log_softmax is original
    assert not ours.status()["patched"]


def test_other_versions_are_refused(module: Any) -> None:
    del module.chunked_hidden_states_selective_log_softmax
    with pytest.raises(ImportError, match="has no chunked_hidden_states_selective_log_softmax"):
        ours.patch()


def test_a_trainer_that_unsloth_did_not_make(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(GRPOTrainer=type("GRPOTrainer", (), {})))
    ours.patch()
    reason = "step handed back: trl.GRPOTrainer is not Unsloth's, import unsloth before patch()"
    assert ours.status() == {"patched": True, reason: 1}


def values_of_a_call(**more: Any) -> dict[str, Any]:
    """Two rows, 0 is padding: prompts of 1 and 2 of 4 columns, completions of 3 and 1 of 5."""
    ids = torch.tensor([[0, 0, 0, 7, 1, 2, 3, 0, 0], [0, 0, 8, 9, 4, 0, 0, 0, 0]])
    trainer = types.SimpleNamespace(processing_class=types.SimpleNamespace(pad_token_id=0))
    columns = torch.arange(5.0).expand(2, 5)
    window = torch.arange(8.0).expand(2, 8)  # of 5 columns and a widest left padding of 3
    return {
        "trainer": trainer, "input_ids": ids, "attention_mask": ids != 0, "logits_to_keep": 5, "temperature": 1.0,
        "completion_mask": ids[:, 4:] != 0, "sampling_per_token_logps": columns, "old_logps": window, "ref_logps": None,
    } | more  # fmt: skip


def test_trim() -> None:
    """The columns that are padding in both rows go: two of the prompt, two of the completion."""
    values = values_of_a_call()
    found = step.trimmed(values)
    assert found["input_ids"].tolist() == [[0, 7, 1, 2, 3], [8, 9, 4, 0, 0]]
    assert found["attention_mask"].tolist() == (found["input_ids"] != 0).tolist()
    assert found["logits_to_keep"] == 3
    assert found["completion_mask"].shape == found["sampling_per_token_logps"].shape == (2, 3)
    assert found["old_logps"][0].tolist() == [0, 1, 2, 3]  # 3 columns and a widest left padding of 1
    assert (found["ref_logps"], found["temperature"]) == (None, 1.0)
    with_image = values_of_a_call(pixel_values=torch.ones(1))
    assert step.trimmed(with_image) is with_image
    assert step.counts["trim handed back: pixel_values"] >= 1


def test_trim_keeps_a_column_of_each() -> None:
    values = values_of_a_call(input_ids=torch.zeros(2, 9, dtype=torch.int64))
    assert step.trimmed(values)["input_ids"].shape == (2, 2)
    assert step.trimmed(values)["logits_to_keep"] == 1


def test_padding_masked() -> None:
    hidden, head, index = example()
    index[0, 3:] = 5
    with head_module.padding_masked(5):
        logps = ours.hidden_states_logps(hidden, head, index)
    plain = ours.hidden_states_logps(hidden, head, index)
    assert torch.equal(logps[index == 5], torch.zeros(int((index == 5).sum())))
    assert torch.equal(logps[index != 5], plain[index != 5])
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert not gradient[index == 5].any()
    assert gradient[index != 5].any(dim=-1).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda trainer, _: None, None),
        (lambda trainer, _: setattr(trainer.args, "steps_per_generation", 4), "4 steps use one generation batch"),
        (lambda trainer, _: setattr(trainer, "num_iterations", 2), "4 steps use one generation batch"),
        (lambda trainer, _: setattr(trainer, "model", torch.nn.Dropout(0.1)), "dropout"),
        (lambda _, patch: patch.setenv("UNSLOTH_GRPO_ROLLOUT_METRICS", "1"), "UNSLOTH_GRPO_ROLLOUT_METRICS is set"),
        (
            lambda _, patch: patch.setattr(
                sys.modules["unsloth_zoo.rl_replacements"], "grpo_truncated_support_kwargs", dict.copy, raising=False
            ),
            "log probabilities over a truncated vocabulary",
        ),
    ],
)
def test_one_forward(module: Any, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str | None) -> None:
    """The first scoring of a generation batch is skipped unless there is a reason; that of a reference never is."""
    calls: list[str] = []

    class Trainer(dict):  # type: ignore[type-arg]  # a dict with an item, so that dict.copy stands for a kept set
        use_vllm = vllm_importance_sampling_correction = True
        num_iterations = 1

        def score(self, which: str) -> tuple[str, None]:
            calls.append(which)
            return which, None

        def generate(self) -> Any:
            return [self.score(which)[0] for which in ("old", "ref")]

    Trainer.score = step.token_logps(Trainer.score, 2)  # type: ignore[method-assign]
    Trainer.generate = step.generate_and_score(Trainer.generate)  # type: ignore[method-assign]
    trainer: Any = Trainer(kept=1)
    trainer.model = torch.nn.Linear(1, 1)
    trainer.args = types.SimpleNamespace(gradient_accumulation_steps=2, steps_per_generation=2)
    change(trainer, monkeypatch)
    step.counts.clear()
    assert trainer.generate() == ([None, "ref"] if reason is None else ["old", "ref"])
    assert calls == (["ref"] if reason is None else ["old", "ref"])
    assert dict(step.counts) == {"one_forward served" if reason is None else f"one_forward handed back: {reason}": 1}
    assert trainer.score("later") == ("later", None)


def test_results_of_scoring() -> None:
    call = " = self._get_per_token_logps_and_entropies("
    assert step.results_of_scoring(f"    old_per_token_logps, _, _{call}") == 3
    assert step.results_of_scoring(f"    old_per_token_logps{call}") == 1
    assert step.results_of_scoring("old_per_token_logps = None") is None


@pytest.mark.skipif(importlib.util.find_spec("unsloth_zoo") is None, reason="unsloth_zoo is not installed: make peers")
@pytest.mark.parametrize(("name", "line", "count"), [("check", "grpo_ext logps", 16), ("step_check", "gradient", 30)])
def test_the_real_functions_give_the_same(name: str, line: str, count: int) -> None:
    script = Path(__file__).with_name(f"unsloth_{name}.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(line) == count


@pytest.mark.skipif(importlib.util.find_spec("unsloth_zoo") is not None, reason="unsloth is installed here")
def test_without_unsloth() -> None:
    with pytest.raises(ImportError, match="needs unsloth"):
        ours.patch()
