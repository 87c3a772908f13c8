"""Fused head: compute a function of the hidden states in place of the model's logits.

For one call, the model's output layer runs that function on the hidden states and returns its result. The model's own
forward runs around it, so hooks of DDP, FSDP, ZeRO, PEFT and autocast see an ordinary forward whose output is the
loss. The head's weight is read inside the head's call, where a sharded weight is gathered.

The model's config states how the model transforms its logits after the head (softcap, scale). The first call verifies
it: a row of known numbers takes the place of the logits, and the model's output must match the config.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from grpo_ext.modules.inspection import causal_lm, output_layer
from grpo_ext.output import GRPOLossOutput

#: Result computed in place of logits: the output of a loss, or any tensor without gradient.
Result = TypeVar("Result", Tensor, GRPOLossOutput)

#: Maps ``(hidden, weight, bias)`` to a `Result`; ``hidden`` is the head's input.
HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Result]


class FusedHead:
    """Run a model with its output layer replaced by a function of the hidden states.

    Args:
        model: the causal language model, unwrapped, or a PEFT model around it.
        wanted: None uses the fused head if the model allows it, False never, True always.
        compiled: whether ``torch.compile`` will wrap the model.

    Attributes:
        reason: why the loss is computed from logits instead; None while the fused head is in use.
        logit_scale, logit_softcap: the model's logits are ``softcap(logit_scale * head(hidden))``.

    Raises:
        ValueError: ``wanted`` is True and the model does not allow it; the message has the reason.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None, *, compiled: bool = False) -> None:
        self.wanted = wanted
        self.reason: str | None = None
        self.logit_scale, self.logit_softcap = logit_transform_of(model)
        self.verified = False
        if wanted is False:
            self.reason = "use_fused_head=False"
        elif compiled:
            self._refuse("torch.compile keeps the model's own head in its graph", ValueError)
        else:
            reason = reason_against_replacing(output_layer(causal_lm(model)))
            if reason is not None:
                self._refuse(reason, ValueError)

    def _refuse(self, reason: str, error: type[Exception]) -> None:
        self.reason = reason
        if self.wanted:
            raise error(f"use_fused_head=True, but {reason}: leave it None to compute the loss from logits")

    @property
    def in_use(self) -> bool:
        """Whether the fused head is in use."""
        return self.reason is None

    def describe(self) -> str:
        """``fused head``, or ``logits: <reason>``."""
        return "fused head" if self.reason is None else f"logits: {self.reason}"

    def run(self, model: nn.Module, inputs: dict[str, Any], function: HeadFunction[Result]) -> Result | None:
        """Run the model on ``inputs`` and return the result of ``function`` on its hidden states.

        Args:
            model: the policy or its reference, wrapped or not.
            inputs: keyword arguments of the model's forward.
            function: called once, inside the head.

        Returns:
            The result; backward of its loss runs through the model. None if the model does not allow a fused head or
            the first call contradicts its config; `reason` is then set.

        Raises:
            RuntimeError: instead of returning None, if ``wanted`` is True.
        """
        inner = causal_lm(model)
        head = output_layer(inner)
        reason = reason_against_replacing(head)
        if reason is not None:
            self._refuse(reason, RuntimeError)
            return None
        assert isinstance(head, nn.Linear)
        call: _Call[Result] = _Call(head, function)
        with call.attached(inner):
            try:
                outputs = model(**inputs)
            except (RuntimeError, ValueError, IndexError) as error:
                if call.result is None or self.verified or isinstance(error, torch.OutOfMemoryError):
                    raise
                self._refuse(f"the model's forward needs the logits themselves ({type(error).__name__})", RuntimeError)
                return None
        if not self.verified:
            reason = call.difference(self.logit_scale, self.logit_softcap)
            if reason is not None:
                self._refuse(reason, RuntimeError)
                return None
            self.verified = True
        assert call.result is not None
        assert call.loss is not None
        if not call.loss.requires_grad:
            return call.result
        joined = _LossThroughOutput.apply(call.loss, outputs[0])
        return joined if isinstance(call.result, Tensor) else call.result._replace(loss=joined)


class _Call(Generic[Result]):
    """One call of a model with a replaced head."""

    def __init__(self, head: nn.Linear, function: HeadFunction[Result]) -> None:
        self.head = head
        self.function: HeadFunction[Result] = function
        self.calls = 0
        self.result: Result | None = None
        self.loss: Tensor | None = None
        self._carrier: Tensor | None = None
        self._processed: Any = None

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        # Registered last, so it sees the output after the hooks of the wrappers.
        hook = self.head.register_forward_hook(self._remember)
        try:
            with _forward_of(self.head, self._head_forward), _forward_of(model, self._model_forward(model.forward)):
                yield
        finally:
            hook.remove()

    def _head_forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        self.result = self.function(hidden, self.head.weight, self.head.bias)
        self.loss = self.result if isinstance(self.result, Tensor) else self.result.loss
        row = _probe(self.head.out_features, self.loss)
        if self.loss.requires_grad:
            row = torch.cat([self.loss.reshape(1), row[1:]])  # connects the output to the loss's graph
        return row.view(1, 1, -1)

    def _remember(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self._carrier = output

    def _model_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            outputs = forward(*args, **kwargs)
            if self._carrier is None:  # the head was never called, which `difference` reports
                return (next(iter(self.head.parameters())).new_zeros(()),)
            self._processed = getattr(outputs, "logits", None)
            return (self._carrier.flatten()[0],)

        return run

    def difference(self, scale: float, softcap: float | None) -> str | None:
        """Return what contradicts ``logits = softcap(scale * head(hidden))``; None if the call agrees with it."""
        if self.calls != 1 or self.loss is None:
            return f"the model's forward called its output layer {self.calls} times instead of once"
        vocabulary = self.head.out_features
        processed = self._processed
        if not isinstance(processed, Tensor) or processed.numel() != vocabulary or not processed.is_floating_point():
            return "the model does not return the logits of its output layer"
        expected = scale * _probe(vocabulary, self.loss)
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        got = processed.detach().flatten()
        rounding = torch.finfo(got.dtype).eps  # wrappers such as FSDP2's may round outputs to a narrower dtype
        if not torch.allclose(got[1:].to(expected.dtype), expected[1:], rtol=max(1e-4, 2 * rounding), atol=1e-4):
            return "the model transforms its logits after the head in a way that its config does not state"
        return None


class _LossThroughOutput(torch.autograd.Function):
    """Return the loss; send its gradient directly to its graph, and zeros to the model's output.

    Wrappers have backward hooks on the model's output, which the zeros trigger. The direct gradient avoids rounding to
    the dtype into which wrappers convert the output.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros_like(output))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (zeros,) = ctx.saved_tensors
        return grad, zeros


def _probe(vocabulary: int, like: Tensor) -> Tensor:
    """Return known numbers in the range of logits, one per token of the vocabulary."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.linspace(-50.0, 50.0, vocabulary, dtype=dtype, device=like.device)


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of ``module`` for the ``with`` block; its hooks stay."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def reason_against_replacing(head: nn.Module | None) -> str | None:
    """Return why a head cannot be replaced; None if it can."""
    if head is None:
        return "the model has no get_output_embeddings()"
    kind = type(head).__name__
    if hasattr(head, "base_layer"):
        return f"the head has an adapter ({kind})"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"the head is a {kind}, not a plain torch.nn.Linear"
    if not head.weight.is_floating_point():
        return f"the head's weight is {head.weight.dtype}"
    if hasattr(head, "_hf_hook"):
        return "the head has a hook that moves it between devices"
    return None


def logit_transform_of(model: nn.Module) -> tuple[float, float | None]:
    """Return (scale, softcap) of a model's logits from the names that transformers' configs use."""
    config: Any = getattr(causal_lm(model), "config", None)
    config = getattr(config, "text_config", None) or config
    scale = 1.0
    for name, inverse in (("logit_scale", False), ("logits_scaling", True), ("lm_head_multiplier", False)):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scale = scale / value if inverse else scale * value
    softcap = getattr(config, "final_logit_softcapping", None)
    return float(scale), float(softcap) if softcap else None
