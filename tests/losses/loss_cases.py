# ruff: noqa: E731  (a layout is a lambda)
"""Cases for comparing the compiled losses with the reference: a pairwise grid, and a function that runs a case."""

from __future__ import annotations

import dataclasses
import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_ext import reference
from grpo_ext.config import IMPORTANCE_MODES, LEVELS, LOSS_TYPES, LossConfig
from grpo_ext.output import GRPOLossOutput

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: What a case may vary. The grid holds every pair of values of every two factors at least once.
FACTORS: dict[str, Sequence[Any]] = {
    "loss_type": LOSS_TYPES,
    "level": LEVELS,
    "dtype": tuple(DTYPES),
    "old": ("absent", "near", "far"),  # far: most ratios are outside the clip range
    "kl": ("off", "on", "corrected"),
    "delta": (None, 1.5),
    "entropy_coef": (0.0, 0.02),
    "quantile": (1.0, 0.63, "given"),
    "off_policy": (None, 0.02),
    "isw": ("none", "unused", "(B,)", "(B,1)", "(B,T)", *IMPORTANCE_MODES),
    "advantages": ("(B,)", "(B,1)", "(B,T)"),
    "mask": (torch.bool, torch.int64, torch.float32),
    "transform": ("none", "temperature", "softcap", "all"),
    "layout": ("contiguous", "slice", "misaligned", "rows_apart", "flat"),
    "inplace": (False, True),
    "grad_scale": (1.0, 0.25),
    "upstream": (1.0, -3.0),
    "num_items": (None, 40, "tensor"),
    "vocab": (7, 33, 1000),
}

TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 4.0},
    "all": {"temperature": 1.3, "logit_softcap": 6.0, "logit_scale": 1.7},
}


def pairwise(factors: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A small set of cases in which every pair of values of every two factors occurs (greedy)."""
    names = list(factors)
    rng = random.Random(seed)
    open_pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    cases = []
    while open_pairs:
        best: list[int] = []
        best_new: set[tuple[int, int, int, int]] = set()
        for _ in range(25):
            a, x, b, y = rng.choice(sorted(open_pairs))
            row = [rng.randrange(len(factors[n])) for n in names]
            row[a], row[b] = x, y
            new = open_pairs.intersection(
                (i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(names)), 2)
            )
            if len(new) > len(best_new):
                best, best_new = row, new
        open_pairs -= best_new
        cases.append({n: factors[n][i] for n, i in zip(names, best, strict=True)})
    return cases


def case_id(case: dict[str, Any]) -> str:
    return "-".join(str(case[k]) for k in ("loss_type", "level", "dtype", "isw", "layout", "vocab")).replace(" ", "")


@dataclasses.dataclass
class Batch:
    """One call: the leaf that gradients are read from, the way from it to the logits, the other arguments."""

    leaf: Tensor
    view: Callable[[Tensor], Tensor]
    ids: Tensor
    advantages: Tensor
    mask: Tensor
    config: LossConfig
    options: dict[str, Any]
    upstream: float
    inplace: bool


def random_mask(B: int, T: int, generator: torch.Generator) -> Tensor:
    """Right-padded lengths, a hole here and there, and one sequence without any token."""
    length = torch.randint(1, T + 1, (B, 1), generator=generator)
    mask = torch.arange(T).expand(B, T) < length
    mask = mask & (torch.rand(B, T, generator=generator) > 0.1)
    mask[0] = True
    mask[-1] = False
    return mask


def build(case: dict[str, Any], device: torch.device, seed: int, B: int = 5, T: int = 9) -> Batch:
    """The inputs of a case: logits of its dtype and layout, everything else in the working dtype."""
    g = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case["dtype"]]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    V = case["vocab"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    transform = TRANSFORMS[case["transform"]]
    logits = (3 * normal(B, T, V)).to(dtype)
    ids = torch.randint(0, V, (B, T), generator=g)
    new, entropy = reference.selective_log_softmax(logits.double(), ids, return_entropy=True, **transform)
    mask = random_mask(B, T, g)

    spread = {"near": 0.15, "far": 1.0}
    options: dict[str, Any] = {"grad_scale": case["grad_scale"]}
    if case["old"] != "absent":
        options["old_logps"] = new + spread[case["old"]] * normal(B, T)
    if case["kl"] != "off":
        options["ref_logps"] = new + 0.4 * normal(B, T)
    isw = case["isw"]
    if isw == "unused" or isw in IMPORTANCE_MODES:
        options["sampling_logps"] = new + 0.3 * normal(B, T)
    elif isw != "none":
        shape = {"(B,)": (B,), "(B,1)": (B, 1), "(B,T)": (B, T)}[isw]
        options["importance_weights"] = torch.rand(shape, generator=g, dtype=torch.float64) + 0.3
    if case["num_items"] is not None:
        options["num_items_in_batch"] = torch.tensor(37.5) if case["num_items"] == "tensor" else case["num_items"]
    if case["quantile"] == "given":
        # Between two tokens' entropies, so that rounding moves no token across it.
        values = entropy[mask].sort().values
        options["entropy_threshold"] = values[len(values) // 2 - 1 : len(values) // 2 + 1].mean()

    advantages = normal(*{"(B,)": (B,), "(B,1)": (B, 1), "(B,T)": (B, T)}[case["advantages"]])
    advantages[1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a delta inside the clip range
        config = LossConfig(
            loss_type=case["loss_type"],
            importance_sampling_level=case["level"],
            epsilon_high=1.1 if case["loss_type"] == "cispo" else 0.28,
            delta=case["delta"],
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
    advantages, mask, ids = advantages.to(device, real), mask.to(device, case["mask"]), ids.to(device)
    if case["layout"] == "flat":  # one sequence of B * T tokens
        logits, ids, mask = logits.flatten(0, 1), ids.flatten(), mask.flatten()
        advantages = advantages.reshape(B, -1).expand(B, T).flatten()
        for name in ("old_logps", "ref_logps", "sampling_logps"):
            if name in options:
                options[name] = options[name].flatten()
        if "importance_weights" in options:
            weights = options["importance_weights"]
            options["importance_weights"] = weights.reshape(B, -1).expand(B, T).flatten()
    leaf, view = laid_out(logits.to(device), case["layout"])
    return Batch(leaf, view, ids, advantages, mask, config, options, case["upstream"], case["inplace"])


def laid_out(logits: Tensor, layout: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A storage holding the logits, and how to see them in it; the rest of it is NaN."""
    if layout in ("contiguous", "flat"):
        return logits, lambda full: full.view_as(full)
    B, T, V = logits.shape
    if layout == "slice":
        full = logits.new_full((B, T + 1, V), float("nan"))
        view = lambda full: full[:, :-1]
    elif layout == "rows_apart":
        full = logits.new_full((B, T, V + 3), float("nan"))
        view = lambda full: full[..., 1 : V + 1]
    else:  # one element past the allocation's alignment
        full = logits.new_full((B * T * V + 1,), float("nan"))
        view = lambda full: full[1:].view(B, T, V)
    view(full).copy_(logits)
    return full, view


@dataclasses.dataclass
class Result:
    out: GRPOLossOutput
    grad: Tensor  # of the leaf


def run(function: Callable[..., GRPOLossOutput], batch: Batch, dtype: torch.dtype | None = None) -> Result:
    """Loss and gradient. ``dtype`` lifts the logits and every number beside them (fp64 for the truth)."""
    lift = (lambda t: t.to(dtype)) if dtype is not None else (lambda t: t)
    leaf = lift(batch.leaf).clone().requires_grad_()
    options = {k: lift(v) if isinstance(v, Tensor) else v for k, v in batch.options.items()}
    produced = leaf.clone()  # the operation that the logits come out of; an in-place loss needs one
    out = function(
        batch.view(produced),
        batch.ids,
        lift(batch.advantages),
        batch.mask,
        batch.config,
        inplace=batch.inplace,
        **options,
    )
    (out.loss * batch.upstream).backward()
    assert leaf.grad is not None
    return Result(out, leaf.grad)
