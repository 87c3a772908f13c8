"""CUDA kernels on GPU-only cases: real vocabularies, huge batches, CUDA graphs, streams.

tests/losses runs on both devices and covers the values of the kernels in general.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_ext
from grpo_ext import _C, _ops, reference
from grpo_ext.config import LossConfig
from grpo_ext.output import GRPOLossOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONFIG = LossConfig(epsilon_high=0.28)
#: One rounding of the result to its own dtype, and for fp32 that of the exponent: |log2 p| is below 64.
GRADIENT_ERROR = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 2e-5}


@pytest.fixture
def route() -> Iterator[Callable[[str], None]]:
    def select(name: str) -> None:
        assert _C.select_cuda_route(name)

    yield select
    select("auto")


def inputs(B: int, T: int, V: int, dtype: torch.dtype, masked: float = 0.25) -> tuple[Tensor, dict[str, Any]]:
    logits = (torch.randn(B, T, V, device="cuda") * 3).to(dtype)
    ids = torch.randint(0, V, (B, T), device="cuda")
    logps = grpo_ext.selective_log_softmax(logits, ids)
    return logits, {
        "completion_ids": ids,
        "advantages": torch.randn(B, device="cuda"),
        "completion_mask": torch.rand(B, T, device="cuda") >= masked,
        "old_logps": logps + 0.2 * torch.randn_like(logps),
    }


def forward_backward(
    logits: Tensor, arguments: dict[str, Any], config: LossConfig = CONFIG, inplace: bool = False, **more: Any
) -> tuple[GRPOLossOutput, Tensor]:
    leaf = logits.clone().requires_grad_()
    out = grpo_ext.grpo_loss(leaf * 1.0, config=config, inplace=inplace, **arguments, **more)
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad


# 1: no gradient; 7: less than a vector; 1000 and 32000: one CTA and two; 50257, 151669: odd, every row starts elsewhere
# between two 16-byte blocks; 128256, 151936: Llama 3 and Qwen; 262144: Gemma, clusters of 16
@pytest.mark.parametrize("vocab", [1, 7, 1000, 32000, 50257, 128256, 151669, 151936, 262144])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("path", ["auto", "streaming"])
def test_against_fp64(vocab: int, dtype: str, path: str, route: Callable[[str], None]) -> None:
    logits, arguments = inputs(2, 70, vocab, DTYPES[dtype])  # several rows for every cluster
    ours, truth = {}, {}
    route(path)
    for inplace in (False, True):
        ours[inplace] = forward_backward(logits, arguments, inplace=inplace)
    leaf = logits.double().requires_grad_()
    truth = reference.grpo_loss(leaf, config=CONFIG, **arguments)
    truth.loss.backward()
    assert leaf.grad is not None
    for out, grad in ours.values():
        torch.testing.assert_close(out.logps.double(), truth.logps, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out.entropy.double(), truth.entropy, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(out.loss.double(), truth.loss.detach(), rtol=1e-5, atol=1e-6)
        if vocab > 1:
            error = (grad.double() - leaf.grad).abs().max() / leaf.grad.abs().max()
            assert error.item() <= GRADIENT_ERROR[dtype]
        assert not grad[~arguments["completion_mask"]].any()
    assert torch.equal(ours[False][1], ours[True][1])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("vocab", [7, 1001, 50257, 151936])
def test_both_routes_give_the_same_log_probabilities(vocab: int, dtype: str, route: Callable[[str], None]) -> None:
    logits, arguments = inputs(2, 20, vocab, DTYPES[dtype])
    results = []
    for path in ("auto", "streaming"):
        route(path)
        results.append(forward_backward(logits, arguments)[0])
    assert torch.equal(results[0].logps, results[1].logps)
    assert torch.equal(results[0].entropy, results[1].entropy)
    torch.testing.assert_close(results[0].loss, results[1].loss)


def test_three_long_sequences() -> None:
    """3 x 65,536 positions: more than a grid's second dimension could count."""
    logits, arguments = inputs(3, 65_536, 1000, torch.bfloat16)
    for config in (CONFIG, LossConfig(loss_type="grpo", importance_sampling_level="sequence")):
        out, grad = forward_backward(logits, arguments, config)
        leaf = logits.float().requires_grad_()
        truth = reference.grpo_loss(leaf, config=config, **arguments)
        truth.loss.backward()
        assert leaf.grad is not None
        torch.testing.assert_close(out.logps, truth.logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.loss, truth.loss.detach(), rtol=1e-4, atol=1e-5)
        error = (grad.float() - leaf.grad).abs().max() / leaf.grad.abs().max()
        assert error.item() <= 2**-7
        for name, value in out.metrics.items():
            assert value.item() == pytest.approx(truth.metrics[name].item(), rel=2e-3, abs=1e-4), name


def test_offsets_beyond_two_to_the_thirty_first() -> None:
    """N V = 2.4e9 elements: the last rows equal the same rows alone."""
    T, V = 16_000, 151_669
    logits = torch.empty(1, T, V, device="cuda", dtype=torch.bfloat16)
    for t in range(0, T, 1000):
        logits[:, t : t + 1000].normal_(0, 3)
    assert logits.numel() > 2**31
    ids = torch.randint(0, V, (1, T), device="cuda")
    mask, advantages = torch.ones(1, T, device="cuda", dtype=torch.bool), torch.ones(1, device="cuda")
    spec = _ops.loss_spec(LossConfig(loss_type="luspo"), 1.0)
    rest = (advantages, None, None, None, None, None, None, spec, _ops.logit_transform(1.0, None, 1.0))
    kernels = torch.ops.grpo_ext
    _, expected, *_, expected_grad = kernels.row_loss(
        logits[:, -40:].clone(), ids[:, -40:].contiguous(), mask[:, -40:].contiguous(), *rest, True
    )
    assert torch.equal(kernels.row_stats(logits, ids, None, rest[-1], False)[0][:, -40:], expected)
    _, logps, *_ = kernels.row_loss_(logits, ids, mask, *rest)
    assert torch.equal(logps[:, -40:], expected)
    assert torch.equal(logits[:, -40:], expected_grad)  # the gradient lies where the logits were


def test_a_wrong_id_is_nan_and_counted() -> None:
    """Ids are not looked at on the host: the row shows as NaN, the others are as usual."""
    logits, arguments = inputs(2, 6, 1001, torch.bfloat16, masked=0.0)
    expected, expected_grad = forward_backward(logits, arguments)
    for bad in (-1, 1001, 2**40):
        arguments["completion_ids"][1, 2] = bad
        out, grad = forward_backward(logits, arguments)
        assert out.loss.isnan()
        assert out.logps[1, 2].isnan()
        assert grad[1, 2].isnan().all()
        assert out.metrics["nonfinite_tokens"] == 1
        keep = torch.ones(2, 6, dtype=torch.bool)
        keep[1, 2] = False
        assert torch.equal(out.logps[keep], expected.logps[keep])
        assert torch.equal(grad[keep], expected_grad[keep])
    arguments["completion_mask"][1, 2] = False
    assert forward_backward(logits, arguments)[0].loss.isfinite()


@pytest.mark.parametrize("config", [CONFIG, LossConfig(loss_type="vespo", top_entropy_quantile=0.5)])
def test_no_synchronisation_and_graph_replay(config: LossConfig) -> None:
    logits, arguments = inputs(2, 40, 32_000, torch.bfloat16)
    buffer = logits.clone()
    static = {k: v.clone() for k, v in arguments.items()}

    def step() -> tuple[Tensor, Tensor]:
        leaf = buffer.detach().requires_grad_()
        out = grpo_ext.grpo_loss(leaf, config=config, num_items_in_batch=50, **static)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        return out.loss.detach(), grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    other, other_arguments = inputs(2, 40, 32_000, torch.bfloat16)
    for values, new in ((logits, arguments), (other, other_arguments), (logits, arguments)):
        buffer.copy_(values)
        for name, tensor in static.items():
            tensor.copy_(new[name])
        graph.replay()
        replayed = loss.clone(), grad.clone()
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_two_streams_at_once() -> None:
    cases = [inputs(2, 100, vocab, torch.bfloat16) for vocab in (50_257, 151_936)]
    expected = [forward_backward(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(forward_backward(*case))
        torch.cuda.synchronize()
        for (out, grad), (same, same_grad) in zip(results, expected, strict=True):
            assert torch.equal(out.loss, same.loss)
            assert torch.equal(grad, same_grad)


# (sequences, tokens of each): one row; few; the most with constants in a CTA; one more; sequences that begin anywhere
# in the mask's 16-byte blocks; more pieces of the mask than warps
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (64, 3), (65, 3), (5, 1027), (1, 20_000)])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_one_launch_equals_the_kernel_for_constants(
    shape: tuple[int, int], loss_type: str, route: Callable[[str], None]
) -> None:
    config = LossConfig(loss_type=loss_type, max_completion_length=shape[1], epsilon_high=0.28)
    logits, arguments = inputs(*shape, 1001, torch.bfloat16)
    weights = torch.rand(shape[0], device="cuda")
    masks = [arguments["completion_mask"], torch.zeros_like(arguments["completion_mask"])]
    masks[0][0, 0] = True
    for mask in masks:
        arguments["completion_mask"] = mask
        for num_items in (None, 50):
            more = {"num_items_in_batch": num_items, "importance_weights": weights}
            results = []
            for path in ("auto", "constants_kernel", "auto"):
                route(path)
                results.append(forward_backward(logits, arguments, config, **more))
            for out, grad in results[1:]:
                assert torch.equal(out.loss, results[0][0].loss)
                assert torch.equal(out.metrics.packed, results[0][0].metrics.packed)
                assert torch.equal(grad, results[0][1])
            assert results[0][0].metrics["tokens"] == mask.sum()
            assert results[0][0].loss.isfinite()


def test_one_launch_is_one_kernel() -> None:
    logits, arguments = inputs(2, 20, 1001, torch.bfloat16)
    rest = (arguments["completion_mask"], arguments["advantages"], arguments["old_logps"], *[None] * 5)
    spec, transform = _ops.loss_spec(CONFIG, 1.0), _ops.logit_transform(1.0, None, 1.0)
    torch.ops.grpo_ext.row_loss_(logits, arguments["completion_ids"], *rest, spec, transform)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        torch.ops.grpo_ext.row_loss_(logits, arguments["completion_ids"], *rest, spec, transform)
    count = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)) == 0
    assert count.value == 1


def test_the_same_call_on_many_streams_and_in_graphs_at_once() -> None:
    """Each has a counter of its own for who reports last, and every call leaves it as it was."""
    logits, arguments = inputs(4, 300, 1001, torch.bfloat16)
    expected, expected_grad = forward_backward(logits, arguments)
    streams = [torch.cuda.Stream() for _ in range(4)]
    graphs, captured = [], []
    for _ in range(2):
        buffer = logits.clone()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            leaf = buffer.detach().requires_grad_()
            out = grpo_ext.grpo_loss(leaf, config=CONFIG, **arguments)
            captured.append((out, torch.autograd.grad(out.loss, leaf)[0]))
    torch.cuda.synchronize()
    for _ in range(5):
        results = list(captured)
        for stream, graph in zip(streams, [*graphs, None, None], strict=True):
            with torch.cuda.stream(stream):
                if graph is not None:
                    graph.replay()
                    graph.replay()
                else:
                    results += [forward_backward(logits, arguments) for _ in range(2)]
        torch.cuda.synchronize()
        assert len(results) == 6
        for out, grad in results:
            assert torch.equal(out.loss, expected.loss)
            assert torch.equal(out.metrics.packed, expected.metrics.packed)
            assert torch.equal(grad, expected_grad)
            out.loss.detach().fill_(torch.nan)


def test_backward_with_gradient_one_leaves_the_gradient_alone() -> None:
    """Reading it would show: the memory is poisoned between forward and backward."""
    logits, arguments = inputs(2, 6, 1000, torch.bfloat16)
    produced: list[Tensor] = []

    class Producer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, anchor: Tensor) -> Tensor:
            produced.append(logits.clone())
            return produced[0].view_as(produced[0])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            produced.append(grad)
            return grad.new_zeros((), dtype=torch.float32)

    anchor = torch.zeros((), device="cuda", requires_grad=True)
    loss = grpo_ext.grpo_loss(Producer.apply(anchor), config=CONFIG, inplace=True, **arguments).loss
    produced[0].fill_(2.0)
    loss.backward(retain_graph=False)
    assert (produced[1] == 2.0).all()


def test_on_the_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    logits, arguments = inputs(2, 6, 1000, torch.bfloat16)
    expected, expected_grad = forward_backward(logits, arguments)
    there = {k: v.to("cuda:1") for k, v in arguments.items()}
    out, grad = forward_backward(logits.to("cuda:1"), there)
    assert torch.equal(out.loss.to("cuda:0"), expected.loss)
    assert torch.equal(grad.to("cuda:0"), expected_grad)
