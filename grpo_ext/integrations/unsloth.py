"""Unsloth on this package's kernels: ``import grpo_ext.integrations.unsloth as u; u.patch()`` before making a trainer.

Unsloth writes its GRPO trainer as source text. That text imports one function from ``unsloth_zoo.rl_replacements`` for
hidden states and head, when it runs: ``chunked_hidden_states_selective_log_softmax``, in later versions also
``grpo_chunked_hidden_states_logprobs``. `patch` replaces these names in that module. Calls with options that are not
ours (scoring over a truncated vocabulary, a head in fp32) are handed back to Unsloth and counted.

``tests/integrations/unsloth_check.py`` runs Unsloth's functions and ours beside each other, on the CPU in
``make test-all`` (Unsloth from October 2026 can be imported without a GPU; its GRPO trainer needs one).
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from grpo_ext.linear import linear_selective_log_softmax

#: What carries the vocabulary; the first is in every version that is served.
SYMBOLS = ("chunked_hidden_states_selective_log_softmax", "grpo_chunked_hidden_states_logprobs")

#: Options of Unsloth's that ask for nothing at these values. Its own defaults are no measure: some come from the
#: environment.
NEUTRAL = {"support_top_k": 0, "support_top_p": 1.0, "support_min_p": 0.0, "fp32_lm_head": False}
#: Options that choose a way, not a result.
WAYS = {"fused_linear", "support_triton_sampler"}

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
        logit_scale=scale, logit_softcap=logit_softcapping or None, logits_dtype="float32",
    )  # fmt: skip
    assert isinstance(logps, Tensor)
    return logps


def _in_place_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, or the original for calls with other options; signature and source text stay the original's."""
    own = set(hidden_states_logps.__annotations__)
    signature = inspect.signature(original)
    further = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(original)
    def function(*arguments: Any, **options: Any) -> Any:
        call = signature.bind(*arguments, **options)
        call.apply_defaults()
        values = dict(call.arguments)
        for name in further:
            values |= values.pop(name)
        foreign = sorted(name for name, value in values.items() if name not in own and _asks_for_more(name, value))
        if foreign:
            _counts["handed back: " + ", ".join(foreign)] += 1
            return original(*arguments, **options)
        _counts["served"] += 1
        return hidden_states_logps(**{name: value for name, value in values.items() if name in own})

    return function


def _asks_for_more(name: str, value: Any) -> bool:
    if name in WAYS:
        return False
    return isinstance(value, Tensor) or value not in (None, False, "", NEUTRAL.get(name))


def patch() -> None:
    """Replaces `SYMBOLS` in ``unsloth_zoo.rl_replacements``.

    Raises:
        ImportError: Unsloth is missing or cannot be imported here (older ones need a GPU), or its version has no such
            function.
    """
    if _originals:
        return
    try:
        import unsloth_zoo.rl_replacements as replacements
    except (ImportError, NotImplementedError) as error:
        raise ImportError(
            "grpo_ext.integrations.unsloth needs unsloth, imported before it (and versions before October 2026 need a "
            f"GPU for that): {error}"
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
