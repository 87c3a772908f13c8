"""Replacement of TRL's ``_ChunkedLogProbFunction``.

TRL's trainers call its ``.apply`` inside the model's forward, with the head and the hidden states of the positions to
score. Calls that our kernels do not support fall back to TRL's own class and are counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops import DTYPE_CODES, logit_transform
from grpo_ext.integrations.trl.counting import counts
from grpo_ext.linear.arguments import wanted_gradients
from grpo_ext.linear.logps import Request, linear_logps
from grpo_ext.linear.plan import TRAINER_BUDGET, Numerics
from grpo_ext.linear.routes.base import Wanted

#: (logps fp32 (N,), entropy, log_sum_sq_probs, mean_logits, is_top1); None for outputs not requested.
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

#: Outputs that TRL's class computes by default, besides the log probabilities.
ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SUPPORTED_OUTPUTS = frozenset({"log_probs", *ALL_OUTPUTS})


@dataclasses.dataclass(frozen=True)
class Projection:
    """Arguments of one call.

    Attributes:
        hidden: (N,H). weight: (V,H), of any floating-point dtype. bias: (V,) or None. targets: (N,) int64.
        compute_dtype: dtype of the products: the autocast dtype if autocast is on, else the dtype of ``hidden``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float
    logit_softcap: float | None
    logit_scale: float
    compute_dtype: torch.dtype

    @property
    def memory_budget(self) -> int | None:
        """Memory budget of the linear losses in bytes; None: their default."""
        return TRAINER_BUDGET.get(self.hidden.device.type)

    def numerics(self, temperature: float) -> Numerics:
        transform = logit_transform(temperature, self.logit_softcap, self.logit_scale)
        return Numerics(transform, self.compute_dtype, self.compute_dtype, self.memory_budget, None)


#: Function that `fused_loss` sets during the model's forward; it handles the call instead of `log_probabilities`.
head_override: ContextVar[Callable[[Projection], Outputs] | None] = ContextVar("grpo_ext_trl_loss", default=None)


@contextlib.contextmanager
def overriding_head(function: Callable[[Projection], Outputs]) -> Iterator[None]:
    """Route calls inside this context to ``function``."""
    token = head_override.set(function)
    try:
        yield
    finally:
        head_override.reset(token)


def gather_head(weight: Tensor, bias: Tensor | None) -> AbstractContextManager[Any]:
    """TRL's context that gathers a head sharded by DeepSpeed ZeRO-3; looked up at call time."""
    from trl.trainer import utils

    context: AbstractContextManager[Any] = utils.maybe_gather_lm_head_ctx(weight, bias)
    return context


def reason_to_hand_back(projection: Projection, outputs: tuple[str, ...]) -> str | None:
    """Reason to fall back to TRL's class for this call, or None."""
    unsupported = sorted(set(outputs) - SUPPORTED_OUTPUTS)
    if unsupported:
        return "TRL needs " + ", ".join(unsupported)
    hidden = projection.hidden
    if hidden.device.type == "cuda" and not _C.CUDA_VERSION:
        return "grpo_ext was built without CUDA"
    if hidden.device.type not in ("cpu", "cuda"):
        return f"device {hidden.device.type}"
    for name, dtype in (("hidden states", hidden.dtype), ("products", projection.compute_dtype)):
        if dtype not in DTYPE_CODES or dtype == torch.float64:
            return f"{name} of {str(dtype).removeprefix('torch.')}"
    softcap = projection.logit_softcap
    if projection.logit_scale == 0 or (softcap is not None and softcap <= 0):
        return f"logit_scale {projection.logit_scale}, softcap {softcap}"
    if softcap is not None and "mean_logits" in outputs:
        return "TRL needs mean_logits under a softcap"
    return None


@torch.no_grad()
def mean_logits(projection: Projection) -> Tensor:
    """Mean of each row's processed logits over the vocabulary, fp32 (N,), from the mean row of the head."""
    p = projection
    with gather_head(p.weight, p.bias):
        row = p.weight.to(p.compute_dtype).mean(0, dtype=torch.float32)
        offset = 0.0 if p.bias is None else p.bias.float().mean()
    with torch.autocast(p.hidden.device.type, enabled=False):
        mean: Tensor = p.hidden.to(p.compute_dtype).float() @ row + offset
    return mean * (p.logit_scale / p.temperature)


@torch.no_grad()
def log_sum_sq_probs(projection: Projection, logps: Tensor) -> Tensor:
    """``log sum p^2`` of each row's distribution, fp32 (N,), for one more product with the head.

    At half the temperature a token of probability p has ``p^2 / sum p^2``.
    """
    p = projection
    request = Request(p.numerics(p.temperature / 2), Wanted(False, False, False), False, False, None, gather_head)
    sharper, _, _ = linear_logps(p.hidden, p.weight, p.bias, p.targets, None, None, None, request)
    return 2 * logps - sharper


def log_probabilities(projection: Projection, outputs: tuple[str, ...]) -> Outputs:
    """Compute the outputs with this package's kernels."""
    p = projection
    wanted = wanted_gradients(p.hidden, p.weight, p.bias)
    counts.served["with gradient" if any(wanted) else "without gradient"] += 1
    with_entropy, with_top1 = "entropy" in outputs, "is_top1" in outputs
    request = Request(p.numerics(p.temperature), wanted, with_entropy, False, None, gather_head, with_top1)
    logps, entropy, is_top1 = linear_logps(p.hidden, p.weight, p.bias, p.targets, None, None, None, request)
    return (
        logps,
        entropy if with_entropy else None,
        log_sum_sq_probs(p, logps) if "log_sum_sq_probs" in outputs else None,
        mean_logits(p) if "mean_logits" in outputs else None,
        is_top1 if with_top1 else None,
    )


class LogProbabilities:
    """Replacement of ``trl.trainer.utils._ChunkedLogProbFunction``; ``original`` is the replaced class."""

    original: Any = None

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ALL_OUTPUTS,
    ) -> Outputs:
        """Take TRL's arguments, return `Outputs`; ignore ``chunk_size``, which `grpo_ext.linear` chooses."""
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        projection = Projection(
            hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale,
            torch.get_autocast_dtype(kind) if autocast else hidden.dtype,
        )  # fmt: skip
        override = head_override.get()
        if override is not None:
            return override(projection)
        reason = reason_to_hand_back(projection, tuple(outputs))
        if reason is None:
            return log_probabilities(projection, tuple(outputs))
        counts.handed_back[reason] += 1
        result: Outputs = cls.original.apply(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )
        return result
