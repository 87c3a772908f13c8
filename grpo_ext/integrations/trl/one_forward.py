"""Take old log probabilities from the update's own forward in TRL's GRPO and RLOO trainers.

Before the first update of a generation batch the policy that is trained is the policy that generated. TRL computes its
log probabilities in a second forward, to compare them with those of vLLM (GRPO) or as the old policy's (RLOO). The
update's forward has them already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from grpo_ext.integrations.trl.counting import counts
from grpo_ext.modules.inspection import has_dropout

#: Set while RLOO's trainer generates a batch whose old log probabilities the update will fill in.
old_pass_skipped: ContextVar[bool] = ContextVar("grpo_ext_trl_old_pass_skipped", default=False)

#: Attribute of the trainer: `_SamplingStatistics` of the batches of one generation.
STATISTICS = "_grpo_ext_sampling"


def is_rloo(trainer: Any) -> bool:
    from trl import RLOOTrainer

    return isinstance(trainer, RLOOTrainer)


def corrects_sampling(trainer: Any) -> bool:
    """Whether TRL's GRPO trainer compares its log probabilities with those of vLLM."""
    return not is_rloo(trainer) and bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def reason_for_second_forward(trainer: Any) -> str | None:
    """Return why TRL's pass for old log probabilities must run; None if the update's forward replaces it."""
    from trl import GRPOTrainer, RLOOTrainer

    own = RLOOTrainer if is_rloo(trainer) else GRPOTrainer
    for name in ("_compute_loss", "_get_per_token_logps_and_entropies"):
        if getattr(type(trainer), name) is not getattr(own, name):
            return f"{type(trainer).__name__} has its own {name}"
    steps = trainer.args.steps_per_generation * trainer.num_iterations
    if trainer.num_iterations != 1:
        return "num_iterations > 1"
    if trainer.args.gradient_accumulation_steps % steps != 0:
        return "several optimizer steps per generation batch"
    if is_rloo(trainer) and trainer.beta != 0.0:
        return "beta: RLOO's KL term is part of the reward"
    if has_dropout(trainer.model):
        return "dropout: two forwards differ"
    return None


def generate(trainer: Any, inputs: Any, original: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any]:
    """Replace ``_generate_and_score_completions``: the same batch, without the pass if the update replaces it."""
    if not is_rloo(trainer) and not corrects_sampling(trainer):
        return original(trainer, inputs)  # TRL runs no pass if the steps are aligned, and needs it if they are not
    if not counts.part("one_forward", reason_for_second_forward(trainer)):
        return original(trainer, inputs)
    if is_rloo(trainer):
        with _skipping_old_pass():
            batch = original(trainer, inputs)
        del batch["old_logps"]
        return batch
    trainer.vllm_importance_sampling_correction = False
    try:
        return original(trainer, inputs)
    finally:
        trainer.vllm_importance_sampling_correction = True


@contextlib.contextmanager
def _skipping_old_pass() -> Iterator[None]:
    token = old_pass_skipped.set(True)
    try:
        yield
    finally:
        old_pass_skipped.reset(token)


def complete(trainer: Any, inputs: dict[str, Any], logps: Tensor) -> None:
    """Add to the batch what the skipped pass would have computed.

    Args:
        inputs: a batch of TRL; gets ``importance_sampling_ratio`` (GRPO) or ``old_logps`` (RLOO) if it lacks them.
        logps: (B,T) fp32, detached log probabilities of the update's forward.
    """
    if is_rloo(trainer):
        if "old_logps" not in inputs:
            inputs["old_logps"] = (logps * inputs["completion_mask"]).sum(dim=1)
    elif lacks_ratio(trainer, inputs):
        difference, mask = sampling_difference(inputs, logps)
        inputs["importance_sampling_ratio"] = importance_ratio(trainer, difference)
        log_sampling(trainer, inputs, difference, inputs["importance_sampling_ratio"], mask)


def lacks_ratio(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Whether the loss needs importance weights that the skipped pass did not compute."""
    return corrects_sampling(trainer) and "importance_sampling_ratio" not in inputs


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Return the (B,T) mask of the tokens in the loss."""
    mask: Tensor = inputs["completion_mask"]
    return mask if inputs.get("tool_mask") is None else mask * inputs["tool_mask"]


def sampling_difference(inputs: dict[str, Any], logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return trainer minus engine log probability (B,T), 0 where vLLM reported none, and the mask of known tokens."""
    difference = logps - inputs["sampling_per_token_logps"]
    known = ~difference.isnan()
    mask = loss_mask(inputs)
    return torch.where(known & (mask != 0), difference, 0.0), known & (mask != 0)


def importance_ratio(trainer: Any, difference: Tensor) -> Tensor:
    """Return TRL's weights: (B,T) in the token modes, (B,1) in the sequence modes."""
    scope, action = trainer.vllm_importance_sampling_mode.split("_")
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    ratio = (difference.sum(dim=1, keepdim=True) if scope == "sequence" else difference).exp()
    if action == "truncate":
        return ratio.clamp(min=low, max=high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    return ratio.masked_fill(outside, 0.0)


class _SamplingStatistics:
    """Sums and extremes over the batches of one generation, on the device."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.extremes: list[Tensor] = []

    def add(self, difference: Tensor, ratio: Tensor, mask: Tensor, in_loss: Tensor) -> None:
        counted = torch.ones_like(ratio, dtype=torch.bool) if ratio.shape[1] == 1 else in_loss
        size = difference.abs()
        self.sums.append(
            torch.stack([size.sum(), mask.sum(), ratio.masked_fill(~counted, 0.0).sum(), counted.sum()]).double()
        )
        self.extremes.append(
            torch.stack(
                [
                    size.amax(),
                    -ratio.masked_fill(~counted, torch.inf).amin(),
                    ratio.masked_fill(~counted, -torch.inf).amax(),
                ]
            )
        )

    def log(self, trainer: Any, metrics: Any) -> None:
        """Append TRL's ``sampling/`` metrics: means of each process's mean, extremes over all."""
        delta, count, total, ratios = torch.stack(self.sums).sum(dim=0)
        largest, lowest, highest = torch.stack(self.extremes).amax(dim=0)
        some = ratios > 0  # TRL logs 0 for a process without tokens
        own = torch.stack(
            [
                delta / count.clamp(min=1),
                largest,
                torch.where(some, -lowest, 0.0),
                total / ratios.clamp(min=1),
                torch.where(some, highest, 0.0),
            ]
        ).float()
        every = trainer.accelerator.gather(own.unsqueeze(0))
        mean, low, high = every.mean(dim=0).tolist(), every.amin(dim=0).tolist(), every.amax(dim=0).tolist()
        metrics["sampling/sampling_logp_difference/mean"].append(mean[0])
        metrics["sampling/sampling_logp_difference/max"].append(high[1])
        metrics["sampling/importance_sampling_ratio/min"].append(low[2])
        metrics["sampling/importance_sampling_ratio/mean"].append(mean[3])
        metrics["sampling/importance_sampling_ratio/max"].append(high[4])


def log_sampling(trainer: Any, inputs: dict[str, Any], difference: Tensor, ratio: Tensor, mask: Tensor) -> None:
    """Collect ``sampling/`` metrics, and log them after the last batch of a generation; one host sync there."""
    training = trainer.model.training
    place = trainer._step % trainer.args.steps_per_generation if training else 0
    statistics = getattr(trainer, STATISTICS, None)
    if statistics is None or place == 0:
        statistics = _SamplingStatistics()
    statistics.add(difference, ratio, mask, loss_mask(inputs) != 0)
    setattr(trainer, STATISTICS, statistics)
    if not training or place == trainer.args.steps_per_generation - 1:
        statistics.log(trainer, trainer._metrics["train" if training else "eval"])
        setattr(trainer, STATISTICS, None)
