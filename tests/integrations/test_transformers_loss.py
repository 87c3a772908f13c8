"""`causal_lm_loss` against the loss of transformers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from grpo_ext.integrations.transformers import causal_lm_loss

V = 61


def example(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 9)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = (3 * torch.randn(*shape, V, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", ["plain", "number", "tensor", "ignore_index", "shift_labels", "flat"])
def test_equals_transformers(options: str, inplace: bool, dtype: torch.dtype) -> None:
    logits, labels = example(dtype, (27,) if options == "flat" else (3, 9))
    arguments: dict[str, Any] = {"labels": labels, "vocab_size": V}
    if options == "number":
        arguments["num_items_in_batch"] = 17
    elif options == "tensor":
        arguments["num_items_in_batch"] = torch.tensor(17)
    elif options == "ignore_index":
        arguments |= {"ignore_index": 0, "labels": labels.clamp(min=0)}
    elif options == "shift_labels":
        arguments |= {"labels": None, "shift_labels": labels}
    wanted = ForCausalLMLoss(logits, **arguments)
    (gradient,) = torch.autograd.grad(wanted, logits)
    found = causal_lm_loss(logits * 1, **arguments, inplace=inplace, some_keyword_of_a_model=True)
    (mine,) = torch.autograd.grad(found, logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine, gradient, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.3, **sizes))


@pytest.mark.parametrize("items", [None, torch.tensor(40)], ids=["mean", "items"])
def test_in_a_model(items: Tensor | None) -> None:
    _, labels = example()
    ids = labels.clamp(min=0)
    stock, mine = model(), model()
    mine.loss_function = causal_lm_loss
    losses = []
    for network in (stock, mine):
        loss = network(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(stock.parameters(), mine.parameters(), strict=True):
        assert (b.grad - a.grad).norm() <= 1e-5 * a.grad.norm()


def test_output_keeps_its_logits_until_backward_or_for_good() -> None:
    ids = example()[1].clamp(min=0)
    for inplace in (True, False):
        network = model()
        network.loss_function = functools.partial(causal_lm_loss, inplace=inplace)
        output = network(input_ids=ids, labels=ids)
        logits = network(input_ids=ids).logits
        assert torch.equal(output.logits, logits)
        output.loss.backward()
        assert torch.equal(output.logits, logits) is not inplace


def test_nothing_counts() -> None:
    logits, labels = example()
    loss = causal_lm_loss(logits, torch.full_like(labels, -100), V)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_errors_name_argument_and_remedy() -> None:
    logits, labels = example()
    with pytest.raises(ValueError, match="do not end in vocab_size=60"):
        causal_lm_loss(logits, labels, 60)
    with pytest.raises(ValueError, match="labels must have the leading shape"):
        causal_lm_loss(logits, labels[:, :-1], V)
    with pytest.raises(ValueError, match="one label per row"):
        causal_lm_loss(logits, None, V, shift_labels=labels[:, :-1])
    with pytest.raises(ValueError, match="pass labels"):
        causal_lm_loss(logits, None, V)
    with pytest.raises(IndexError, match=str(V)):
        causal_lm_loss(logits, torch.full_like(labels, V), V)
