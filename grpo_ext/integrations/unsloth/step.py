"""The step of Unsloth's GRPO trainer with fewer forwards and less padding.

The generated trainer calls ``grpo_accumulated_loss`` of its own module with the micro-batch as arguments; the function
runs the model and calls ``UnslothEfficientGRPO.apply`` with log probabilities. The wrappers here change arguments of
these calls, so the model, the loss and its metrics stay Unsloth's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from grpo_ext.integrations.unsloth.counting import counts
from grpo_ext.integrations.unsloth.head import padding_masked
from grpo_ext.modules.inspection import has_dropout

#: Environment variable with which Unsloth turns its packed stream off.
PACKING = "UNSLOTH_GRPO_SEQ_PACKING"
#: Environment variables that make other code of Unsloth read the old log probabilities.
READ_OLD_LOGPS = ("UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD", "UNSLOTH_GRPO_ROLLOUT_METRICS", "UNSLOTH_GRPO_ROLLOUT_RS")

#: Attribute of a trainer while it scores completions: the next log probabilities asked for are the old ones.
SKIP_OLD = "_grpo_ext_skip_old_logps"

#: Arguments of ``grpo_accumulated_loss`` with a column per token of prompt and completion; per token of the completion;
#: and per token of the completion and of the widest left padding before it.
OVER_ROW = ("input_ids", "attention_mask")
OVER_COMPLETION = ("completion_mask", "tool_mask", "sampling_per_token_logps")
OVER_WINDOW = ("old_logps", "ref_logps")
#: Its arguments without columns. Others, such as images, forbid trimming.
WITHOUT_COLUMNS = {
    "trainer", "logits_to_keep", "advantages", "n_chunks", "loss_type", "importance_sampling_level", "epsilon_low",
    "epsilon_high", "max_completion_length", "delta", "temperature", "max_left_pad", "logit_softcapping",
    "logit_scale_multiply", "logit_scale_divide", "num_items_in_batch", "current_gradient_accumulation_steps",
    "num_processes", "sample_weight", "rollout_logps_as_old",
}  # fmt: skip


def accumulated_loss(original: Callable[..., Any], trim: bool, dense: bool | None) -> Callable[..., Any]:
    """Wrap ``grpo_accumulated_loss``.

    Args:
        trim: cut the columns that are padding in all rows.
        dense: lay rows side by side instead of packing them; None: where `attends_by_segments`.
    """

    @functools.wraps(original)
    def run(*arguments: Any, **values: Any) -> Any:
        if arguments:
            counts["loss handed back: positional arguments"] += 1
            return original(*arguments, **values)
        if trim:
            values = trimmed(values)
        with padding_masked(values["trainer"].processing_class.pad_token_id), unpacked(values["trainer"], dense):
            return original(**values)

    return run


def trimmed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``grpo_accumulated_loss`` without the columns that are padding in every row.

    At least one column of the prompt and one of the completion stay.
    """
    columns = {*OVER_ROW, *OVER_COMPLETION, *OVER_WINDOW}
    others = [name for name, value in values.items() if value is not None and name not in WITHOUT_COLUMNS | columns]
    if others:
        counts["trim handed back: " + ", ".join(sorted(others))] += 1
        return values
    ids, keep = values["input_ids"], values["logits_to_keep"]
    used = (ids != values["trainer"].processing_class.pad_token_id).any(dim=0)
    unused = [side.cumsum(0).eq(0).sum() for side in (used[:-keep], used[-keep:].flip(0))]
    left, right = torch.stack(unused).tolist()
    left, right = min(left, ids.shape[1] - keep - 1), min(right, keep - 1)
    counts["trim served"] += 1
    if not left and not right:
        return values

    def cut(names: tuple[str, ...], before: int, after: int) -> dict[str, Tensor]:
        found = {name: values[name] for name in names if isinstance(values.get(name), Tensor)}
        return {name: tensor[:, before : tensor.shape[1] - after] for name, tensor in found.items()}

    # The window starts at the row's leftmost completion token after the rows are moved to the left. The columns that
    # prompts lose there come from its width, not from its start.
    return (
        values
        | {"logits_to_keep": keep - right}
        | cut(OVER_ROW, left, right)
        | cut(OVER_COMPLETION, 0, right)
        | cut(OVER_WINDOW, 0, left + right)
    )


@contextlib.contextmanager
def unpacked(trainer: Any, dense: bool | None) -> Iterator[None]:
    """Turn Unsloth's packed stream off; it then moves each row to the left and lays the rows side by side."""
    reason = reason_to_pack(trainer, dense)
    counts["dense served" if reason is None else f"dense handed back: {reason}"] += 1
    if reason is not None:
        yield
        return
    os.environ[PACKING] = "0"
    try:
        yield
    finally:
        del os.environ[PACKING]


def reason_to_pack(trainer: Any, dense: bool | None) -> str | None:
    """Return why a micro-batch stays a packed stream; None if not."""
    if dense is False:
        return "dense=False"
    if PACKING in os.environ:
        return f"{PACKING} is set"
    if dense is None and not getattr(trainer, "use_vllm", False):
        return "Unsloth shares prompts in its packed stream (use_vllm=False)"
    if dense is None and not attends_by_segments():
        return "attention has a kernel for packed rows"
    return None


@functools.lru_cache(maxsize=1)
def attends_by_segments() -> bool:
    """Whether Unsloth's attention runs one call per row of a packed stream: no flash-attn, xformers or torch kernel."""
    try:
        from unsloth.utils import attention_dispatch as dispatch  # type: ignore[import-not-found]
    except ImportError:
        return False
    by_sdpa = bool(dispatch.select_attention_backend(True) == dispatch.SDPA)
    return by_sdpa and getattr(dispatch, "_TORCH_VARLEN_ATTN", None) is None


class WithOldLogps:
    """Stand in for ``UnslothEfficientGRPO``: missing old log probabilities are those of the training forward."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(self, new: Tensor, old: Tensor | None, ref: Any, sampling: Tensor | None, *rest: Any) -> Any:
        if old is None and sampling is not None:
            old = new.detach().clone()
        return self.original.apply(new, old, ref, sampling, *rest)


def generate_and_score(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``_generate_and_score_completions``: its first call for log probabilities asks for the old ones."""

    @functools.wraps(original)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        corrects = getattr(self, "use_vllm", False) and getattr(self, "vllm_importance_sampling_correction", False)
        if corrects:  # else Unsloth runs no second forward for aligned steps
            reason = reason_to_score_twice(self)
            counts["one_forward served" if reason is None else f"one_forward handed back: {reason}"] += 1
            setattr(self, SKIP_OLD, reason is None)
        try:
            return original(self, *arguments, **options)
        finally:
            self.__dict__.pop(SKIP_OLD, None)

    return run


def token_logps(original: Callable[..., Any], results: int) -> Callable[..., Any]:
    """Wrap ``_get_per_token_logps_and_entropies``, which returns ``results`` values: skip the old log probabilities."""

    @functools.wraps(original)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        return (None,) * results if self.__dict__.pop(SKIP_OLD, False) else original(self, *arguments, **options)

    return run


def reason_to_score_twice(trainer: Any) -> str | None:
    """Return why old log probabilities need a forward of their own; None if they are those of the training forward."""
    arguments = trainer.args
    steps = arguments.steps_per_generation * getattr(trainer, "num_iterations", 1)
    if arguments.gradient_accumulation_steps % steps:
        return f"{steps} steps use one generation batch"
    if has_dropout(trainer.model):
        return "dropout"
    found = [name for name in READ_OLD_LOGPS if os.environ.get(name, "0") not in ("", "0")]
    if found:
        return f"{', '.join(found)} is set"
    import unsloth_zoo.rl_replacements as replacements

    support = getattr(replacements, "grpo_truncated_support_kwargs", None)
    return "log probabilities over a truncated vocabulary" if support is not None and support(trainer) else None


def results_of_scoring(source: str) -> int | None:
    """Return how many values a trainer unpacks from the scoring of its old log probabilities; None: unknown."""
    found = re.search(r"old_per_token_logps((?:, *\w+)*) = self\._get_per_token_logps_and_entropies\(", source)
    return None if found is None else 1 + found.group(1).count(",")


def owner_of(trainer: type, name: str) -> type | None:
    """Return the class that defines a method of a trainer."""
    return next((owner for owner in trainer.__mro__ if name in owner.__dict__), None)


def names_of(trainer: type) -> dict[str, Any] | None:
    """Return the names of the generated module of a trainer; None for a trainer that Unsloth did not generate."""
    function = inspect.unwrap(getattr(trainer, "compute_loss", lambda: None))
    names: dict[str, Any] = getattr(function, "__globals__", {})
    return names if {"grpo_accumulated_loss", "UnslothEfficientGRPO"} <= names.keys() else None
