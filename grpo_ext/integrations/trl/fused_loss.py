"""Compute the loss of TRL's GRPO trainer with `grpo_ext.linear_grpo_loss`, inside the model's forward.

TRL's own method takes log probabilities from the model's output and computes the loss from them. Here the loss is
computed in place of the product with the head. The model returns the loss as the first of its log probabilities: FSDP,
DDP and ZeRO still see a model output with a gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_ext.config import LEVELS, LOSS_TYPES, LossConfig
from grpo_ext.integrations.trl.counting import counts
from grpo_ext.integrations.trl.metrics import log_metrics
from grpo_ext.integrations.trl.one_forward import complete, lacks_ratio
from grpo_ext.integrations.trl.passes import Update, rows_of, updating
from grpo_ext.integrations.trl.seam import Outputs, Projection, gather_head, overriding_head, reason_to_hand_back
from grpo_ext.linear import linear_grpo_loss
from grpo_ext.linear.arguments import Gather
from grpo_ext.output import GRPOLossOutput

#: Loss types divided by the tokens of the whole generation batch; TRL divides the others by the accumulation steps.
DIVIDED_BY_ITEMS = ("dapo", "cispo", "vespo")


def reason_to_keep_trl(trainer: Any, inputs: dict[str, Any]) -> str | None:
    """Reason to fall back to TRL's own loss, or None."""
    if trainer._entropy_bonus_enabled:
        return "entropy bonus: TRL averages it separately from the loss"
    if trainer.top_entropy_quantile < 1.0:
        return "top_entropy_quantile: the quantile is over all ranks and needs every entropy first"
    if trainer.aux_loss_enabled:
        return "load-balancing loss of a mixture of experts"
    if trainer.off_policy_mask_threshold is not None and inputs.get("sampling_per_token_logps") is not None:
        return "off_policy_mask_threshold with sampling log probabilities, which may be NaN"
    if trainer.loss_type not in LOSS_TYPES:
        return f"loss_type {trainer.loss_type!r}"
    if trainer.importance_sampling_level not in LEVELS:
        return f"importance_sampling_level {trainer.importance_sampling_level!r}"
    if lacks_ratio(trainer, inputs) and trainer.vllm_importance_sampling_clip_max is None:
        return "vllm_importance_sampling_clip_max=None"
    if getattr(trainer.args, "torch_compile", False):
        return "torch_compile"
    return None


def loss_config(trainer: Any, sampling: bool) -> LossConfig:
    """Convert the trainer's settings; `HeadCall` adds temperature, softcap and scale.

    Args:
        sampling: the loss computes the importance weights.
    """
    args = trainer.args
    correction: dict[str, Any] = {}
    if sampling:
        correction = {
            "vllm_importance_sampling_mode": trainer.vllm_importance_sampling_mode,
            "vllm_importance_sampling_clip_max": trainer.vllm_importance_sampling_clip_max,
            "vllm_importance_sampling_clip_min": trainer.vllm_importance_sampling_clip_min,
        }
    return LossConfig(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        epsilon=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta,
        beta=trainer.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        max_completion_length=trainer.max_completion_length,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        **correction,
    )


class HeadCall:
    """Compute the loss when the model's forward calls TRL's log-probability class.

    Args:
        positions: (B,T) bool, the completion positions whose hidden states the model passes, in row-major order.
        mask: (B,T), the positions that count in the loss, a subset of ``positions``.
        policy: tensor keyword arguments of `linear_grpo_loss`.
    """

    def __init__(
        self, config: LossConfig, ids: Tensor, positions: Tensor, mask: Tensor, policy: dict[str, Any]
    ) -> None:
        self.config, self.ids, self.positions, self.mask, self.policy = config, ids, positions, mask, policy
        self.output: GRPOLossOutput | None = None

    def __call__(self, p: Projection) -> Outputs:
        reason = reason_to_hand_back(p, ("log_probs", "entropy"))
        if reason is not None:
            raise RuntimeError(
                f"grpo_ext cannot compute the whole loss of this model ({reason}): use patch() without fuse_loss=True"
            )
        rows = int(p.hidden.shape[0])
        positions = self.positions.to(p.hidden.device)
        if self.output is not None or rows != int(positions.sum()):
            raise RuntimeError(
                f"grpo_ext expected one call to the head with {int(positions.sum())} completion tokens, and this model "
                f"brings {'a second one' if self.output is not None else rows}: use patch() without fuse_loss=True"
            )
        hidden = p.hidden.new_zeros(*positions.shape, p.hidden.shape[1])
        hidden = hidden.masked_scatter(positions.unsqueeze(-1), p.hidden)
        weight, bias = p.weight, p.bias
        gather: Gather | None = gather_head
        if weight.dtype != p.compute_dtype and not torch.is_autocast_enabled(p.hidden.device.type):
            # Cast the head to the dtype of the hidden states, as TRL does block by block.
            weight, bias, gather = weight.to(p.compute_dtype), None if bias is None else bias.to(p.compute_dtype), None
        config = dataclasses.replace(
            self.config, temperature=p.temperature, logit_softcap=p.logit_softcap, logit_scale=p.logit_scale
        )
        advantages = self.policy["advantages"]
        others = {k: v for k, v in self.policy.items() if k != "advantages"}
        out = linear_grpo_loss(
            hidden, weight, self.ids, advantages, self.mask, config, bias=bias, gather=gather,
            memory_budget=p.memory_budget, **others,
        )  # fmt: skip
        self.output = out
        if not rows:  # empty outputs, still connected to the graph of the model
            nothing = p.hidden.sum(dim=1, dtype=torch.float32)
            return nothing, nothing.detach(), None, None, None
        carrier = torch.cat([-out.loss.reshape(1), out.loss.new_zeros(rows - 1)])
        assert out.entropy is not None
        return carrier, out.entropy[positions], None, None, None


def divisor_of(trainer: Any, inputs: dict[str, Any]) -> Tensor | None:
    """TRL's divisor of dapo, cispo and vespo; None for the other loss types."""
    if trainer.loss_type not in DIVIDED_BY_ITEMS:
        return None
    divisor: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if trainer.model.training:
        divisor = divisor * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return divisor


def compute_loss(
    trainer: Any, model: Any, inputs: dict[str, Any], original: Callable[[Any, Any, dict[str, Any]], Tensor]
) -> Tensor:
    """Replacement of ``GRPOTrainer._compute_loss``: same loss and metrics; counts fallbacks to TRL's method."""
    reason = reason_to_keep_trl(trainer, inputs)
    if reason is not None:
        counts.losses_handed_back[reason] += 1
        return original(trainer, model, inputs)
    ids, positions = inputs["completion_ids"], inputs["completion_mask"]
    mask = positions if "tool_mask" not in inputs else positions * inputs["tool_mask"]
    sampling = lacks_ratio(trainer, inputs)
    call = HeadCall(
        loss_config(trainer, sampling),
        ids,
        positions.bool(),
        mask,
        {
            "advantages": inputs["advantages"],
            "old_logps": inputs.get("old_per_token_logps"),
            "ref_logps": inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
            "importance_weights": inputs.get("importance_sampling_ratio"),
            "sampling_logps": inputs["sampling_per_token_logps"] if sampling else None,
            "num_items_in_batch": divisor_of(trainer, inputs),
        },
    )
    modal = (
        "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
        "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    )  # fmt: skip
    with overriding_head(call), updating(Update(rows_of(inputs), True, lambda _: None)):
        carrier, _, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], ids], dim=1),
            torch.cat([inputs["prompt_mask"], positions], dim=1),
            ids.size(1),
            compute_entropy=True,
            **{name: inputs[name] for name in modal if inputs.get(name) is not None},
        )
    if call.output is None:
        raise RuntimeError(
            "the model's forward never reached TRL's fused head, so grpo_ext had no loss to compute: use patch() "
            "without fuse_loss=True with a trainer that overrides _get_per_token_logps_and_entropies"
        )
    loss: Tensor = -carrier.sum()
    if trainer.model.training and trainer.loss_type not in DIVIDED_BY_ITEMS:
        loss = loss / trainer.current_gradient_accumulation_steps
    counts.losses_served += 1
    complete(trainer, inputs, call.output.logps)
    log_metrics(trainer, call.output, inputs, mask)
    return loss
