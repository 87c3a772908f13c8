# ruff: noqa: E741  (the specification calls the loss of a token l)
"""Reference losses in plain torch: one function for each step of docs/inside/spec.md ("SPEC section N").

All functions are differentiable by autograd, and exact for fp64 tensors. Tests compare the compiled functions of the
same names with this module.

Symbols: ``B`` sequences, ``T`` positions, ``z`` logits, ``x`` processed logits, ``y`` completion ids, ``m``
mask, ``A`` advantage, ``H`` entropy, ``new``/``old``/``ref``/``sampling`` log probabilities of the current,
behaviour, reference and generating policy, ``d = new - old``, ``w`` the exponent of the ratio ``r``, ``isw``
importance weight for the generation engine, ``l`` loss of one token. Internal tensors are ``(B, T)``, or ``(B, 1)`` for
one value per sequence.

Values at positions with ``m == 0`` are replaced by zeros before any computation: a masked NaN or id of -100 affects
neither the loss nor a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_real, checked_mask, poisoned
from ._reference_parts import (
    Exp,
    ScaleGradient,
    ZeroWithGradient,
    check_ids,
    detached,
    per_sequence_or_token,
    project,
    require_shape,
    require_whole_vocabulary,
    rows,
    select,
    upcast,
)
from .advantages import group_advantages, importance_weights
from .config import CLIPPED_LOSS_TYPES, LossConfig
from .output import METRIC_NAMES, GRPOLossOutput

__all__ = [
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "policy_loss",
    "selective_log_softmax",
]

_form_importance_weights = importance_weights  # the losses have a parameter of that name

LOG_WEIGHT_MIN = math.log(1e-8)
LOG_WEIGHT_MAX = 20.0


# ----------------------------------------------------------------------------------------------------
# 1. Log probabilities and entropy
# ----------------------------------------------------------------------------------------------------


def processed_logits(z: Tensor, temperature: float, logit_softcap: float | None, logit_scale: float) -> Tensor:
    """``x = softcap(logit_scale * z) / temperature`` in fp32, or fp64 for fp64 logits."""
    u = logit_scale * upcast(z)
    if logit_softcap is not None:
        u = logit_softcap * torch.tanh(u / logit_softcap)
    return u / temperature


def log_probability(x: Tensor, y: Tensor) -> Tensor:
    """``x[y] - logsumexp(x)`` over the last dimension."""
    return x.gather(-1, y.unsqueeze(-1)).squeeze(-1) - x.logsumexp(dim=-1)


def entropy_of(x: Tensor) -> Tensor:
    """``logsumexp(x) - sum p x`` over the last dimension; a logit of -inf contributes nothing."""
    p = x.softmax(dim=-1)
    return x.logsumexp(dim=-1) - (p * torch.where(x == -math.inf, 0.0, x)).sum(dim=-1)


def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    process_group: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log probability of ``ids``, and optionally the entropy, under the processed logits.

    Args:
        logits: ``(..., V)`` floating point. ids: ``(...)`` int64 in ``[0, V)``.
        return_entropy: also return the entropy of each row, in nats.

    Returns:
        ``(...)`` fp32 (fp64 for fp64 logits), or two such tensors.

    Raises:
        ValueError: for different shapes. IndexError: for an id outside ``[0, V)``.
    """
    require_whole_vocabulary(process_group)
    check_ids(logits, ids, None)
    x = processed_logits(logits, temperature, logit_softcap, logit_scale)
    logp = log_probability(x, ids)
    return (logp, entropy_of(x)) if return_entropy else logp


# ----------------------------------------------------------------------------------------------------
# 2. Loss of one token
# ----------------------------------------------------------------------------------------------------


def log_ratio(new: Tensor, old: Tensor | None) -> Tensor:
    """``d = new - old``; without ``old`` the value is exactly 0, even for a log probability of -inf."""
    return ZeroWithGradient.apply(new) if old is None else new - old


def ratio_exponent(d: Tensor, m: Tensor, level: str) -> Tensor:
    """``w = d`` per token; at sequence level the masked mean of ``d``, one value per sequence (GSPO)."""
    if level == "token":
        return d
    return d.sum(dim=1, keepdim=True) / m.sum(dim=1, keepdim=True).clamp(min=1)


def kl_k3(new: Tensor, ref: Tensor) -> Tensor:
    """``kl = exp(ref - new) - (ref - new) - 1`` (http://joschu.net/blog/kl-approx.html)."""
    return torch.exp(ref - new) - (ref - new) - 1


def policy_term(new: Tensor, d: Tensor, r: Tensor, A: Tensor, isw: Tensor | None, config: LossConfig) -> Tensor:
    """``l`` of the loss type, before the masks and weights of step 4."""
    if config.loss_type in CLIPPED_LOSS_TYPES:
        r1 = r if config.delta is None else r.clamp(max=config.delta)
        r2 = r.clamp(1 - config.epsilon, 1 + config.clip_high)
        return -torch.min(r1 * A, r2 * A)
    if config.loss_type == "cispo":
        return -r.detach().clamp(max=config.clip_high) * A * new
    if config.loss_type == "sapo":
        tau = torch.full_like(A, config.sapo_temperature_pos).where(A > 0, config.sapo_temperature_neg)
        return -torch.sigmoid(tau * (r - 1)) * 4 / tau * A
    return -vespo_weight(d, A, isw, config) * A * new


@torch.no_grad()
def vespo_weight(d: Tensor, A: Tensor, isw: Tensor | None, config: LossConfig) -> Tensor:
    """``phi``, one per sequence, or one per token if ``A`` is per token. ``isw`` must be 1 at masked positions."""
    s = d.clamp(-20, 20).sum(dim=1, keepdim=True)
    if isw is not None:
        s = s + isw.log().clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX).sum(dim=1, keepdim=True)
    lw = s.clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)
    k = select(A >= 0, config.vespo_k_pos, config.vespo_k_neg, A)
    lam = select(A >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg, A)
    phi = torch.exp(lam + k * lw - lam * torch.exp(lw))
    return torch.where(phi.isfinite(), phi, 0.0)


@torch.no_grad()
def off_policy_keep(new: Tensor, behaviour: Tensor | None, A: Tensor, m: Tensor, threshold: float) -> Tensor:
    """Bool: ``A >= 0``, or the masked mean of ``behaviour - new`` is at most the threshold."""
    difference = torch.zeros_like(new) if behaviour is None else behaviour - new
    mean = difference.sum(dim=1, keepdim=True) / m.sum(dim=1, keepdim=True).clamp(min=1)
    return (A >= 0) | (mean <= threshold)


@torch.no_grad()
def entropy_keep(entropy: Tensor, m: Tensor, quantile: float, threshold: float | Tensor | None) -> Tensor:
    """Bool: the entropy is at least ``threshold``, by default its ``1 - quantile`` quantile over unmasked tokens."""
    if threshold is None:
        values = entropy[m].sort().values
        if values.numel() == 0:
            return m
        position = (1 - quantile) * (values.numel() - 1)
        below = int(position)
        above = min(below + 1, values.numel() - 1)
        threshold = torch.lerp(values[below], values[above], position - below)
    return entropy >= threshold


# ----------------------------------------------------------------------------------------------------
# 3. Reduction
# ----------------------------------------------------------------------------------------------------


def reduce_loss(l: Tensor, m: Tensor, config: LossConfig, num_items: float | Tensor | None) -> Tensor:
    """Divide the sum of the token losses by the divisor of the loss type; ``l`` must be 0 at masked positions."""
    B = max(l.shape[0], 1)
    tokens = m.sum().clamp(min=1)
    if config.loss_type in ("grpo", "sapo"):
        return (l.sum(dim=1) / m.sum(dim=1).clamp(min=1)).sum() / B
    if config.loss_type == "bnpo":
        return l.sum() / tokens
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None  # checked by LossConfig
        return l.sum() / (B * config.max_completion_length)
    if config.loss_type == "luspo":
        return l.sum() / B
    if num_items is None:
        return l.sum() / tokens
    divisor = torch.as_tensor(num_items, dtype=l.dtype, device=l.device)
    return l.sum() / torch.where(divisor > 0, divisor, 1.0)


# ----------------------------------------------------------------------------------------------------
# The losses
# ----------------------------------------------------------------------------------------------------


def policy_loss(
    logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    config: LossConfig,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    grad_scale: float = 1.0,
    entropy: Tensor | None = None,
    entropy_threshold: float | Tensor | None = None,
) -> GRPOLossOutput:
    """GRPO-family loss from log probabilities.

    Args:
        logps: ``(B, T)`` log probabilities with gradient, or ``(N,)``: one sequence of N tokens.
        advantages: ``(B,)`` or ``(B, T)``; ``(N,)`` with ``(N,)`` log probabilities.
        completion_mask: shape of ``logps``; bool, int or float; 0 = masked.
        config: loss type and constants.
        old_logps, ref_logps, sampling_logps: shape of ``logps`` or None.
        importance_weights: ``(B,)``, ``(B, 1)`` or ``(B, T)``; None: computed from ``sampling_logps`` if
            those are given and ``config.vllm_importance_sampling_correction`` is True.
        num_items_in_batch: divisor of dapo, cispo and vespo; None = unmasked tokens of this call.
        grad_scale: factor on the gradient, not on the value.
        entropy: shape of ``logps``; needed for ``entropy_coef`` and ``top_entropy_quantile``.
        entropy_threshold: replaces the quantile of this call's entropies if ``top_entropy_quantile < 1``.

    Raises:
        ValueError: for different shapes, or if an input that the config needs is missing.
    """
    if logps.dim() not in (1, 2):
        raise ValueError(f"logps has shape {tuple(logps.shape)}: pass (B, T), or (N,) for one sequence")
    shape = logps.shape
    require_shape("completion_mask", completion_mask, shape)
    mask, right = checked_mask("completion_mask", completion_mask)
    m = rows(mask)
    dtype = upcast(logps).dtype

    def tokens(name: str, tensor: Tensor | None) -> Tensor | None:
        """Convert to ``(B, T)`` with the working dtype and 0 at masked positions."""
        if tensor is None:
            return None
        require_shape(name, tensor, shape)
        return torch.where(m, rows(tensor).to(dtype), 0.0)

    new = tokens("logps", logps)
    assert new is not None
    old = tokens("old_logps", detached(old_logps))
    ref = tokens("ref_logps", detached(ref_logps))
    sampling = tokens("sampling_logps", detached(sampling_logps))
    H = tokens("entropy", entropy)
    check_real("advantages", advantages)
    A = poisoned(right, per_sequence_or_token("advantages", advantages.detach(), shape, m, 0.0, dtype))
    if config.beta != 0 and ref is None:
        raise ValueError(f"beta={config.beta} needs ref_logps: pass the reference model's log probabilities")
    if config.entropy_coef != 0 and H is None:
        raise ValueError(f"entropy_coef={config.entropy_coef} needs entropy")
    select_entropy = config.top_entropy_quantile < 1
    if select_entropy and H is None:
        raise ValueError(f"top_entropy_quantile={config.top_entropy_quantile} needs entropy")

    isw = None
    if importance_weights is not None:
        isw = per_sequence_or_token("importance_weights", importance_weights.detach(), shape, m, 1.0, dtype)
    elif sampling is not None and config.vllm_importance_sampling_correction:
        isw = _form_importance_weights(
            new.detach() if old is None else old,
            sampling,
            m,
            mode=config.vllm_importance_sampling_mode,
            cap=config.importance_cap,
            min=config.importance_min,
        )
        if config.vllm_importance_sampling_mode.startswith("token"):
            isw = torch.where(m, isw, 1.0)

    # Steps 1 to 3
    d = log_ratio(new, old)
    w = ratio_exponent(d, m, config.importance_sampling_level)
    r = Exp.apply(w)
    kl = None
    if config.beta != 0 and ref is not None:
        kl = kl_k3(new, ref)
        if config.use_bias_correction_kl:
            kl = kl * r
        kl = torch.where(m, kl, 0.0)
    l = policy_term(new, d, r, A, isw, config)

    # Step 4. A factor of 0 removes the term, even an infinite one.
    keep = torch.ones_like(A, dtype=torch.bool)
    if config.off_policy_mask_threshold is not None:
        behaviour = old if sampling is None else sampling
        keep = off_policy_keep(new, behaviour, A, m, config.off_policy_mask_threshold)
    active = m & keep & (A != 0)
    if select_entropy:
        assert H is not None
        active = active & entropy_keep(H, m, config.top_entropy_quantile, entropy_threshold)
    if isw is not None and config.loss_type != "vespo":
        active = active & (isw != 0)
        l = l * isw
    l = torch.where(active, l, 0.0)
    if kl is not None:
        l = l + config.beta * kl
    if config.entropy_coef != 0 and H is not None:
        l = l - config.entropy_coef * H
    l = torch.where(new.isnan(), new, l)  # a NaN logit gives a NaN loss even if the factor is 0

    loss = ScaleGradient.apply(reduce_loss(l, m, config, num_items_in_batch), grad_scale)
    return GRPOLossOutput(
        loss=loss,
        logps=new.detach().reshape(shape),
        entropy=None if H is None else H.detach().reshape(shape),
        kl=None if kl is None else kl.detach().reshape(shape),
        metrics=_metrics(l, new, old, sampling, H, kl, r, A, isw, keep, m, config),
    )


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    config: LossConfig,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    inplace: bool = False,
    grad_scale: float = 1.0,
    entropy_threshold: float | Tensor | None = None,
) -> GRPOLossOutput:
    """GRPO-family loss from ``(B, T, V)`` or ``(N, V)`` logits; other arguments as in :func:`policy_loss`.

    ``inplace`` is accepted and ignored: it affects memory, not values.
    """
    require_shape("completion_mask", completion_mask, completion_ids.shape)
    m = completion_mask != 0
    check_ids(logits, completion_ids, m)
    z = torch.where(m.unsqueeze(-1), logits, 0.0)
    x = processed_logits(z, config.temperature, config.logit_softcap, config.logit_scale)
    return policy_loss(
        log_probability(x, torch.where(m, completion_ids, 0)),
        advantages,
        completion_mask,
        config,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_logps=sampling_logps,
        importance_weights=importance_weights,
        num_items_in_batch=num_items_in_batch,
        grad_scale=grad_scale,
        entropy=entropy_of(x),
        entropy_threshold=entropy_threshold,
    )


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    process_group: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_log_softmax` of ``hidden @ weight.T + bias``.

    Args:
        hidden: ``(..., H)``. weight: ``(V, H)``. bias: ``(V,)`` or None.
        mask: shape of ``ids``; masked positions (0) give 0. None = no position is masked.
        logits_dtype: round the logits to this dtype; None = keep the dtype of the product.
    """
    require_whole_vocabulary(process_group)
    m, right = (torch.ones_like(ids, dtype=torch.bool), None) if mask is None else checked_mask("mask", mask)
    require_shape("mask", m, ids.shape)
    z = project(hidden, weight, bias, m, logits_dtype)
    check_ids(z, ids, m)
    logp, entropy = selective_log_softmax(
        z,
        torch.where(m, ids, 0),
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        return_entropy=True,
    )
    logp, entropy = (poisoned(right, torch.where(m, x, 0.0)) for x in (logp, entropy))
    return (logp, entropy) if return_entropy else logp


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    config: LossConfig,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> GRPOLossOutput:
    """:func:`grpo_loss` of ``hidden @ weight.T + bias``; ``options`` are its keyword arguments."""
    require_shape("completion_mask", completion_mask, completion_ids.shape)
    z = project(hidden, weight, bias, completion_mask != 0, None)
    return grpo_loss(z, completion_ids, advantages, completion_mask, config, **options)


# ----------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _metrics(
    l: Tensor,
    new: Tensor,
    old: Tensor | None,
    sampling: Tensor | None,
    H: Tensor | None,
    kl: Tensor | None,
    r: Tensor,
    A: Tensor,
    isw: Tensor | None,
    keep: Tensor,
    m: Tensor,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Compute the metrics of ``METRIC_NAMES``; see ``GRPOLossOutput``."""
    none = torch.zeros_like(new)
    sequences = m.any(dim=1, keepdim=True)
    counted = sequences if config.importance_sampling_level == "sequence" else m  # one ratio per sequence or token

    low = high = torch.zeros_like(m)
    if config.loss_type in CLIPPED_LOSS_TYPES:
        low = m & (r < 1 - config.epsilon) & (A < 0)
        high = m & (r > 1 + config.clip_high) & (A > 0)
    elif config.loss_type == "cispo":
        high = m & (r > config.clip_high) & (A > 0)
    if config.importance_sampling_level == "sequence":
        low, high = low.any(dim=1, keepdim=True), high.any(dim=1, keepdim=True)

    weight = none + 1 if isw is None else isw.expand_as(new)
    difference = none
    if sampling is not None:
        difference = ((new if old is None else old) - sampling).abs()
        difference = torch.where(difference.isnan(), 0.0, difference)

    values = (
        m.sum().to(l.dtype),
        _mean(none if H is None else H, m),
        _mean(none if kl is None else kl, m),
        _mean(low.to(l.dtype), counted),
        _mean(high.to(l.dtype), counted),
        _mean((low | high).to(l.dtype), counted),
        _mean(r, counted),
        _max(r, counted),
        _mean(weight, m),
        -_max(-weight, m),
        _max(weight, m),
        _mean(difference, m),
        _max(difference, m),
        _mean((keep | ~m).all(dim=1, keepdim=True).to(l.dtype), sequences),
        (m & ~l.isfinite()).sum().to(l.dtype),
    )
    return dict(zip(METRIC_NAMES, values, strict=True))


def _mean(value: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, value, 0.0).sum() / where.sum().clamp(min=1)


def _max(value: Tensor, where: Tensor) -> Tensor:
    if not bool(where.any()):
        return value.new_zeros(())
    return torch.where(where, value, -math.inf).amax()
