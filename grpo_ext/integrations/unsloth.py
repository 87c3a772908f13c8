"""Unsloth on this package's kernels: ``import grpo_ext.integrations.unsloth as u; u.patch()`` before making a trainer.

Unsloth writes its GRPO trainer as source text. That text imports one function from ``unsloth_zoo.rl_replacements`` for
hidden states and head, when it runs: ``chunked_hidden_states_selective_log_softmax``, in later versions also
``grpo_chunked_hidden_states_logprobs``. `patch` replaces these names in that module. Calls with options that are not
ours (scoring over a truncated vocabulary, for instance) are handed back to Unsloth and counted.

Unsloth can be imported on a machine with a GPU only. The function below is tested everywhere, the replacement on a
stand-in module; with Unsloth itself it has not run.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from grpo_ext.linear import linear_selective_log_softmax

#: What carries the vocabulary; the first is in every version that is served.
SYMBOLS = ("chunked_hidden_states_selective_log_softmax", "grpo_chunked_hidden_states_logprobs")

_originals: dict[str, Any] = {}
_counts: Counter[str] = Counter()


def hidden_states_logps(
    hidden_states: Tensor,
    lm_head: Tensor,
    index: Tensor,
    chunks: int = 4,
    logit_scale_multiply: float = 0.0,
    logit_scale_divide: float = 0.0,
    logit_softcapping: float = 0.0,
    temperature: float = 1.0,
    max_rows_per_chunk: int | None = None,
    lm_head_bias: Tensor | None = None,
) -> Tensor:
    """Log probability of ``index`` for each hidden state.

    Args:
        hidden_states: ``(B,T,H)``; they take the dtype of the head. lm_head: ``(V,H)``, lm_head_bias ``(V,)``.
        index: int64 ``(B,T)``.
        chunks, max_rows_per_chunk: accepted; `grpo_ext.linear` chooses its own.
        logit_scale_multiply, logit_scale_divide, logit_softcapping: 0 is off; applied in this order.
        temperature: 1 is off.

    Returns:
        fp32 ``(B,T)``, with gradient for whatever requires one.
    """
    scale = (logit_scale_multiply or 1.0) / (logit_scale_divide or 1.0)
    logps = linear_selective_log_softmax(
        hidden_states.to(lm_head.dtype), lm_head, index, bias=lm_head_bias, temperature=temperature or 1.0,
        logit_scale=scale, logit_softcap=logit_softcapping or None,
    )  # fmt: skip
    assert isinstance(logps, Tensor)
    return logps


def _in_place_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, or the original for calls with other options; signature and source text stay the original's."""
    own = set(hidden_states_logps.__annotations__)

    @functools.wraps(original)
    def function(*arguments: Any, **options: Any) -> Any:
        foreign = sorted(name for name, value in options.items() if name not in own and _is_set(value))
        if foreign:
            _counts["handed back: " + ", ".join(foreign)] += 1
            return original(*arguments, **options)
        _counts["served"] += 1
        return hidden_states_logps(*arguments, **{k: v for k, v in options.items() if k in own})

    return function


def _is_set(value: Any) -> bool:
    return isinstance(value, Tensor) or value not in (None, False, "")


def patch() -> None:
    """Replaces `SYMBOLS` in ``unsloth_zoo.rl_replacements``.

    Raises:
        ImportError: Unsloth is missing or finds no GPU, or its version has no such function.
    """
    if _originals:
        return
    try:
        import unsloth_zoo.rl_replacements as replacements
    except (ImportError, NotImplementedError) as error:
        raise ImportError(
            f"grpo_ext.integrations.unsloth needs unsloth, and unsloth needs a GPU to be imported: {error}"
        ) from error
    if not hasattr(replacements, SYMBOLS[0]):
        raise ImportError(
            f"this version of unsloth_zoo has no {SYMBOLS[0]} in its rl_replacements: install one from August 2026 or "
            "later, or train without patch()"
        )
    _counts.clear()
    for name in SYMBOLS:
        if hasattr(replacements, name):
            _originals[name] = getattr(replacements, name)
            setattr(replacements, name, _in_place_of(_originals[name]))


def unpatch() -> None:
    """Unsloth's own functions again."""
    if not _originals:
        return
    import unsloth_zoo.rl_replacements as replacements

    for name, original in _originals.items():
        setattr(replacements, name, original)
    _originals.clear()


def status() -> dict[str, int | bool]:
    """``patched``; ``served``, calls that ran here; ``handed back: <options>``, calls that Unsloth's own code ran."""
    return {"patched": bool(_originals), **_counts}
