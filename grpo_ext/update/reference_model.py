"""The reference model of the KL term."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from grpo_ext.modules.inspection import evaluating, is_peft_model
from grpo_ext.modules.sharding import is_sharded, made_whole, whole


class ReferenceModel:
    """The reference policy of the KL term: the model with its adapter switched off, or a frozen copy of it.

    The copy is whole on every process, however the model in training is spread.

    Args:
        model: the model before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen: nn.Module | None = None
        if is_peft_model(model):
            # B starts at 0; the adapter of a model that has been trained before does not.
            if any(p.any() for name, p in model.named_parameters() if ".lora_B." in name and not is_sharded(p)):
                warnings.warn(
                    "the model comes with an adapter that changes it, and the reference of the KL term (beta > 0) is "
                    "the model without the adapter: merge it first (model.merge_and_unload()) to stay near it",
                    stacklevel=4,
                )
        else:
            with made_whole(model):
                self._frozen = copy.deepcopy(model).eval().requires_grad_(False)

    @contextlib.contextmanager
    def using(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference in eval mode, given the model in training (unwrapped)."""
        if self._frozen is not None:
            self._frozen.to(next(model.parameters()).device)
            yield self._frozen
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with evaluating(model), model.disable_adapter():  # type: ignore[operator]
            # PEFT freezes an adapter that is off, and its way back knows one form of a weight, FSDP2 has two: a weight
            # that this pass puts together would stay frozen.
            for parameter in trained:
                parameter.requires_grad_(True)
            yield model

    def check_can_move(self) -> None:
        """Refuse to move the reference of an adapter.

        Raises:
            ValueError: the reference is the model without its adapter, whose weights stay.
        """
        if self._frozen is None:
            raise ValueError(
                "sync_ref_model=True moves a reference model, and with an adapter the reference is the model without "
                "it: leave sync_ref_model off, or train all weights"
            )

    @torch.no_grad()
    def move_towards(self, model: nn.Module, share: float) -> None:
        """``reference = share * model + (1 - share) * reference``, in the reference's own dtype."""
        assert self._frozen is not None
        for mine, theirs in zip(self._frozen.parameters(), model.parameters(), strict=True):
            mine.lerp_(whole(theirs).to(mine.device, mine.dtype), share)

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Weights of a reference that moves with the run; None for one that the adapter's model is."""
        return None if self._frozen is None else {k: v.cpu() for k, v in self._frozen.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse."""
        assert self._frozen is not None
        self._frozen.load_state_dict(state)
