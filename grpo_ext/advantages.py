"""Advantages from rewards, and importance weights for the generation engine: small tensors, plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_ext._checks import check_real, checked_mask, poisoned

from .config import IMPORTANCE_MODES, plain_value

#: Added to the standard deviation before an advantage is divided by it.
STD_EPSILON = 1e-4

#: Largest weighted sum: its square still fits in fp64.
LARGEST_REWARD = 1e150

_SCALES: dict[object, str] = {
    True: "group",
    False: "none",
    "group": "group",
    "batch": "batch",
    "none": "none",
}

Rewards = Tensor | Sequence[float | None] | Sequence[Sequence[float | None]]


def group_advantages(
    rewards: Rewards,
    num_generations: int,
    *,
    reward_weights: Sequence[float] | Tensor | None = None,
    scale_rewards: str | bool = "group",
) -> Tensor:
    """Advantage of each completion relative to the other completions of its prompt.

    ``A = (reward - mean of the group) / (std + 1e-4)``; ``scale_rewards`` chooses the ``std``.

    Args:
        rewards: ``(n,)`` or ``(n, functions)``, a tensor or nested lists; rows ``g * num_generations`` to
            ``(g + 1) * num_generations - 1`` answer the same prompt. None or NaN: that reward function does
            not apply to that row.
        num_generations: completions per prompt, at least 2.
        reward_weights: one factor per function, None = 1.0 each.
        scale_rewards: ``"group"`` (or True) divides by the unbiased standard deviation within the group,
            ``"batch"`` by the standard deviation over all rows, ``"none"`` (or False) does not divide.

    Returns:
        ``(n,)`` tensor on the rewards' device, computed in fp64 and returned in fp32 (fp64 for fp64 tensors). A row
        without any reward gets 0 and does not enter the mean. A group whose rewards are all equal gets exactly 0.

    Raises:
        ValueError: for an invalid shape, number or name, an infinite reward, or a weighted sum or advantage that is out
            of range.

    Source: https://arxiv.org/abs/2402.03300 section 4.1; without division https://arxiv.org/abs/2503.20783.
    """
    if isinstance(num_generations, bool) or not isinstance(num_generations, int) or num_generations < 2:
        raise ValueError(
            f"num_generations must be an integer of at least 2, got {num_generations!r}: "
            "each completion is compared with the others of its group"
        )
    try:
        scale = _SCALES[scale_rewards]
    except (KeyError, TypeError):
        raise ValueError(
            f"scale_rewards must be 'group', 'batch', 'none', True or False; got {scale_rewards!r}"
        ) from None

    dtype = rewards.dtype if isinstance(rewards, Tensor) and rewards.dtype == torch.float64 else torch.float32
    total = weighted_rewards(rewards, reward_weights)
    if dtype == torch.float32:
        rounded = total.float().double()  # equal sums, whatever the order of the additions
        total = torch.where(rounded.isinf(), total, rounded)
    n = total.shape[0]
    if n % num_generations:
        raise ValueError(
            f"rewards has {n} rows, which is not a multiple of num_generations={num_generations}: "
            "pass the rewards of whole groups"
        )
    reward = total.view(-1, num_generations)
    valid = ~reward.isnan()
    reward = torch.where(valid, reward, 0.0)
    count = valid.sum(dim=1, keepdim=True)
    mean = reward.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, reward - mean, 0.0)

    low = torch.where(valid, reward, math.inf).amin(dim=1, keepdim=True)
    high = torch.where(valid, reward, -math.inf).amax(dim=1, keepdim=True)
    differs = low < high  # all equal: exactly 0, not rounding noise divided by 1e-4
    if scale == "group":
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + STD_EPSILON)
    elif scale == "batch":
        batch_mean = reward.sum() / valid.sum().clamp(min=1)
        deviation = torch.where(valid, reward - batch_mean, 0.0)
        variance = deviation.square().sum() / (valid.sum() - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + STD_EPSILON)
    exact = torch.where(differs & valid, centred, 0.0).view(-1)
    advantages = exact.to(dtype)
    if bool(advantages.isinf().any()):
        row = int(advantages.isinf().nonzero()[0])
        raise ValueError(
            f"the advantage of row {row} is {float(exact[row]):.3g}, beyond float32: scale the rewards down, "
            "or pass scale_rewards='group'"
        )
    return advantages


def weighted_rewards(rewards: Rewards, reward_weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Weighted sum over reward functions, ``(n,)`` in fp64; NaN for a row to which no function applies.

    Arguments and errors are those of :func:`group_advantages`.
    """
    table = _reward_table(rewards)
    functions = table.shape[1]
    if reward_weights is None:
        weights = table.new_ones(functions)
    else:
        weights = _weights(reward_weights).to(table.device)
        if weights.shape != (functions,):
            raise ValueError(
                f"reward_weights has shape {tuple(weights.shape)}, rewards has {functions} function(s): "
                "pass one weight per reward function"
            )
        if not bool(weights.isfinite().all()):
            raise ValueError(f"reward_weights must be finite, got {weights.tolist()}")
    applies = ~table.isnan()
    total = (torch.where(applies, table, 0.0) * weights).sum(dim=1)
    outside = ~(total.abs() <= LARGEST_REWARD)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"the weighted sum of the rewards in row {row} is {float(total[row]):.3g}, beyond {LARGEST_REWARD:.0e}: "
            "scale the rewards or reward_weights down"
        )
    return torch.where(applies.any(dim=1), total, math.nan)


def _weights(reward_weights: Sequence[float] | Tensor) -> Tensor:
    """Convert reward weights to an fp64 tensor."""
    if isinstance(reward_weights, Tensor) and not reward_weights.is_complex():
        return reward_weights.detach().double()
    try:
        numbers = [float(plain_value("a weight", weight, "float")) for weight in reward_weights]
        return torch.tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"reward_weights must be one number per reward function: {error}") from None


def _reward_table(rewards: Rewards) -> Tensor:
    """Convert rewards to an fp64 ``(n, functions)`` tensor; NaN means that a function does not apply to a row."""
    if isinstance(rewards, Tensor):
        table = rewards.detach()
        if table.is_complex():
            raise ValueError(f"rewards must be real numbers, got a tensor of {table.dtype}")
        table = table.double()
    else:
        table = _table_from_lists(rewards)
    if table.dim() == 1:
        table = table.unsqueeze(1)
    if table.dim() != 2 or table.shape[1] == 0:
        raise ValueError(
            f"rewards has shape {tuple(table.shape)}: pass (n,) or (n, functions) with at least one function"
        )
    infinite = table.isinf().any(dim=1)
    if bool(infinite.any()):
        row = int(infinite.nonzero()[0])
        raise ValueError(f"rewards is infinite in row {row}: return a number, or None where a function does not apply")
    return table


def _table_from_lists(rewards: object) -> Tensor:
    def number(value: object, row: int) -> float:
        if value is None:
            return math.nan
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(
                f"rewards holds {value!r} in row {row}: pass numbers, or None where a function does not apply"
            ) from None
        except OverflowError:
            raise ValueError(
                f"rewards holds a number beyond float64 in row {row}: scale it, or pass None where a function does not "
                "apply"
            ) from None

    rows: list[list[float]] = []
    for i, row in enumerate(rewards):  # type: ignore[arg-type, var-annotated]
        one_function = not isinstance(row, (list, tuple))
        rows.append([number(value, i) for value in ([row] if one_function else row)])
        if len(rows[i]) != len(rows[0]):
            raise ValueError(
                f"rewards has {len(rows[i])} value(s) in row {i} and {len(rows[0])} in row 0: "
                "pass one value (or None) per function in every row"
            )
    return torch.tensor(rows, dtype=torch.float64) if rows else torch.empty((0, 1), dtype=torch.float64)


def importance_weights(
    old_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor,
    *,
    mode: str = "token_truncate",
    cap: float = 2.0,
    min: float | None = None,
) -> Tensor:
    """Importance weights for tokens sampled by an engine whose log probabilities differ from the trainer's.

    ``delta = (old - sampling) * mask``. The weight is ``exp(delta)`` per token, or ``exp(sum over t of delta)`` per
    sequence. A NaN ``delta`` counts as 0. A NaN sum also counts as 0: +inf and -inf in one sequence.

    Args:
        old_logps: ``(B, T)`` log probabilities of the behaviour policy from the trainer's own model.
        sampling_logps: ``(B, T)`` log probabilities that the generation engine reported.
        mask: ``(B, T)``, bool, int or float; values at masked positions (0) have no effect. Floats must be 0 or 1; any
            other float makes all weights NaN on a GPU.
        mode: ``{token,sequence}_truncate`` clamps the weight to ``[min, cap]``; ``{token,sequence}_mask``
            sets a weight outside ``[min, cap]`` to 0.
        cap: upper bound.
        min: lower bound, None = 0.

    Returns:
        ``(B, T)`` for the token modes, ``(B, 1)`` for the sequence modes; fp32 (fp64 if ``old_logps`` is fp64),
        without gradient. For one sequence given as ``(T,)`` tensors: ``(T,)`` and ``(1,)``.

    Raises:
        ValueError: for an unknown mode, invalid bounds, different shapes, or a float mask with values other than 0
            and 1 (CPU).
        TypeError: for complex numbers.

    Source: truncated importance sampling, https://fengyao.notion.site/off-policy-rl
    """
    if mode not in IMPORTANCE_MODES:
        raise ValueError(f"mode must be one of {', '.join(IMPORTANCE_MODES)}; got {mode!r}")
    low = plain_value("min", 0.0 if min is None else min, "float")
    cap = plain_value("cap", cap, "float")
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"cap must be positive and finite, got {cap}")
    if not 0.0 <= low <= cap:
        raise ValueError(f"min must be between 0 and cap={cap}, got {min}")
    if old_logps.dim() not in (1, 2):
        raise ValueError(f"old_logps has shape {tuple(old_logps.shape)}: pass (B, T), or (T,) for one sequence")
    for name, tensor in (("sampling_logps", sampling_logps), ("mask", mask)):
        if tensor.shape != old_logps.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, old_logps has {tuple(old_logps.shape)}: "
                "pass one value per token"
            )
        if tensor.device != old_logps.device:
            raise ValueError(f"{name} is on {tensor.device}, old_logps on {old_logps.device}: move them to one device")

    check_real("old_logps", old_logps)
    check_real("sampling_logps", sampling_logps)
    live, right = checked_mask("mask", mask)
    dtype = torch.float64 if old_logps.dtype == torch.float64 else torch.float32
    delta = old_logps.detach().to(dtype) - sampling_logps.detach().to(dtype)
    delta = torch.where(live & ~delta.isnan(), delta, 0.0)
    if mode.startswith("sequence"):
        delta = delta.sum(dim=-1, keepdim=True)
        delta = torch.where(delta.isnan(), 0.0, delta)
    weight = delta.exp()
    if mode.endswith("truncate"):
        weight = weight.clamp(min=low, max=cap)
    else:
        weight = torch.where((weight >= low) & (weight <= cap), weight, 0.0)
    return poisoned(right, weight)
