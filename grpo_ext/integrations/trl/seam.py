"""The class that stands in for TRL's ``_ChunkedLogProbFunction``.

TRL's trainers call ``.apply`` on it inside the model's forward, with the hidden states of the positions to score and
the head. What a call brings that the kernels here do not serve goes to TRL's own class, and is counted.
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

#: (logps fp32 (N,), entropy, log_sum_sq_probs, mean_logits, is_top1); None for what was not asked for.
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

#: What TRL's class computes beside the log probabilities when nobody says otherwise.
ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
OURS = frozenset({"log_probs", "entropy", "mean_logits"})


@dataclasses.dataclass(frozen=True)
class Projection:
    """The arguments of one call.

    Attributes:
        hidden: (N,H). weight: (V,H), maybe of another dtype. bias: (V,) or None. targets: (N,) int64.
        compute_dtype: the dtype of the products: autocast's, else that of ``hidden``.
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
        """For the linear losses; None: their default."""
        return TRAINER_BUDGET.get(self.hidden.device.type)


#: Set while `fused_loss` waits for the model's forward to reach the head: takes over the call.
taker: ContextVar[Callable[[Projection], Outputs] | None] = ContextVar("grpo_ext_trl_loss", default=None)


@contextlib.contextmanager
def taking(function: Callable[[Projection], Outputs]) -> Iterator[None]:
    """Inside, calls go to ``function``."""
    token = taker.set(function)
    try:
        yield
    finally:
        taker.reset(token)


def gather_head(weight: Tensor, bias: Tensor | None) -> AbstractContextManager[Any]:
    """TRL's own context in which a head that DeepSpeed ZeRO-3 has sharded is whole; looked up at call time."""
    from trl.trainer import utils

    context: AbstractContextManager[Any] = utils.maybe_gather_lm_head_ctx(weight, bias)
    return context


def reason_to_hand_back(projection: Projection, outputs: tuple[str, ...]) -> str | None:
    """Why TRL's class has to run this call; None: it does not."""
    foreign = sorted(set(outputs) - OURS)
    if foreign:
        return "asks for " + ", ".join(foreign)
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
        return "asks for mean_logits under a softcap"
    return None


@torch.no_grad()
def mean_logits(projection: Projection) -> Tensor:
    """Mean over the vocabulary of each row's processed logits, fp32 (N,): linear, so the head's mean row gives it."""
    p = projection
    with gather_head(p.weight, p.bias):
        row = p.weight.to(p.compute_dtype).mean(0, dtype=torch.float32)
        offset = 0.0 if p.bias is None else p.bias.float().mean()
    with torch.autocast(p.hidden.device.type, enabled=False):
        mean: Tensor = p.hidden.to(p.compute_dtype).float() @ row + offset
    return mean * (p.logit_scale / p.temperature)


def log_probabilities(projection: Projection, outputs: tuple[str, ...]) -> Outputs:
    """The call on this package's kernels."""
    p = projection
    numerics = Numerics(
        logit_transform(p.temperature, p.logit_softcap, p.logit_scale),
        p.compute_dtype,
        p.compute_dtype,
        p.memory_budget,
        None,
    )
    wanted = wanted_gradients(p.hidden, p.weight, p.bias)
    counts.served["with gradient" if any(wanted) else "without gradient"] += 1
    with_entropy = "entropy" in outputs
    request = Request(numerics, wanted, with_entropy, False, None, gather_head)
    logps, entropy = linear_logps(p.hidden, p.weight, p.bias, p.targets, None, None, None, request)
    mean = mean_logits(p) if "mean_logits" in outputs else None
    return logps, entropy if with_entropy else None, None, mean, None


class LogProbabilities:
    """In place of ``trl.trainer.utils._ChunkedLogProbFunction``; ``original`` is that class."""

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
        """TRL's arguments and results: see `Projection` and `Outputs`. ``chunk_size`` is left to `grpo_ext.linear`."""
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        projection = Projection(
            hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale,
            torch.get_autocast_dtype(kind) if autocast else hidden.dtype,
        )  # fmt: skip
        take = taker.get()
        if take is not None:
            return take(projection)
        reason = reason_to_hand_back(projection, tuple(outputs))
        if reason is None:
            return log_probabilities(projection, tuple(outputs))
        counts.handed_back[reason] += 1
        result: Outputs = cls.original.apply(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )
        return result
