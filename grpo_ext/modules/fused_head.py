"""The fused head of the trainer: the loss is formed where the model would have formed its logits.

For the duration of one call the model's output layer takes the hidden states and returns the loss. The model's own
forward runs around it, so whatever hangs on modules (DDP, FSDP, ZeRO, PEFT, autocast) sees an ordinary forward whose
output is the loss, and the weight of the head is read inside the head's own call, where a sharded one is whole.

What models do to their logits after the head (softcap, scale) is read from their config and proved in the first call:
a row of known numbers goes through that code in place of logits and has to come out as expected.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

#: (hidden states, weight, bias) of the head to a tensor; hidden states are those that the head was called with.
HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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

    def run(self, model: nn.Module, call: Callable[[], Any], function: HeadFunction) -> Tensor | None:
        """What ``function`` makes of the hidden states, with the gradient that flows back through the model.

        Args:
            model: the policy or its reference, wrapped or not.
            call: calls it, once.
            function: returns a 0-d loss, or, without gradients, a tensor of any shape.

        Returns:
            None where the first call shows that the model's logits are not what its config says; ``reason`` is set.

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
        work = _Call(head, function)
        with work.attached(inner):
            try:
                outputs = call()
            except (RuntimeError, ValueError, IndexError) as error:
                if work.result is None or self.proved or isinstance(error, torch.OutOfMemoryError):
                    raise
                self._refuse(f"the model's forward needs the logits themselves ({type(error).__name__})", RuntimeError)
                return None
        if not self.proved:
            reason = work.difference(self.logit_scale, self.logit_softcap)
            if reason is not None:
                self._refuse(reason, RuntimeError)
                return None
            self.proved = True
        return _Joined.apply(work.result, outputs[0]) if work.in_graph else work.result


class _Call:
    """One call of a model whose head is replaced."""

    def __init__(self, head: nn.Linear, function: HeadFunction) -> None:
        self.head = head
        self.function = function
        self.calls = 0
        self.result: Tensor | None = None
        self.in_graph = False
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
        result = self.function(hidden, self.head.weight, self.head.bias)
        self.result, self.in_graph = result, result.requires_grad
        row = _probe(self.head.out_features, result)
        if self.in_graph:
            row = torch.cat([result.reshape(1), row[1:]])  # an output that the loss's graph hangs on
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
        if self.calls != 1 or self.result is None:
            return f"the model's forward called its output layer {self.calls} times instead of once"
        vocabulary = self.head.out_features
        processed = self._processed
        if not isinstance(processed, Tensor) or processed.numel() != vocabulary or not processed.is_floating_point():
            return "the model returns something else than the logits of its output layer"
        expected = scale * _probe(vocabulary, self.result)
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


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of several processes and of PEFT."""
    inner: Any = model
    if isinstance(getattr(model, "module", None), nn.Module) or "_orig_mod" in model.__dict__:
        inner = extract_model_from_parallel(model)  # looks at every module, so not where nothing is wrapped
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def output_layer(model: nn.Module) -> nn.Module | None:
    """The head as it acts now: of a head trained beside an adapter, the copy in use."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head: Any = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and hasattr(head, "original_module"):
        active = [name for name in head.active_adapters if name in copies]
        return copies[active[0]] if active and not head.disable_adapters else head.original_module
    return head


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
