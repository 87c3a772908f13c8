"""Small models for the tests of layers whose forward is replaced, and what is compared of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import build_model

from grpo_ext.modules.lora import FusedLora

BF16 = torch.bfloat16


class Net(nn.Module):
    """One linear layer, of 24 features to 20."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 20, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def net(*, bias: bool = False, weights: torch.dtype = torch.float32, autocast_adapter: bool = True, **lora: Any) -> Any:
    """With an adapter that does something."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["linear"], "init_lora_weights": False, **lora}
    model = get_peft_model(Net(bias).to(weights), LoraConfig(**options), autocast_adapter_dtype=autocast_adapter)
    return model.train()


def layer_of(model: Any) -> Any:
    return model.base_model.model.linear


def values(model: Any, x: Tensor, amp: bool = False) -> dict[str, Tensor]:
    """Output and gradients of a call, by the names of the parameters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=amp):
        y = model(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads} | ({} if x.grad is None else {"x": x.grad})


def both(model: Any, x: Tensor, amp: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """PEFT's and the fused layer's, and what served the second."""
    fused = FusedLora(model)
    want = values(model, x, amp)
    with fused.attached():
        got = values(model, x, amp)
        return want, got, fused.describe()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


INPUTS = {
    "vector": torch.randn(24, generator=torch.Generator().manual_seed(1)),
    "rows": torch.randn(5, 24, generator=torch.Generator().manual_seed(2)),
    "batch": torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3)),
    "strided": torch.randn(24, 3, 2, generator=torch.Generator().manual_seed(4)).permute(2, 1, 0),
    "no rows": torch.zeros(2, 0, 24),
}


class Kernels(TorchDispatchMode):
    """Counts what a device would be asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name != "aten::detach":
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def adapted(seed: int = 3, **lora: Any) -> Any:
    model = build_model()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **lora)).train()


def gradients(model: Any, call: Any = None) -> dict[str, Tensor]:
    ids = torch.arange(2, 14).view(2, 6)
    model.zero_grad()
    logits = (model if call is None else call)(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
    grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}


@contextmanager
def switched(model: Any, on: bool) -> Iterator[FusedLora]:
    fused = FusedLora(model, None if on else False)
    with fused.attached():
        yield fused
