"""Log probabilities from hidden states and head, in the place of Unsloth's functions.

Unsloth generates its GRPO trainer as source text. At run time the generated code imports one function for hidden states
and head from ``unsloth_zoo.rl_replacements``: ``chunked_hidden_states_selective_log_softmax``, in later versions also
``grpo_chunked_hidden_states_logprobs``. Calls with unsupported options (scoring over a truncated vocabulary, a head in
fp32) fall back to Unsloth's code and are counted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from grpo_ext.integrations.unsloth.counting import counts
from grpo_ext.linear import linear_selective_log_softmax

#: Functions that multiply by the head; every supported version has the first.
SYMBOLS = ("chunked_hidden_states_selective_log_softmax", "grpo_chunked_hidden_states_logprobs")

#: Values at which Unsloth's options have no effect. Its own defaults cannot serve here: some come from the environment.
NEUTRAL = {"support_top_k": 0, "support_top_p": 1.0, "support_min_p": 0.0, "fp32_lm_head": False}
#: Options that choose an implementation and do not change the result.
IGNORED = {"fused_linear", "support_triton_sampler"}

#: Inside `padding_masked`: the id at which no log probability is used.
_padding: list[int] = []


@contextlib.contextmanager
def padding_masked(pad_id: int) -> Iterator[None]:
    """Skip the rows whose target is ``pad_id``, whose log probabilities the loss does not use; they become 0."""
    _padding.append(pad_id)
    try:
        yield
    finally:
        _padding.pop()


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
        hidden_states: ``(B,T,H)``; cast to the dtype of the head. lm_head: ``(V,H)``, lm_head_bias ``(V,)``.
        index: int64 ``(B,T)``.
        chunks, max_rows_per_chunk: accepted and ignored; `grpo_ext.linear` chooses the chunk size.
        logit_scale_multiply, logit_scale_divide, logit_softcapping: applied in this order; 0 = not applied.
        temperature: divides the processed logits.

    Returns:
        fp32 ``(B,T)``, with gradient for the inputs that require one; 0 at the padding inside `padding_masked`.
    """
    scale = (logit_scale_multiply or 1.0) / (logit_scale_divide or 1.0)
    logps = linear_selective_log_softmax(
        hidden_states.to(lm_head.dtype), lm_head, index, bias=lm_head_bias,
        mask=index != _padding[-1] if _padding else None, temperature=temperature or 1.0,
        logit_scale=scale, logit_softcap=logit_softcapping or None, logits_dtype="float32",
    )  # fmt: skip
    assert isinstance(logps, Tensor)
    return logps


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``original``: call `hidden_states_logps` if it supports the options, else ``original``."""
    own = set(hidden_states_logps.__annotations__)
    signature = inspect.signature(original)
    keyword_parameters = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(original)
    def function(*arguments: Any, **options: Any) -> Any:
        call = signature.bind(*arguments, **options)
        call.apply_defaults()
        values = dict(call.arguments)
        for name in keyword_parameters:
            values |= values.pop(name)
        unsupported = sorted(name for name, value in values.items() if name not in own and _unsupported(name, value))
        if unsupported:
            counts["handed back: " + ", ".join(unsupported)] += 1
            return original(*arguments, **options)
        counts["served"] += 1
        return hidden_states_logps(**{name: value for name, value in values.items() if name in own})

    return function


def _unsupported(name: str, value: Any) -> bool:
    if name in IGNORED:
        return False
    return isinstance(value, Tensor) or value not in (None, False, "", NEUTRAL.get(name))
