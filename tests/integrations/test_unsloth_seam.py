"""Our replacement of Unsloth's function: values, gradients, and fallbacks, tested with a fake unsloth_zoo module.

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
    ours.patch()
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


@pytest.mark.skipif(importlib.util.find_spec("unsloth_zoo") is None, reason="unsloth_zoo is not installed: make peers")
def test_the_real_functions_give_the_same() -> None:
    script = Path(__file__).with_name("unsloth_check.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("grpo_ext logps") == 16


@pytest.mark.skipif(importlib.util.find_spec("unsloth_zoo") is not None, reason="unsloth is installed here")
def test_without_unsloth() -> None:
    with pytest.raises(ImportError, match="needs unsloth"):
        ours.patch()
