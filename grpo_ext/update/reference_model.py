"""Reference model of the KL term."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from grpo_ext.modules.inspection import eval_mode, is_peft_model
from grpo_ext.modules.sharding import full_tensor, gathered_parameters, is_sharded


class ReferenceModel:
    """The policy with its adapter disabled, or a frozen copy if the policy has no adapter.

    Every process holds the full copy, even if the policy is sharded.

    Args:
        model: the policy before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._frozen: nn.Module | None = None
        if is_peft_model(model):
            # Only a trained adapter changes the model's output: a new one has B = 0.
            if any(p.any() for name, p in model.named_parameters() if ".lora_B." in name and not is_sharded(p)):
                warnings.warn(
                    "the model has a trained adapter, but the reference of the KL term (beta > 0) is the model without "
                    "the adapter: merge it first (model.merge_and_unload()) to use the trained model as the reference",
                    stacklevel=4,
                )
        else:
            with gathered_parameters(model):
                self._frozen = copy.deepcopy(model).eval().requires_grad_(False)

    @contextlib.contextmanager
    def using(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the reference in eval mode.

        Args:
            model: the policy, unwrapped.
        """
        if self._frozen is not None:
            self._frozen.to(next(model.parameters()).device)
            yield self._frozen
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with eval_mode(model), model.disable_adapter():  # type: ignore[operator]
            # PEFT freezes a disabled adapter. FSDP2 has two copies of a weight, sharded and gathered, and enabling the
            # adapter unfreezes only one of them. Unfreeze now, or the weights that this pass gathers would stay frozen.
            for parameter in trained:
                parameter.requires_grad_(True)
            yield model

    def check_can_move(self) -> None:
        """Check that the reference is a copy, which `move_towards` can change.

        Raises:
            ValueError: the reference is the model without its adapter.
        """
        if self._frozen is None:
            raise ValueError(
                "sync_ref_model=True changes the reference model, but with an adapter the reference is the model "
                "without it: set sync_ref_model=False, or train all weights"
            )

    @torch.no_grad()
    def move_towards(self, model: nn.Module, share: float) -> None:
        """Set ``reference = share * model + (1 - share) * reference``, in the reference's dtype."""
        assert self._frozen is not None
        for mine, theirs in zip(self._frozen.parameters(), model.parameters(), strict=True):
            mine.lerp_(full_tensor(theirs).to(mine.device, mine.dtype), share)

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Return the weights of the frozen copy, on the CPU; None if the reference is the model without its adapter."""
        return None if self._frozen is None else {k: v.cpu() for k, v in self._frozen.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the weights that `state_dict` returned."""
        assert self._frozen is not None
        self._frozen.load_state_dict(state)
