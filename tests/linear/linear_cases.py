"""Cases for comparing the fused linear losses with the reference: a pairwise grid and one way to run each."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from loss_cases import DTYPES, TRANSFORMS, random_mask
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.config import IMPORTANCE_MODES, LEVELS, LOSS_TYPES, LossConfig
from grpo_ext.linear.plan import row_stride
from grpo_ext.output import GRPOLossOutput

#: What a case may vary. `trained` names the parts of the head that want a gradient; `budget` is in rows of logits:
#: 16 rows make several chunks of the 45 tokens, 5 are less than a completion of 9, None is the default.
FACTORS: dict[str, Sequence[Any]] = {
    "loss_type": LOSS_TYPES,
    "level": LEVELS,
    "dtype": tuple(DTYPES),
    "trained": ("", "weight", "weight+bias", "bias"),
    "bias": (False, True),
    "old": ("absent", "near", "far"),  # far: most ratios are outside the clip range
    "kl": ("off", "on", "corrected"),
    "entropy_coef": (0.0, 0.02),
    "quantile": (1.0, 0.63, "given"),
    "off_policy": (None, 0.02),
    "isw": ("none", "unused", "(B,)", "(B,T)", *IMPORTANCE_MODES),
    "advantages": ("(B,)", "(B,T)"),
    "transform": tuple(TRANSFORMS),
    "flat": (False, True),
    "grad_scale": (1.0, 0.25),
    "upstream": (1.0, -3.0),
    "num_items": (None, "tensor"),
    "vocab": (7, 33, 257),
    "budget": (None, 16, 5),
    "logits_dtype": (None, "float32"),
    "bound": (False, True),  # valid_rows given
}


@dataclasses.dataclass
class Batch:
    """One call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    trained: tuple[str, ...]
    ids: Tensor
    advantages: Tensor
    mask: Tensor
    config: LossConfig
    options: dict[str, Any]
    ours_only: dict[str, Any]  # what the reference has no word for
    upstream: float


def budget_of(rows: int | None, vocab: int, hidden_size: int, dtype: torch.dtype) -> int | None:
    """Bytes for so many rows of logits and hidden states."""
    if rows is None:
        return None
    return rows * (row_stride(vocab) + row_stride(hidden_size)) * dtype.itemsize


def build(case: dict[str, Any], device: torch.device, seed: int, B: int = 5, T: int = 9, H: int = 12) -> Batch:
    g = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case["dtype"]]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    V = case["vocab"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    transform = TRANSFORMS[case["transform"]]
    hidden, weight = normal(B, T, H).to(dtype), (0.8 * normal(V, H)).to(dtype)
    with_bias = case["bias"] or "bias" in case["trained"]
    bias = normal(V).to(dtype) if with_bias else None
    ids = torch.randint(0, V, (B, T), generator=g)
    new, entropy = reference.linear_selective_log_softmax(
        hidden.double(),
        weight.double(),
        ids,
        bias=None if bias is None else bias.double(),
        return_entropy=True,
        **transform,
    )
    mask = random_mask(B, T, g)
    hidden[~mask] = torch.nan
    ids[~mask] = -100

    options: dict[str, Any] = {"grad_scale": case["grad_scale"]}
    if case["old"] != "absent":
        options["old_logps"] = new + {"near": 0.15, "far": 1.0}[case["old"]] * normal(B, T)
    if case["kl"] != "off":
        options["ref_logps"] = new + 0.4 * normal(B, T)
    isw = case["isw"]
    if isw == "unused" or isw in IMPORTANCE_MODES:
        options["sampling_logps"] = new + 0.3 * normal(B, T)
    elif isw != "none":
        shape = {"(B,)": (B,), "(B,T)": (B, T)}[isw]
        options["importance_weights"] = torch.rand(shape, generator=g, dtype=torch.float64) + 0.3
    if case["num_items"] is not None:
        options["num_items_in_batch"] = torch.tensor(37.5)
    if case["quantile"] == "given":
        # Between two tokens' entropies, so that rounding moves no token across it; far from the quantile of this batch,
        # which is its median.
        values = entropy[mask].sort().values
        options["entropy_threshold"] = values[len(values) // 4 - 1 : len(values) // 4 + 1].mean()

    advantages = normal(*{"(B,)": (B,), "(B,T)": (B, T)}[case["advantages"]])
    advantages[1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a delta inside the clip range
        config = LossConfig(
            loss_type=case["loss_type"],
            importance_sampling_level=case["level"],
            epsilon_high=1.1 if case["loss_type"] == "cispo" else 0.28,
            beta=0.0 if case["kl"] == "off" else 0.07,
            use_bias_correction_kl=case["kl"] == "corrected",
            entropy_coef=case["entropy_coef"],
            top_entropy_quantile=case["quantile"] if case["quantile"] != "given" else 0.5,
            off_policy_mask_threshold=case["off_policy"],
            max_completion_length=T + 3,
            vllm_importance_sampling_correction=isw in IMPORTANCE_MODES,
            vllm_importance_sampling_mode=isw if isw in IMPORTANCE_MODES else "token_truncate",
            vllm_importance_sampling_cap=1.2,
            vllm_importance_sampling_clip_min=0.7,
            **transform,
        )

    options = {k: v.to(device, real) if isinstance(v, Tensor) else v for k, v in options.items()}
    ours_only: dict[str, Any] = {
        "memory_budget": budget_of(case["budget"], V, H, dtype),
        "logits_dtype": case["logits_dtype"],
        "valid_rows": int(mask.sum()) + 2 if case["bound"] else None,
    }
    hidden, weight, advantages = hidden.to(device), weight.to(device), advantages.to(device, real)
    bias = None if bias is None else bias.to(device)
    mask, ids = mask.to(device), ids.to(device)
    if case["flat"]:  # one sequence of B * T tokens
        hidden, ids, mask = hidden.flatten(0, 1), ids.flatten(), mask.flatten()
        advantages = advantages.reshape(B, -1).expand(B, T).flatten()
        for name in ("old_logps", "ref_logps", "sampling_logps"):
            if name in options:
                options[name] = options[name].flatten()
        if "importance_weights" in options:
            options["importance_weights"] = options["importance_weights"].reshape(B, -1).expand(B, T).flatten()
    trained = tuple(part for part in case["trained"].split("+") if part)
    return Batch(hidden, weight, bias, trained, ids, advantages, mask, config, options, ours_only, case["upstream"])


@dataclasses.dataclass
class Result:
    out: GRPOLossOutput
    grads: dict[str, Tensor]


def leaves_of(batch: Batch, lift: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """hidden, weight, bias; those that want a gradient require one."""
    leaves = {"hidden": lift(batch.hidden).clone().requires_grad_(), "weight": lift(batch.weight).clone()}
    if batch.bias is not None:
        leaves["bias"] = lift(batch.bias).clone()
    for name in batch.trained:
        leaves[name].requires_grad_()
    return leaves


def run(function: Callable[..., GRPOLossOutput], batch: Batch, dtype: torch.dtype | None = None, **more: Any) -> Result:
    """Loss and gradients. ``dtype`` lifts every number (fp64 for the truth)."""
    lift = (lambda t: t.to(dtype)) if dtype is not None else (lambda t: t)
    leaves = leaves_of(batch, lift)
    options = {k: lift(v) if isinstance(v, Tensor) else v for k, v in batch.options.items()}
    out = function(
        leaves["hidden"],
        leaves["weight"],
        batch.ids,
        lift(batch.advantages),
        batch.mask,
        batch.config,
        bias=leaves.get("bias"),
        **options,
        **more,
    )
    (out.loss * batch.upstream).backward()
    return Result(out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


# A small fixed head for what is not about values.

V, H = 1001, 48


def head(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (0.3 * torch.randn(V, H)).to(device, dtype), torch.randn(V).to(device, dtype)


def batch(device: torch.device, B: int = 4, T: int = 50, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "hidden": torch.randn(B, T, H).to(device, dtype),
        "ids": torch.randint(0, V, (B, T), device=device),
        "advantages": torch.randn(B).to(device),
        "mask": torch.rand(B, T, device=device) > 0.2,
    }


def loss_of(
    data: dict[str, Any], weight: Tensor, config: LossConfig | None = None, **options: Any
) -> grpo_ext.GRPOLossOutput:
    return grpo_ext.linear_grpo_loss(
        data["hidden"], weight, data["ids"], data["advantages"], data["mask"], config or LossConfig(), **options
    )
