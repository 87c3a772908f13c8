"""TRL's metrics of a GRPO loss, computed from the ``(B,T)`` outputs of `linear_grpo_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ext.config import CLIPPED_LOSS_TYPES
from grpo_ext.output import GRPOLossOutput


@torch.no_grad()
def log_metrics(trainer: Any, out: GRPOLossOutput, inputs: dict[str, Any], mask: Tensor) -> None:
    """Append to ``trainer._metrics`` with the names and definitions of TRL 1.16."""
    log = trainer._metrics["train" if trainer.model.training else "eval"]
    advantages = inputs["advantages"]
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    old = inputs.get("old_per_token_logps")
    new = out.logps
    difference = torch.zeros_like(new) if old is None else torch.where(mask != 0, new - old, 0.0)
    by_sequence = trainer.importance_sampling_level == "sequence"
    exponent = difference
    if by_sequence:
        exponent = difference.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    ratio = exponent.exp()

    def over_ranks(values: Tensor) -> float:
        """Mean over unmasked tokens of all ranks, or over all completions if there is one value per completion."""
        if values.shape[1] == 1:
            total, count = values.sum(), values.new_tensor(float(values.shape[0]))
        else:
            total, count = (values * mask).sum(), mask.sum().to(values.dtype)
        sums = trainer.accelerator.reduce(torch.stack([total, count]), reduction="sum")
        return float(sums[0] / sums[1].clamp(min=1.0))

    def of_sequences(values: Tensor) -> Tensor:
        """Gather one mean per completion from all ranks; NaN for a fully masked completion."""
        own = values.squeeze(1) if values.shape[1] == 1 else (values * mask).sum(dim=1) / mask.sum(dim=1)
        gathered: Tensor = trainer.accelerator.gather(own)
        return gathered

    if out.kl is not None:
        log["kl"].append(over_ranks(out.kl))
    assert out.entropy is not None
    log["entropy"].append(over_ranks(out.entropy))
    if trainer.loss_type in CLIPPED_LOSS_TYPES:
        if trainer.args.delta is not None:
            ratio = ratio.clamp(max=trainer.args.delta)
        low = ((ratio < 1 - trainer.epsilon_low) & (advantages < 0)).to(new.dtype)
        high = ((ratio > 1 + trainer.epsilon_high) & (advantages > 0)).to(new.dtype)
        log["clip_ratio/low_mean"].append(over_ranks(low))
        log["clip_ratio/high_mean"].append(over_ranks(high))
        log["clip_ratio/region_mean"].append(over_ranks(torch.maximum(low, high)))
        log["clip_ratio/low_min"].append(_extreme(of_sequences(low), torch.amin))
        log["clip_ratio/high_max"].append(_extreme(of_sequences(high), torch.amax))
    elif trainer.loss_type == "cispo":
        capped = ((ratio > trainer.epsilon_high) & (advantages > 0)).to(new.dtype)
        log["cispo_clip_ratio"].append(over_ranks(capped))
    elif trainer.loss_type == "vespo":
        args = trainer.args
        phi = trainer.get_gamma_weights(
            advantages=advantages,
            log_ratio_per_token=difference,
            mask=mask,
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            k_pos=args.vespo_k_pos,
            lambda_pos=args.vespo_lambda_pos,
            k_neg=args.vespo_k_neg,
            lambda_neg=args.vespo_lambda_neg,
        )
        log["vespo/phi_seq_mean"].append(over_ranks(phi))


def _extreme(values: Tensor, of: Any) -> float:
    """Apply ``of`` to the values other than NaN; NaN if every value is NaN."""
    known = values[~values.isnan()]
    return float(of(known)) if known.numel() else float("nan")
