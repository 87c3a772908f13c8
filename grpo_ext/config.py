"""`LossConfig`: the loss type and constants of a loss call; frozen, and validated on construction."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
Level = Literal["token", "sequence"]
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

LOSS_TYPES: tuple[str, ...] = get_args(LossType)
LEVELS: tuple[str, ...] = get_args(Level)
IMPORTANCE_MODES: tuple[str, ...] = get_args(ImportanceMode)

#: Range of the positive normal numbers of float32, whose reciprocals are finite.
FLOAT32_SMALLEST, FLOAT32_LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127

#: Loss types that clip the ratio to [1 - epsilon, 1 + epsilon_high].
CLIPPED_LOSS_TYPES = frozenset({"grpo", "bnpo", "dr_grpo", "dapo", "luspo"})


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Constants of one GRPO-family loss; every field is a plain Python value.

    Attributes:
        loss_type: objective and reduction: ``grpo``, ``bnpo``, ``dr_grpo``, ``dapo``, ``luspo``, ``cispo``, ``sapo``
            or ``vespo`` (docs/losses.md; papers: docs/papers.md).
        importance_sampling_level: ``token``, or ``sequence`` for one ratio per completion (GSPO).
        epsilon: lower clip distance of the ratio; also the upper clip distance if ``epsilon_high`` is None.
        epsilon_high: upper clip distance; for ``cispo`` the absolute cap of the ratio (e.g. 5.0).
        delta: upper bound of the unclipped ratio (two-sided clipping); None = no bound.
        beta: weight of the KL term against ``ref_logps``; 0 needs no reference model.
        use_bias_correction_kl: multiply the KL term by the (differentiable) ratio.
        entropy_coef: entropy bonus; the loss of a token is reduced by ``entropy_coef * entropy``.
        temperature: processed logits are ``softcap(logit_scale * z) / temperature``.
        logit_softcap: ``c`` of ``softcap(u) = c * tanh(u / c)``; None = no cap.
        logit_scale: factor on the raw logits.
        max_completion_length: the constant divisor of ``dr_grpo``, in tokens.
        top_entropy_quantile: share of the tokens, those with the highest entropy, that keep their policy term.
        off_policy_mask_threshold: drop the policy term of a sequence with a negative advantage if the mean of
            ``behaviour - new`` exceeds this; None = keep all.
        sapo_temperature_pos: slope of the sigmoid gate for A > 0.
        sapo_temperature_neg: slope of the sigmoid gate for A <= 0.
        vespo_k_pos: power of the gamma weight for A >= 0.
        vespo_lambda_pos: decay of the gamma weight for A >= 0.
        vespo_k_neg: power of the gamma weight for A < 0.
        vespo_lambda_neg: decay of the gamma weight for A < 0.
        vllm_importance_sampling_correction: compute importance weights from ``sampling_logps`` if they are given.
        vllm_importance_sampling_mode: one of ``token_truncate``, ``token_mask``, ``sequence_truncate`` and
            ``sequence_mask``.
        vllm_importance_sampling_cap: upper bound of the weight.
        vllm_importance_sampling_clip_max: another name of the cap; overrides it if set.
        vllm_importance_sampling_clip_min: lower bound of the weight; None = 0.

    NumPy numbers and 0-d tensors are converted to plain Python numbers. Text is never parsed as a number or a bool.

    Raises:
        ValueError: names the field, its value and the allowed values. Numbers must be finite in float32.

    Warns:
        UserWarning: for a ``delta`` inside the clip range, or a ``cispo`` cap below 1: valid, but rarely intended.
    """

    loss_type: LossType = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0
    temperature: float = 1.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    max_completion_length: int | None = None
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: ImportanceMode = "token_truncate"
    vllm_importance_sampling_cap: float = 2.0
    vllm_importance_sampling_clip_max: float | None = None
    vllm_importance_sampling_clip_min: float | None = None

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, LOSS_TYPES)
        _one_of("importance_sampling_level", self.importance_sampling_level, LEVELS)
        _one_of("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, IMPORTANCE_MODES)
        for name, hint in _HINTS:
            given = getattr(self, name)
            value = plain_value(name, given, hint)
            if value is not given:
                object.__setattr__(self, name, value)  # the dataclass is frozen
        check_logit_transform(self.temperature, self.logit_softcap, self.logit_scale)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            _positive(name, getattr(self, name))
        for name in ("epsilon", "beta"):
            _non_negative(name, getattr(self, name))
        for name in ("entropy_coef", "top_entropy_quantile"):
            _finite(name, getattr(self, name))
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            _finite(name, getattr(self, name))
        if self.delta is not None:
            _positive("delta", self.delta)
        for name in ("epsilon_high", "vllm_importance_sampling_clip_min"):
            if getattr(self, name) is not None:
                _non_negative(name, getattr(self, name))
        if self.off_policy_mask_threshold is not None:
            _finite("off_policy_mask_threshold", self.off_policy_mask_threshold)
        if not 0.0 < self.top_entropy_quantile <= 1.0:
            raise ValueError(f"top_entropy_quantile must be in (0, 1], got {self.top_entropy_quantile}")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(
                "loss_type='dr_grpo' divides by B * max_completion_length: pass max_completion_length=<tokens>"
            )
        _positive("vllm_importance_sampling_cap", self.importance_cap)
        if self.importance_min > self.importance_cap:
            raise ValueError(
                f"vllm_importance_sampling_clip_min ({self.importance_min}) exceeds the cap ({self.importance_cap})"
            )
        if self.loss_type == "cispo" and self.clip_high < 1:
            warnings.warn(
                f"loss_type='cispo' caps the ratio at epsilon_high = {self.clip_high:g}, below 1: every weight is cut, "
                "also on-policy; epsilon_high is the absolute cap for cispo, e.g. 5.0",
                stacklevel=3,
            )
        if self.delta is not None and self.loss_type in CLIPPED_LOSS_TYPES and self.delta <= 1 + self.clip_high:
            warnings.warn(
                f"delta={self.delta} is not above 1 + epsilon_high = {1 + self.clip_high:g}: "
                "two-sided clipping would cut ratios that the ordinary clip allows",
                stacklevel=3,
            )

    @property
    def clip_high(self) -> float:
        """``epsilon_high``, or ``epsilon`` if ``epsilon_high`` is None."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def importance_cap(self) -> float:
        """Upper bound of an importance weight: ``clip_max`` if it is set, else ``cap``."""
        clip_max = self.vllm_importance_sampling_clip_max
        return self.vllm_importance_sampling_cap if clip_max is None else clip_max

    @property
    def importance_min(self) -> float:
        """Lower bound of an importance weight."""
        return self.vllm_importance_sampling_clip_min or 0.0

    def replace(self, **changes: object) -> LossConfig:
        """Return a validated copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_logit_transform(temperature: float, logit_softcap: float | None, logit_scale: float) -> None:
    """Raise a ValueError if ``softcap(logit_scale * z) / temperature`` would not be finite in float32."""
    _positive("temperature", temperature)
    _finite("logit_scale", logit_scale)
    if logit_scale == 0:
        raise ValueError("logit_scale must not be 0: every token would be equally likely")
    slope = abs(logit_scale)
    if logit_softcap is not None:
        _positive("logit_softcap", logit_softcap)
        _positive("logit_scale / logit_softcap", slope / logit_softcap)
        slope = logit_softcap
    _positive(f"{'logit_scale' if logit_softcap is None else 'logit_softcap'} / temperature", slope / temperature)


def plain_value(name: str, value: Any, hint: str) -> Any:
    """Check a field's value against its annotation and return it as a plain Python value.

    Checks ``bool``, ``int`` and ``float``, each with or without ``| None``; ignores other annotations.

    Raises:
        ValueError: for text, a bool instead of a number, a fraction instead of a whole number.
    """
    kind, _, rest = hint.partition(" | ")
    if kind not in _WHAT or rest not in ("", "None") or (rest and value is None):
        return value
    if getattr(value, "shape", None) == ():
        value = value.item()  # a NumPy number or a 0-d tensor
    fits = isinstance(value, bool) if kind == "bool" else isinstance(value, int) and not isinstance(value, bool)
    if fits or (kind == "float" and isinstance(value, float)):
        return value
    what, remedy = _WHAT[kind]
    raise ValueError(f"{name} must be {what}{' or None' if rest else ''}, got {value!r}: {remedy}")


_WHAT = {
    "bool": ("True or False", "pass a bool: any text and any nonzero number would count as true"),
    "int": ("a whole number", "pass an int"),
    "float": ("a number", "pass a float or an int"),
}


def _is_finite(value: float) -> bool:
    return -FLOAT32_LARGEST <= value <= FLOAT32_LARGEST


def _finite(name: str, value: float) -> None:
    plain_value(name, value, "float")
    if not _is_finite(value):
        raise ValueError(f"{name} must be finite, got {value}{_RANGE}")


def _positive(name: str, value: float) -> None:
    plain_value(name, value, "float")
    if not FLOAT32_SMALLEST <= value <= FLOAT32_LARGEST:
        raise ValueError(f"{name} must be positive and finite, got {value}{_RANGE}")


def _non_negative(name: str, value: float) -> None:
    plain_value(name, value, "float")
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}{_RANGE}")


_RANGE = " (float32 holds 1.2e-38 to 3.4e38)"
_HINTS = tuple((field.name, str(field.type)) for field in dataclasses.fields(LossConfig))
