"""Policy loss and fused heads for `grpo_ext.integrations.verl`; importable without verl."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from grpo_ext._checks import checked_mask, poisoned
from grpo_ext.config import LossConfig
from grpo_ext.linear import linear_selective_log_softmax
from grpo_ext.policy import policy_loss

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def _field(config: Any, name: str, default: Any) -> Any:
    """Field of verl's config, which is an object or a mapping; ``default`` if it is missing or None."""
    get = getattr(config, "get", None)
    value = get(name, default) if get is not None else getattr(config, name, default)
    return default if value is None else value


@functools.lru_cache(maxsize=64)
def _loss_config(low: float, high: float, dual: float) -> LossConfig:
    if dual < 1 + high:
        raise ValueError(
            f"clip_ratio_c={dual} is below 1 + clip_ratio_high = {1 + high:g}: the dual clip would cut ratios that the "
            "ordinary clip allows; raise clip_ratio_c, or use loss_mode='vanilla'"
        )
    # For A < 0 verl's dual clip and delta both give |A| * min(c, max(r, 1 - low)); for A > 0 delta exceeds the clip.
    delta = None if dual == 1 + high else dual
    return LossConfig(loss_type="dapo", epsilon=low, epsilon_high=high, delta=delta)


def grpo_ext_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's clipped policy loss ``vanilla``, with dual clip, in one call of this package's kernels.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``(batch, response length)``.
        loss_agg_mode: one of `AGGREGATIONS`.
        config: verl's ActorConfig: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c`` and
            ``global_batch_info`` (``dp_size``, ``batch_num_tokens``, ``global_batch_size``, ``loss_scale_factor``).
        rollout_is_weights: importance weight of each token for the rollout engine, or None.

    Returns:
        The loss with gradient, and ``actor/pg_clipfrac``, ``actor/ppo_kl``, ``actor/pg_clipfrac_lower`` as numbers.
        An empty mask gives 0; verl divides by 0.

    Raises:
        ValueError: for an unknown aggregation, a missing global count with several ranks, or a ``clip_ratio_c`` inside
            the clip range.
    """
    if config is None:
        raise ValueError("verl's ActorConfig is needed for the clip ratios: pass config=")
    clip = _field(config, "clip_ratio", 0.2)
    low, high = _field(config, "clip_ratio_low", clip), _field(config, "clip_ratio_high", clip)
    dual = _field(config, "clip_ratio_c", 3.0)
    mask, right = checked_mask("response_mask", response_mask)
    weighted, divisor = _aggregation(
        poisoned(right, advantages), mask, loss_agg_mode, _field(config, "global_batch_info", {})
    )
    if rollout_is_weights is not None:
        rollout_is_weights = rollout_is_weights.expand(mask.shape)
    out = policy_loss(
        log_prob, weighted, mask, _loss_config(float(low), float(high), float(dual)), old_logps=old_log_prob,
        importance_weights=rollout_is_weights, num_items_in_batch=divisor,
    )  # fmt: skip
    return out.loss, _metrics(old_log_prob, log_prob, advantages, mask, low, high, dual)


def _aggregation(advantages: Tensor, mask: Tensor, mode: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return advantages (B,T) scaled for the mode, and the divisor; the loss is linear in the advantages."""
    ranks = batch.get("dp_size") or 1
    sequences = batch.get("global_batch_size")
    tokens = batch.get("batch_num_tokens")
    per_sequence = mode.startswith("seq-")
    if mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(AGGREGATIONS)}; got {mode!r}")
    missing = ("global_batch_size", sequences) if per_sequence else ("batch_num_tokens", tokens)
    if ranks > 1 and mode != "token-sum" and missing[1] is None:
        raise ValueError(f"{mode} with dp_size={ranks} needs {missing[0]} in config.global_batch_info")
    lengths = mask.sum(dim=1, keepdim=True)
    advantages = advantages.detach().float()
    if mode == "token-sum":
        count: Any = 1.0
    elif mode == "token-mean":
        count = lengths.sum() if tokens is None else tokens
    else:
        count = (lengths > 0).sum() if sequences is None else sequences
    divisor = torch.as_tensor(count, device=mask.device).to(torch.float32) / ranks
    if mode == "seq-mean-token-mean":
        advantages = advantages / lengths.clamp(min=1)
    elif mode == "seq-mean-token-sum-norm":
        divisor = divisor * (batch.get("loss_scale_factor") or mask.shape[1])
    return advantages, divisor


@torch.no_grad()
def _metrics(
    old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, dual: float
) -> dict[str, float]:
    """Compute verl's three means over tokens with a single host sync."""
    difference = torch.where(mask, new.float() - old.float(), 0.0).clamp(-20.0, 20.0)
    ratio = difference.exp()
    cut = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
    lower = (ratio.clamp(min=1 - low) > dual) & (advantages < 0)
    sums = torch.stack([(cut & mask).sum().float(), -difference.sum(), (lower & mask).sum().float()])
    cut_share, kl, lower_share = (sums / mask.sum().clamp(min=1)).tolist()
    return {"actor/pg_clipfrac": cut_share, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": lower_share}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's fused head: log probabilities and entropies, both with gradient, without the logits.

    Args:
        hidden: ``(batch, tokens, H)`` or ``(N,H)``. weight: ``(V,H)``, or this rank's shard.
        labels: int64 ``(batch, tokens)`` or ``(N,)``, ids of the whole vocabulary.
        reduction: reduction of the log probabilities: ``"none"``, ``"sum"`` or ``"mean"``.
        dist_process_group: ranks that hold equal consecutive shards of the vocabulary.

    Returns:
        fp32 log probabilities ``(N,)`` (0-d when reduced) and entropies ``(N,)``.
    """
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    logps, entropy = linear_selective_log_softmax(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature,
        return_entropy=True, process_group=dist_process_group,
    )  # fmt: skip
    if reduction.lower() == "sum":
        logps = logps.sum()
    elif reduction.lower() == "mean":
        logps = logps.mean()
    return logps, entropy


def fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Forward of verl's ``FusedLinearForPPO``: log probabilities and entropies, both with gradient.

    Args:
        self: the module; its chunk size and backend are ignored.
        hidden_states: ``(..., H)``. vocab_weights: ``(V,H)``. input_ids: integers ``(...)``, the labels.

    Returns:
        Two fp32 tensors ``(...)``; verl's entropies have the dtype of ``hidden_states``.
    """
    logps, entropy = linear_cross_entropy(hidden_states, vocab_weights, input_ids.long(), temperature)
    return logps.view(input_ids.shape), entropy.view(input_ids.shape)
