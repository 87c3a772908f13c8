"""The fused head: compute a function of the hidden states where the model would compute its logits.

During one call the model's output layer takes the hidden states and returns that function's result. The model's own
forward runs around it, so hooks of DDP, FSDP, ZeRO, PEFT and autocast see an ordinary forward whose output is the
loss. The head's weight is read inside the head's own call, where a sharded weight has been gathered.

What a model does to its logits after the head (softcap, scale) is read from its config and verified in the first call:
a row of known numbers goes through that code in place of logits and must come out as expected.
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

#: What is computed in place of logits: a 0-d loss with its companions, or, without gradients, any tensor.
Result = TypeVar("Result", Tensor, GRPOLossOutput)

#: ``(hidden, weight, bias)`` of the head, hidden as the head was called with, to a `Result`.
HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Result]


class FusedHead:
    """Runs a model with its output layer replaced by a function of the hidden states.

    Args:
        model: the causal language model, unwrapped (a PEFT model may be around it).
        wanted: None takes the fused head where it is possible, False never, True always.
        compiled: whether the model is going to be wrapped by ``torch.compile``.

    Attributes:
        reason: why the logits path is taken instead; None while the fused head serves.
        logit_scale, logit_softcap: the model's logits are ``softcap(logit_scale * head(hidden))``.

    Raises:
        ValueError: ``wanted`` is True and the model does not allow it; says why.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None, *, compiled: bool = False) -> None:
        self.wanted = wanted
        self.reason: str | None = None
        self.logit_scale, self.logit_softcap = logit_transform_of(model)
        self.proved = False
        if wanted is False:
            self.reason = "use_fused_head=False"
        elif compiled:
            self._refuse("torch.compile keeps the model's own head in its graph", ValueError)
        else:
            reason = unfit(output_layer(causal_lm(model)))
            if reason is not None:
                self._refuse(reason, ValueError)

    def _refuse(self, reason: str, error: type[Exception]) -> None:
        self.reason = reason
        if self.wanted:
            raise error(f"use_fused_head=True, but {reason}: leave it None to take the logits path there")

    @property
    def serves(self) -> bool:
        """Whether calls go through the fused head."""
        return self.reason is None

    def describe(self) -> str:
        """``fused head``, or ``logits: <reason>``."""
        return "fused head" if self.reason is None else f"logits: {self.reason}"

    def run(self, model: nn.Module, inputs: dict[str, Any], function: HeadFunction[Result]) -> Result | None:
        """Run the model on ``inputs`` and return what ``function`` makes of its hidden states.

        Args:
            model: the policy or its reference, wrapped or not.
            inputs: keyword arguments of its forward.
            function: called once, inside the head.

        Returns:
            The result; the gradient of its loss flows back through the model. None if the first call shows that the
            model's logits are not what its config says; `reason` is set then.

        Raises:
            RuntimeError: the same with ``use_fused_head=True``.
        """
        inner = causal_lm(model)
        head = output_layer(inner)
        reason = unfit(head)
        if reason is not None:
            self._refuse(reason, RuntimeError)
            return None
        assert isinstance(head, nn.Linear)
        call: _Call[Result] = _Call(head, function)
        with call.attached(inner):
            try:
                outputs = model(**inputs)
            except (RuntimeError, ValueError, IndexError) as error:
                if call.result is None or self.proved or isinstance(error, torch.OutOfMemoryError):
                    raise
                self._refuse(f"the model's forward needs the logits themselves ({type(error).__name__})", RuntimeError)
                return None
        if not self.proved:
            reason = call.difference(self.logit_scale, self.logit_softcap)
            if reason is not None:
                self._refuse(reason, RuntimeError)
                return None
            self.proved = True
        assert call.result is not None
        assert call.loss is not None
        if not call.loss.requires_grad:
            return call.result
        joined = _Joined.apply(call.loss, outputs[0])
        return joined if isinstance(call.result, Tensor) else call.result._replace(loss=joined)


class _Call(Generic[Result]):
    """One call of a model whose head is replaced."""

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
        # Registered last, so it sees what the wrappers' own hooks have made of the output.
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
            row = torch.cat([self.loss.reshape(1), row[1:]])  # an output that the loss's graph hangs on
        return row.view(1, 1, -1)

    def _remember(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self._carrier = output

    def _model_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            outputs = forward(*args, **kwargs)
            if self._carrier is None:  # the head was never called; `difference` says so
                return (next(iter(self.head.parameters())).new_zeros(()),)
            self._processed = getattr(outputs, "logits", None)
            return (self._carrier.flatten()[0],)

        return run

    def difference(self, scale: float, softcap: float | None) -> str | None:
        """What contradicts ``logits = softcap(scale * head(hidden))``; None for nothing."""
        if self.calls != 1 or self.loss is None:
            return f"the model's forward called its output layer {self.calls} times instead of once"
        vocabulary = self.head.out_features
        processed = self._processed
        if not isinstance(processed, Tensor) or processed.numel() != vocabulary or not processed.is_floating_point():
            return "the model returns something else than the logits of its output layer"
        expected = scale * _probe(vocabulary, self.loss)
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        got = processed.detach().flatten()
        rounding = torch.finfo(got.dtype).eps  # of wrappers that hand outputs on in a narrower type, FSDP2's for one
        if not torch.allclose(got[1:].to(expected.dtype), expected[1:], rtol=max(1e-4, 2 * rounding), atol=1e-4):
            return "the model changes its logits after the head in a way that its config does not name"
        return None


class _Joined(torch.autograd.Function):
    """The loss itself; backward passes through the model's output, where wrappers wait for it, but with nothing.

    So the types into which wrappers convert outputs touch neither the loss nor its gradient.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros_like(output))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (nothing,) = ctx.saved_tensors
        return grad, nothing


def _probe(vocabulary: int, like: Tensor) -> Tensor:
    """Numbers in the range of logits, one per token."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.linspace(-50.0, 50.0, vocabulary, dtype=dtype, device=like.device)


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` with another forward; its hooks stay."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def unfit(head: nn.Module | None) -> str | None:
    """Why a head cannot be replaced; None where it can."""
    if head is None:
        return "the model has no get_output_embeddings()"
    kind = type(head).__name__
    if hasattr(head, "base_layer"):
        return f"the head carries an adapter of its own ({kind})"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"the head is a {kind}, not a plain torch.nn.Linear"
    if not head.weight.is_floating_point():
        return f"the head's weight is {head.weight.dtype}"
    if hasattr(head, "_hf_hook"):
        return "the head carries a hook that moves it between devices"
    return None


def logit_transform_of(model: nn.Module) -> tuple[float, float | None]:
    """(scale, softcap) of a model's logits by the names that transformers' configs have for them."""
    config: Any = getattr(causal_lm(model), "config", None)
    config = getattr(config, "text_config", None) or config
    scale = 1.0
    for name, inverse in (("logit_scale", False), ("logits_scaling", True), ("lm_head_multiplier", False)):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scale = scale / value if inverse else scale * value
    softcap = getattr(config, "final_logit_softcapping", None)
    return float(scale), float(softcap) if softcap else None
