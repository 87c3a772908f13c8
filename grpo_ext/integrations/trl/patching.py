"""Replace the parts of TRL's trainers that this package computes, and restore them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from grpo_ext.integrations.trl import handover
from grpo_ext.integrations.trl.batches import Options, split, splitting
from grpo_ext.integrations.trl.counting import Status, counts
from grpo_ext.integrations.trl.fused_loss import compute_loss
from grpo_ext.integrations.trl.layers import train, training_step
from grpo_ext.integrations.trl.one_forward import complete, generate, old_pass_skipped
from grpo_ext.integrations.trl.passes import Update, logps_and_entropies, rows_of, updating, zero_loss
from grpo_ext.integrations.trl.seam import LogProbabilities

#: First supported version, first unsupported version after it.
VERSIONS = ((1, 15), (1, 17))

#: Original values of the replaced attributes; `_INHERITED` for an attribute that the owner did not have itself.
_originals: dict[tuple[Any, str], Any] = {}
_INHERITED = object()

_options = Options()


def _utils() -> Any:
    """Return ``trl.trainer.utils`` of a supported version."""
    try:
        import trl
    except ImportError as error:
        raise ImportError("grpo_ext.integrations.trl needs TRL: pip install 'trl>=1.15,<1.17'") from error
    found = tuple(int(part) for part in trl.__version__.split(".")[:2] if part.isdigit())
    if not VERSIONS[0] <= found < VERSIONS[1]:
        raise ImportError(
            f"grpo_ext.integrations.trl is written for TRL 1.15 and 1.16, and TRL {trl.__version__} is installed: "
            "pip install 'trl>=1.15,<1.17', or train without patch()"
        )
    from trl.trainer import utils

    return utils


def _replace(owner: Any, name: str, replacement: Callable[[Any], Any]) -> None:
    """Set ``owner.name`` to ``replacement(its value)``, unless it is replaced already."""
    if (owner, name) not in _originals:
        _originals[owner, name] = vars(owner).get(name, _INHERITED)
        setattr(owner, name, replacement(getattr(owner, name)))


def _restore(owner: Any, name: str) -> None:
    original = _originals.pop((owner, name), None)
    if original is _INHERITED:
        delattr(owner, name)
    elif original is not None:
        setattr(owner, name, original)


def patch(*, fuse_loss: bool = False, **switches: bool) -> None:
    """Make TRL's trainers train with this package's kernels and training step.

    Affects GRPO, RLOO, AsyncGRPO, SFT, DPO and KTO trainers created before or after this call. Every part of the step
    that a trainer's settings rule out falls back to TRL; `status` has the reasons. A further call changes only the
    arguments.

    Args:
        fuse_loss: also compute the loss of ``trl.GRPOTrainer`` with `grpo_ext.linear_grpo_loss`, inside the model's
            forward; a token-level loss then computes its logits once. Unsupported losses fall back to TRL.
        **switches: parts of the step. On by default, as their results are TRL's up to rounding:

            - ``trim``: run each micro-batch of GRPO and RLOO without the padding of its generation batch.
            - ``one_forward``: take old log probabilities from the update's forward, if the policy that generated a
              batch is the one it updates.
            - ``skip_zero_gradient_sequences``: no backward for sequences of advantage 0.
            - ``layers``: faster LoRA and RMSNorm layers, adapters cast once per micro-batch.
            - ``checkpointing``: gradient checkpointing without hooks on saved tensors.
            - ``weights``: hand the weights to a colocated vLLM in one pass, with adapters merged out of place, and log
              ``vllm/weight_check`` (GRPO and RLOO).

            Off by default, as they change which sequences share a micro-batch, and with it TRL's averages of metrics:

            - ``length_sorted_batches``: sort the sequences of an optimizer step by length.
            - ``fill_micro_batches``: fill as few micro-batches as possible by length (dapo, cispo, vespo).

    Raises:
        ImportError: if TRL is missing, is not 1.15 or 1.16, or is 1.15 without Triton.
        TypeError: an unknown switch.
    """
    global _options
    try:
        options = Options(**switches)
    except TypeError:
        known = ", ".join(field.name for field in dataclasses.fields(Options))
        raise TypeError(f"patch() has no switches {sorted(switches)}: it has fuse_loss, {known}") from None
    utils = _utils()
    if not status().patched:
        _patch_head(utils)
    _options = options
    _patch_steps()
    from trl import GRPOTrainer

    _restore(GRPOTrainer, "_compute_loss")
    _replace(GRPOTrainer, "_compute_loss", lambda own: _loss_method(own, fuse_loss))


def _patch_head(utils: Any) -> None:
    original = utils._ChunkedLogProbFunction
    if original is None:
        raise ImportError("TRL 1.15 needs Triton for its fused head: install triton, or TRL 1.16")
    counts.reset()
    LogProbabilities.original = original
    _replace(utils, "_ChunkedLogProbFunction", lambda _: LogProbabilities)
    if hasattr(utils, "_use_triton"):
        _replace(
            utils, "_use_triton", lambda own: lambda device: device.type in ("cpu", "cuda") or own(device)
        )  # on the CPU, too, only unmasked positions are scored


def _patch_steps() -> None:
    """Replace the methods of a training step; each looks up the switches when it runs."""
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer import grpo_trainer, rloo_trainer
    from trl.trainer.base_trainer import _BaseTrainer

    _replace(_BaseTrainer, "train", _train_method)
    _replace(_BaseTrainer, "training_step", _step_method)
    _replace(RLOOTrainer, "_compute_loss", lambda own: _loss_method(own, False))
    for owner in (GRPOTrainer, RLOOTrainer):
        _replace(owner, "_get_per_token_logps_and_entropies", _pass_method)
        _replace(owner, "_generate_and_score_completions", _generate_method)
        _replace(owner, "_prepare_inputs", _prepare_method)
    for owner, name, method in handover.methods(lambda: _options.weights):
        _replace(owner, name, method)
    for module in (grpo_trainer, rloo_trainer):
        _replace(module, "split_tensor_dict", lambda own: lambda batch, number: split(batch, number, own))


def _train_method(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return train(self, own, _options, *args, **kwargs)

    return method


def _step_method(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return training_step(self, own, *args, **kwargs)

    return method


def _pass_method(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(
        self: Any,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if old_pass_skipped.get():
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        return logps_and_entropies(
            self, own, _options.trim, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )  # fmt: skip

    return method


def _generate_method(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, inputs: Any) -> Any:
        return generate(self, inputs, own) if _options.one_forward else own(self, inputs)

    return method


def _prepare_method(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, batch: Any) -> Any:
        with splitting(self, _options):
            return own(self, batch)

    return method


def _loss_method(own: Callable[..., Any], fuse_loss: bool) -> Callable[..., Any]:
    def in_update(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        with updating(Update(rows_of(inputs), False, lambda logps: complete(self, inputs, logps))):
            loss: torch.Tensor = own(self, model, inputs)
            return loss

    @functools.wraps(own)
    def method(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not len(inputs["completion_ids"]):
            return zero_loss(model)
        return compute_loss(self, model, dict(inputs), in_update) if fuse_loss else in_update(self, model, dict(inputs))

    method.fuses = fuse_loss  # type: ignore[attr-defined]
    return method


def unpatch() -> None:
    """Restore TRL's own code; `status` keeps its counts."""
    for owner, name in list(_originals):
        _restore(owner, name)


def status() -> Status:
    """Return the counts of what this package computed, and of fallbacks to TRL with their reasons."""
    names = {name for _, name in _originals}
    patched = "_ChunkedLogProbFunction" in names
    return Status(
        patched=patched,
        fuse_loss=any(getattr(vars(owner).get("_compute_loss"), "fuses", False) for owner, _ in _originals),
        served=dict(counts.served),
        handed_back=dict(counts.handed_back),
        losses_served=counts.losses_served,
        losses_handed_back=dict(counts.losses_handed_back),
        parts=counts.parts([name for name, on in dataclasses.asdict(_options).items() if on]),
    )
