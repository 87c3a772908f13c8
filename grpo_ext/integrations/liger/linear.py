"""Liger-Kernel's `LigerFusedLinearGRPOLoss`, computed by `grpo_ext.linear_grpo_loss`."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext._checks import Number, checked_mask, poisoned
from grpo_ext.integrations.liger.terms import clipped, config_of, divisor, per_token, token_mean
from grpo_ext.linear import linear_grpo_loss, linear_selective_log_softmax


class LigerFusedLinearGRPOLoss(nn.Module):
    """Language-model head and GRPO loss in one module.

    Args:
        beta: weight of the KL term.
        use_ref_model: whether calls pass a reference model; if False the KL term is 0, as in Liger.
        compiled, chunk_size: accepted and ignored; `grpo_ext.linear` chooses its chunk size.
        epsilon_low, epsilon_high: clip distances; for ``cispo`` ``epsilon_high`` is the cap of the ratio.
        loss_type, importance_sampling_level, delta, ...: as in `grpo_ext.LossConfig`.
        max_completion_length: divisor of ``dr_grpo``; required for ``dr_grpo``.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: Any = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: Any = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.use_ref_model = use_ref_model
        self.compiled, self.chunk_size = compiled, chunk_size
        self.config = config_of(
            loss_type=loss_type,
            importance_sampling_level=importance_sampling_level,
            epsilon=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            beta=beta,
            use_bias_correction_kl=use_bias_correction_kl,
            temperature=temperature,
            max_completion_length=max_completion_length,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Number | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss and its metrics.

        Args:
            _input: hidden states ``(B,T,H)``. lin_weight: ``(V,H)``, bias ``(V,)``; both are cast to the dtype of
                the hidden states.
            selected_token_ids, attention_mask: ``(B,T)``. advantages: ``(B,)``.
            ref_per_token_logps, old_per_token_logps: ``(B,T)`` or None.
            ref_input, ref_weight, ref_bias: hidden states and head of the reference model; ignored, with a warning, if
                ``ref_per_token_logps`` are given.
            vllm_is_ratio: ``(B,)``, ``(B,1)`` or ``(B,T)``.

        Returns:
            ``(loss, (kl mean, clip ratio))``, without the kl mean if beta is 0. Means are over unmasked tokens.
        """
        config = self.config
        mask, right = checked_mask("attention_mask", attention_mask)
        if _input.dim() != 3:
            raise ValueError(f"_input must be (B, T, H), got {tuple(_input.shape)}")
        ref = self._reference_logps(
            _input, selected_token_ids, mask, ref_per_token_logps, ref_input, ref_weight, ref_bias
        )
        without_kl = config.beta != 0 and ref is None
        weight, bias = _cast_like(_input, lin_weight), _cast_like(_input, bias)
        assert weight is not None
        out = linear_grpo_loss(
            _input,
            weight,
            selected_token_ids,
            poisoned(right, advantages),
            mask,
            dataclasses.replace(config, beta=0.0) if without_kl else config,
            bias=bias,
            old_logps=old_per_token_logps,
            ref_logps=ref,
            importance_weights=per_token("vllm_is_ratio", vllm_is_ratio, mask.shape),
            num_items_in_batch=divisor(num_items_in_batch),
        )
        metrics = []
        if config.beta != 0:
            metrics.append(out.loss.detach().new_zeros(()) if out.kl is None else token_mean(out.kl, mask))
        flags = clipped(out.logps, old_per_token_logps, advantages, mask, config)
        return out.loss, (*metrics, token_mean(flags, mask))

    def _reference_logps(
        self,
        hidden: Tensor,
        ids: Tensor,
        mask: Tensor,
        given: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Tensor | None:
        if not self.use_ref_model or self.config.beta == 0:
            return None
        if given is not None:
            if ref_input is not None:
                warnings.warn(
                    "Using ref_per_token_logps and ignoring ref_input: pass one of them", UserWarning, stacklevel=5
                )
            return given
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"beta={self.config.beta} with use_ref_model=True needs ref_per_token_logps, or ref_input and "
                "ref_weight: pass one of them, or use_ref_model=False"
            )
        with torch.no_grad():
            weight, bias = _cast_like(ref_input, ref_weight), _cast_like(ref_input, ref_bias)
            assert weight is not None
            logps = linear_selective_log_softmax(
                ref_input, weight, ids, bias=bias, mask=mask, temperature=self.config.temperature
            )
        assert isinstance(logps, Tensor)
        return logps


def _cast_like(hidden: Tensor, tensor: Tensor | None) -> Tensor | None:
    """Cast a tensor to the dtype of the hidden states, unless autocast is on and decides the dtype."""
    if tensor is None or torch.is_autocast_enabled(hidden.device.type):
        return tensor
    return tensor.to(hidden.dtype)
