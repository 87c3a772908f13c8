"""Draw, build and compare cases of the fuzz tests: a case is a small dictionary whose seed determines the tensors."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_ext import reference
from grpo_ext.config import CLIPPED_LOSS_TYPES, IMPORTANCE_MODES, LEVELS, LOSS_TYPES, LossConfig
from grpo_ext.output import METRIC_NAMES, GRPOLossOutput

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Factor on the number of cases. Set (`make fuzz`): new seeds every time. Not set: the same cases every time.
FACTOR = int(os.environ.get("GRPO_EXT_FUZZ", "0"))


def cases(number: int, **more: Any) -> settings:
    """Settings of a property that is tried `number` times in `make test`."""
    return settings(
        max_examples=number * max(FACTOR, 1),
        derandomize=FACTOR == 0,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **more,
    )


def _numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=32)


TRANSFORM = st.fixed_dictionaries(
    {},
    optional={
        "temperature": _numbers(0.25, 4.0),
        "logit_softcap": _numbers(1.0, 50.0),
        "logit_scale": st.one_of(_numbers(0.125, 3.0), _numbers(-2.0, -0.125)),
    },
)

#: Everything of a loss but the tensors' shapes.
POLICY = {
    "seed": st.integers(0, 2**31),
    "loss_type": st.sampled_from(LOSS_TYPES),
    "level": st.sampled_from(LEVELS),
    "epsilon": _numbers(0.0, 0.5),
    "epsilon_high": st.none() | _numbers(0.0, 2.0),
    "delta": st.none() | _numbers(1.0, 3.0),
    "beta": st.just(0.0) | _numbers(0.0009765625, 0.5),
    "corrected": st.booleans(),
    "entropy_coef": st.just(0.0) | _numbers(-0.125, 0.125),
    "quantile": st.just(1.0) | _numbers(0.0625, 0.9375),
    "threshold_given": st.booleans(),
    "off_policy": st.none() | _numbers(-0.25, 0.5),
    "sapo": st.tuples(_numbers(0.25, 3.0), _numbers(0.25, 3.0)),
    "vespo": st.tuples(*[_numbers(0.5, 3.0)] * 4),
    "old": st.sampled_from((None, 0.02, 0.3, 1.5)),
    "weights": st.sampled_from(("none", "none", "(B,)", "(B,1)", "(B,T)", *IMPORTANCE_MODES)),
    "cap": _numbers(0.75, 4.0),
    "floor": st.none() | _numbers(0.0, 0.75),
    "advantages": st.sampled_from(("(B,)", "(B,1)", "(B,T)")),
    "mask": st.sampled_from((torch.bool, torch.int64, torch.uint8, torch.float32)),
    "mask_share": st.sampled_from((0.0, 0.3, 0.8, 1.0, 1.0)),
    "num_items": st.none() | st.integers(0, 100) | st.just("tensor"),
    "grad_scale": st.just(1.0) | _numbers(0.0625, 4.0),
    "upstream": st.just(1.0) | _numbers(-4.0, -0.125),
    "companions": st.sampled_from(("dense", "every second", "expanded")),
    "transform": TRANSFORM,
}
SHAPE = {"B": st.integers(1, 5), "T": st.integers(1, 8)}
LOGITS = {
    "dtype": st.sampled_from(tuple(DTYPES)),
    "V": st.integers(1, 40) | st.integers(60, 200),
    "spread": st.sampled_from((0.0, 1.0, 4.0)),
    "removed": st.sampled_from((0.0, 0.0, 0.3)),  # share of logits that are -inf
    "layout": st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)),
    "swapped": st.booleans(),
    "flat": st.booleans(),
    "inplace": st.booleans(),
}
LOSS_CASE = st.fixed_dictionaries(POLICY | SHAPE | LOGITS)
PLAIN = {"dtype": st.sampled_from(("fp64", "fp32")), "flat": st.booleans()}
POLICY_CASE = st.fixed_dictionaries(POLICY | SHAPE | PLAIN)


class Random:
    """Draws from one seed, in fp64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def loss_config(case: dict[str, Any]) -> LossConfig:
    mode = case["weights"] if case["weights"] in IMPORTANCE_MODES else "token_truncate"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd caps are part of the hunt
        return LossConfig(
            loss_type=case["loss_type"],
            importance_sampling_level=case["level"],
            epsilon=case["epsilon"],
            epsilon_high=case["epsilon_high"],
            delta=case["delta"],
            beta=case["beta"],
            use_bias_correction_kl=case["corrected"],
            entropy_coef=case["entropy_coef"],
            top_entropy_quantile=case["quantile"],
            off_policy_mask_threshold=case["off_policy"],
            sapo_temperature_pos=case["sapo"][0],
            sapo_temperature_neg=case["sapo"][1],
            vespo_k_pos=case["vespo"][0],
            vespo_lambda_pos=case["vespo"][1],
            vespo_k_neg=case["vespo"][2],
            vespo_lambda_neg=case["vespo"][3],
            max_completion_length=case["T"] + 3,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_cap=case["cap"],
            vllm_importance_sampling_clip_min=case["floor"],
            **case["transform"],
        )


def loss_inputs(case: dict[str, Any], draw: Random, new: Tensor, entropy: Tensor) -> dict[str, Any]:
    """The arguments around the log probabilities `new` ``(B,T)`` and their entropies, in fp64."""
    B, T = new.shape
    shapes = {"(B,)": (B,), "(B,1)": (B, 1), "(B,T)": (B, T)}
    mask = draw.uniform(B, T) < case["mask_share"]
    values: dict[str, Any] = {"mask": mask, "advantages": draw.normal(*shapes[case["advantages"]])}
    values["advantages"][draw.uniform(*values["advantages"].shape) < 0.1] = 0.0
    if case["old"] is not None:
        values["old_logps"] = new + case["old"] * draw.normal(B, T)
    if case["beta"] != 0:
        values["ref_logps"] = new + 0.4 * draw.normal(B, T)
    if case["weights"] in IMPORTANCE_MODES:
        values["sampling_logps"] = new + 0.3 * draw.normal(B, T)
    elif case["weights"] != "none":
        values["importance_weights"] = draw.uniform(*shapes[case["weights"]]) + 0.3
    if case["num_items"] is not None:
        values["num_items_in_batch"] = case["num_items"]
        if case["num_items"] == "tensor":
            values["num_items_in_batch"] = torch.tensor(7.5, dtype=torch.float64)
    if case["threshold_given"] and case["quantile"] < 1:
        values["entropy_threshold"] = entropy.mean() + 0.01
    return values


def flattened(values: dict[str, Any], B: int, T: int) -> dict[str, Any]:
    """The same as one sequence of ``B * T`` tokens."""
    per_token = lambda x: x.reshape(B, -1).expand(B, T).flatten()  # noqa: E731
    return {k: per_token(v) if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()}


def in_dtype(values: dict[str, Any], case: dict[str, Any], real: torch.dtype) -> dict[str, Any]:
    """What a caller would pass: numbers in the statistics' dtype, the mask in the case's, in the case's strides."""
    cast = {k: v.to(real) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
    strided = {k: _strided(v, case["companions"]) if isinstance(v, Tensor) and v.dim() else v for k, v in cast.items()}
    mask = values["mask"].to(case["mask"])
    return strided | {"mask": _strided(mask, "every second" if case["companions"] == "every second" else "dense")}


def _strided(tensor: Tensor, how: str) -> Tensor:
    """The same values a step of two apart, or (all of them the first) without memory of their own."""
    if how == "every second":
        return torch.stack([tensor, torch.full_like(tensor, 77)], dim=-1)[..., 0]
    if how == "expanded" and tensor.dim() == 1 and tensor.is_floating_point():
        return tensor[:1].expand(tensor.shape)
    return tensor


def logits_of(case: dict[str, Any], draw: Random) -> tuple[Tensor, Tensor]:
    """Logits ``(B,T,V)`` of the case's dtype and ids. The token itself and the first logit are never removed."""
    B, T, V = case["B"], case["T"], case["V"]
    logits = (case["spread"] * draw.normal(B, T, V)).to(DTYPES[case["dtype"]])
    ids = draw.integers(V, B, T)
    softcap = "logit_softcap" in case["transform"]
    if case["removed"] and not softcap and case["transform"].get("logit_scale", 1.0) > 0:
        gone = draw.uniform(B, T, V) < case["removed"]
        gone[..., 0] = False
        gone.scatter_(-1, ids.unsqueeze(-1), False)
        logits = logits.masked_fill(gone, -torch.inf)
    return logits, ids


def laid_out(logits: Tensor, case: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A storage of NaN that holds the logits somewhere, and how to see them in it."""
    before, after, row_gap = case["layout"]
    shape = list(logits.shape)
    swap = case["swapped"] and logits.dim() == 3
    if swap:
        shape[0], shape[1] = shape[1], shape[0]
    shape[-2] += after
    shape[-1] += row_gap
    size = before + torch.Size(shape).numel()

    def view(full: Tensor) -> Tensor:
        seen = full[before:].view(shape)[..., : shape[-2] - after, : shape[-1] - row_gap]
        return seen.transpose(0, 1) if swap else seen

    full = logits.new_full((size,), torch.nan)
    view(full).copy_(logits)
    return full, view


@dataclasses.dataclass
class Result:
    """Loss and gradients by name; `scale` of the loss is the sum of its terms' sizes, for the truth."""

    out: GRPOLossOutput
    grads: dict[str, Tensor]
    scale: float = 0.0


def call(
    function: Callable[..., GRPOLossOutput],
    leaves: dict[str, Tensor],
    before: Callable[[dict[str, Tensor]], tuple[list[Any], dict[str, Any]]],
    values: dict[str, Any],
    config: LossConfig,
    upstream: float,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> Result:
    """Loss and gradients of `leaves`; `dtype` lifts every number. `before` makes the arguments from the leaves."""
    lift = lambda x: x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    leaves = {name: lift(leaf).clone().requires_grad_() for name, leaf in leaves.items()}
    positional, named = before(leaves)
    rest = {k: lift(v) for k, v in values.items() if k not in ("mask", "advantages")}
    out = function(*positional, lift(values["advantages"]), values["mask"], config, **rest, **named, **more)
    (out.loss * upstream).backward()
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    return Result(out, grads)


def truth_of(*args: Any, **kwargs: Any) -> Result:
    """`call` in fp64, with the size of the loss's terms, and of their slopes in the log probability, beside it."""
    reduce_loss, log_ratio = reference.reduce_loss, reference.log_ratio
    seen: list[Tensor] = []
    sizes = []

    def and_log_probability(new: Tensor, old: Tensor | None) -> Tensor:
        seen.append(new)
        return log_ratio(new, old)

    def and_size(l: Tensor, *rest: Any) -> Tensor:  # noqa: E741
        (slope,) = torch.autograd.grad(l.sum(), seen, retain_graph=True)
        config = rest[1]
        # exp(x) - x - 1: the KL term is a difference of numbers around 1; so is the entropy, of logits
        floor = config.beta + abs(config.entropy_coef)
        sizes.append(float(reduce_loss(l.detach().abs() + slope.abs() + floor, *rest)))
        return reduce_loss(l, *rest)

    with (
        mock.patch.object(reference, "reduce_loss", and_size),
        mock.patch.object(reference, "log_ratio", and_log_probability),
    ):
        result = call(*args, dtype=torch.float64, **kwargs)
    result.scale = sizes[0]
    return result


def near_a_decision(config: LossConfig, values: dict[str, Any], out: GRPOLossOutput, entropy: Tensor | None) -> bool:
    """Whether rounding could move a token or a sequence across a limit of the loss, where its gradient jumps."""
    two = lambda x: x.double().reshape(1, -1) if x.dim() == 1 and out.logps.dim() == 1 else x.double()  # noqa: E731
    new, m = two(out.logps), two(values["mask"] != 0) != 0
    count = m.sum(1, keepdim=True).clamp(min=1)
    zero = torch.zeros_like(new)
    old = two(values["old_logps"]) if "old_logps" in values else new
    limits: list[tuple[Tensor, float]] = []
    if config.loss_type in CLIPPED_LOSS_TYPES or config.loss_type == "cispo":
        d = torch.where(m, new - old, zero)
        w = d if config.importance_sampling_level == "token" else d.sum(1, keepdim=True) / count
        r = torch.where(m, w.exp().expand_as(new), torch.nan)
        limits += [(r, 1 - config.epsilon), (r, 1 + config.clip_high), (r, config.clip_high)]
        limits += [(r, config.delta)] if config.delta is not None else []
    if "sampling_logps" in values:
        d = torch.where(m, old - two(values["sampling_logps"]), zero)
        token = config.vllm_importance_sampling_mode.startswith("token")
        weight = (d if token else d.sum(1, keepdim=True)).exp()
        limits += [(weight, config.importance_cap), (weight, config.importance_min)]
    if config.off_policy_mask_threshold is not None:
        behaviour = two(values["sampling_logps"]) if "sampling_logps" in values else old
        mean = torch.where(m, behaviour - new, zero).sum(1, keepdim=True) / count
        limits.append((mean, config.off_policy_mask_threshold))
    if config.top_entropy_quantile < 1 and entropy is not None:
        H = two(entropy)[m]
        at = values.get("entropy_threshold")
        if at is None and H.numel():
            at = torch.quantile(H, 1 - config.top_entropy_quantile)
        limits += [(H, float(at))] if H.numel() else []
    return any(bool(((x - at).abs() < 1e-4 * (1 + abs(at))).any()) for x, at in limits if x.numel())


def as_exact_as_torch(
    name: str, ours: Tensor, same: Tensor, truth: Tensor, scale: float, unit: float, rounding: float
) -> None:
    """At most twice torch's error in the same dtype, plus `unit` and the last `rounding` relative to `scale`.

    The floor is for what torch happens to hit exactly: the cases are small.
    """
    assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)}, should be {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert not ours.isnan().any(), f"{name} has NaN"
    error = (ours.double() - truth).abs().max().item()
    torch_error = (same.double() - truth).abs().max().item()
    allowed = 2 * torch_error + (unit + rounding) * scale + 1e-30
    assert error <= allowed, f"{name}: off by {error:.3g}, torch by {torch_error:.3g}, allowed {allowed:.3g}"


def compare(
    ours: Result,
    same: Result,
    truth: Result,
    config: LossConfig,
    real: torch.dtype,
    dtype: torch.dtype,
    reach: float,
) -> None:
    """Loss, per-token outputs, metrics and gradients. `reach`: of a log probability, `loss_call` has it."""
    eps = torch.finfo(real).eps
    # The weight of vespo is an exponential of an exponential: where it is small, it is steep.
    steep = 32 if config.loss_type == "vespo" else 4
    unit = 16 * eps * (1 + reach)  # a log probability is a difference of numbers of that size
    rounding = torch.finfo(dtype).eps if dtype != real else 0.0
    as_exact_as_torch("loss", ours.out.loss, same.out.loss, truth.out.loss, truth.scale, steep * unit, 0.0)
    for name in ("logps", "entropy", "kl"):
        a, b, exact = (getattr(result.out, name) for result in (ours, same, truth))
        if exact is None:
            assert a is None, name
            continue
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        as_exact_as_torch(name, a, b, exact, scale, unit, 0.0)
    biggest = max(grad.abs().max().item() for grad in truth.grads.values())
    for name, exact in truth.grads.items():
        floor = torch.finfo(dtype).smallest_normal
        scale = max(biggest, floor, 0.01 * truth.scale)
        as_exact_as_torch(
            f"gradient of {name}", ours.grads[name], same.grads[name], exact, scale, steep * unit, rounding
        )
    assert tuple(ours.out.metrics) == METRIC_NAMES
    for name, value in ours.out.metrics.items():
        a, b, exact = (float(x) for x in (value, same.out.metrics[name], truth.out.metrics[name]))
        allowed = 2 * abs(b - exact) + 64 * unit * max(1.0, abs(exact))
        assert abs(a - exact) <= allowed, f"metric {name}: {a}, should be {exact}"
