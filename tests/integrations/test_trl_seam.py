"""Our replacement of TRL's `_ChunkedLogProbFunction` against TRL's class: values, gradients, fallbacks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_ext.integrations.trl as ours
from grpo_ext import reference
from grpo_ext.integrations.trl import seam
from grpo_ext.linear.plan import DEFAULT_BUDGET

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'grpo-ext[trl]'; it needs Python 3.11")
    from trl.trainer import utils

OURS = ("log_probs", "entropy")


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    ours.patch()
    yield
    ours.unpatch()


def example(
    rows: int, vocab: int = 301, width: int = 24, bias: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).mul_(0.5).to(dtype).requires_grad_()
    offset = torch.randn(vocab, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, vocab, (rows,), generator=generator)


def call(
    function: Any, tensors: Any, outputs: tuple[str, ...] = OURS, temperature: float = 0.8,
    softcap: float | None = None, scale: float = 1.0,
) -> Any:  # fmt: skip
    return function.apply(*tensors, temperature, 128, softcap, scale, outputs)


def gradients(logps: Tensor, entropy: Tensor | None, leaves: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    total = (logps * torch.randn(logps.shape, generator=generator)).sum()
    if entropy is not None:
        total = total + (entropy * torch.randn(logps.shape, generator=generator)).sum()
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return list(torch.autograd.grad(total, wanted))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (20.0, 0.5, True)])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_equals_trl(
    rows: int, entropy_gradient: bool, softcap: float | None, scale: float, bias: bool, frozen: bool
) -> None:
    tensors = example(rows, bias=bias)
    if frozen:
        for tensor in tensors[1:3]:
            if tensor is not None:
                tensor.requires_grad_(False)
    results = []
    for function in (seam.LogProbabilities.original, utils._ChunkedLogProbFunction):
        logps, entropy, *rest = call(function, tensors, softcap=softcap, scale=scale)
        assert rest == [None, None, None]
        results.append([logps, entropy, *gradients(logps, entropy if entropy_gradient else None, tensors[:3])])
    assert ours.status().served == {"with gradient": 1}
    for stock, mine in zip(*results, strict=True):
        assert mine.dtype == stock.dtype
        torch.testing.assert_close(mine, stock, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mean_logits(bias: bool, autocast: bool) -> None:
    """A metric of KTO's and DPO's: of the logits as they are scored, without a gradient."""
    tensors, outputs = example(37, bias=bias), ("log_probs", "mean_logits")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = call(seam.LogProbabilities.original, tensors, outputs, scale=0.5)
        found = call(utils._ChunkedLogProbFunction, tensors, outputs, scale=0.5)
    assert ours.status().served == {"with gradient": 1}
    assert [output is None for output in found] == [False, True, True, False, True]
    assert not found[3].requires_grad
    # TRL's logits are rounded to bf16 before their mean: 301 roundings of numbers below 8
    torch.testing.assert_close(found[3], wanted[3], rtol=0, atol=2e-3 if autocast else 1e-6)


def test_mean_logits_under_a_softcap_are_handed_back() -> None:
    call(utils._ChunkedLogProbFunction, example(5), ("log_probs", "mean_logits"), softcap=20.0)
    assert ours.status().handed_back == {"TRL needs mean_logits under a softcap": 1}


def test_without_entropy_and_without_gradient() -> None:
    tensors = example(9)
    logps, entropy, *_ = call(utils._ChunkedLogProbFunction, tensors, outputs=("log_probs",))
    assert entropy is None
    with torch.no_grad():
        again, *_ = call(utils._ChunkedLogProbFunction, tensors, outputs=("log_probs",))
    assert not again.requires_grad
    torch.testing.assert_close(again, logps, rtol=1e-6, atol=1e-6)
    assert ours.status().served == {"with gradient": 1, "without gradient": 1}


@pytest.mark.parametrize("case", ["autocast", "bf16", "fp16", "fp32 hidden, bf16 head", "bf16 hidden, fp32 head"])
def test_low_precision_is_no_worse_than_trl(case: str) -> None:
    """At most twice the error of TRL's own class against the fp64 reference on the same inputs."""
    lead, head = {
        "autocast": (torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "fp16": (torch.float16, torch.float16),
        "fp32 hidden, bf16 head": (torch.float32, torch.bfloat16),
        "bf16 hidden, fp32 head": (torch.bfloat16, torch.float32),
    }[case]
    hidden, weight, _, ids = example(64, vocab=1000, width=64)
    hidden, weight = (t.detach().to(d).requires_grad_() for t, d in ((hidden, lead), (weight, head)))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = reference.linear_selective_log_softmax(*exact, ids, temperature=0.8)
    wanted = [truth.detach(), *gradients(truth, None, exact)]
    errors = []
    for function in (seam.LogProbabilities.original, utils._ChunkedLogProbFunction):
        enabled = torch.autocast("cpu", torch.bfloat16) if case == "autocast" else contextlib.nullcontext()
        with enabled:
            logps, *_ = call(function, (hidden, weight, None, ids), outputs=("log_probs",))
        assert logps.dtype == torch.float32
        found = [logps, *gradients(logps, None, (hidden, weight))]
        assert [t.dtype for t in found[1:]] == [lead, head]
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)])
    for stock, mine in zip(*errors, strict=True):
        assert mine <= 2 * stock + 1e-6
    assert sum(ours.status().served.values()) == 1


@pytest.mark.parametrize(
    "outputs", [("log_probs", "entropy", "is_top1"), ("log_sum_sq_probs",), ("is_top1", "mean_logits")]
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, False), (-0.5, True)])
def test_metrics_of_sft_and_dpo(scale: float, bias: bool, frozen: bool, outputs: tuple[str, ...]) -> None:
    hidden, weight, offset, ids = example(60, bias=bias)
    logits = hidden.detach() @ weight.detach().t() + (0 if offset is None else offset.detach())
    ids = torch.where(torch.arange(60) % 2 == 0, (scale * logits).argmax(1), ids)
    tensors = hidden, weight.requires_grad_(not frozen), offset, ids
    stock = call(seam.LogProbabilities.original, tensors, outputs, scale=scale)
    mine = call(utils._ChunkedLogProbFunction, tensors, outputs, scale=scale)
    with torch.no_grad():
        again = call(utils._ChunkedLogProbFunction, tensors, outputs, scale=scale)
    for a, b, c in zip(stock, mine, again, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert a.dtype == b.dtype == c.dtype
            assert a.requires_grad == b.requires_grad
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(c, b, rtol=1e-6, atol=1e-6)
    assert stock[4] is None or 30 <= int(stock[4].sum()) < 40
    assert ours.status().served == {"with gradient": 1, "without gradient": 1}


def test_a_tie_goes_to_the_first_token() -> None:
    """As in TRL and ``argmax``; of whole numbers, which are exact."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randint(-1, 2, (n, 12), generator=g).float() for n in (90, 301))
    logits = hidden @ weight.t()
    last = 300 - logits.flip(1).argmax(1)
    for ids in (logits.argmax(1), last):
        (*_, stock), (*_, mine) = (
            call(function, (hidden, weight, None, ids), ("log_probs", "is_top1"))
            for function in (seam.LogProbabilities.original, utils._ChunkedLogProbFunction)
        )
        assert torch.equal(mine, stock)
    assert not mine.all()
    assert ours.status().served == {"without gradient": 2}


def test_log_sum_sq_probs_under_a_softcap() -> None:
    tensors, outputs = example(20), ("log_probs", "log_sum_sq_probs")
    stock = call(seam.LogProbabilities.original, tensors, outputs, softcap=3.0)
    mine = call(utils._ChunkedLogProbFunction, tensors, outputs, softcap=3.0)
    torch.testing.assert_close(mine[2], stock[2], rtol=1e-5, atol=1e-5)
    assert not ours.status().handed_back


def test_an_output_that_is_not_known_goes_to_trl() -> None:
    call(utils._ChunkedLogProbFunction, example(5), outputs=("log_probs", "is_top5"))
    assert ours.status().handed_back == {"TRL needs is_top5": 1}
    assert not ours.status().served


def test_all_outputs_is_what_trl_computes_unasked() -> None:
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

    assert OPTIONAL_OUTPUTS == seam.ALL_OUTPUTS
    found = utils._ChunkedLogProbFunction.apply(*example(3), 1.0, 128)
    assert all(output is not None for output in found)
    assert ours.status().served == {"with gradient": 1}


def test_float64_goes_to_trl() -> None:
    call(utils._ChunkedLogProbFunction, example(3, dtype=torch.float64))
    assert ours.status().handed_back == {"hidden states of float64": 1}


def test_head_is_gathered_again_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3: the parameter is whole only inside TRL's context, and empty when backward starts."""
    hidden, weight, _, ids = example(500, vocab=1000)
    expected = gradients(call(seam.LogProbabilities.original, (hidden, weight, None, ids))[0], None, (hidden, weight))
    shard = torch.nn.Parameter(weight.detach().clone())
    full, entered = shard.data, []

    @contextlib.contextmanager
    def gathering(*parameters: Any) -> Iterator[None]:
        assert parameters[0] is shard
        entered.append(torch.is_grad_enabled())
        shard.data = full
        yield
        shard.data = full.new_empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathering)
    monkeypatch.setitem(DEFAULT_BUDGET, "cpu", 1 << 20)  # the logits do not fit, so they are made again
    shard.data = full.new_empty(0)
    with utils.maybe_gather_lm_head_ctx(shard, None):
        logps = call(utils._ChunkedLogProbFunction, (hidden, shard, None, ids))[0]
    assert shard.numel() == 0
    before = len(entered)
    total = (logps * torch.randn(logps.shape, generator=torch.Generator().manual_seed(7))).sum()
    found = torch.autograd.grad(total, (hidden, shard))
    assert len(entered) > before
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_frozen_head_is_not_needed_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, ids = example(20)
    weight.requires_grad_(False)
    logps = call(utils._ChunkedLogProbFunction, (hidden, weight, None, ids))[0]

    def not_again(*_: Any) -> Any:
        raise AssertionError("the head was gathered for a backward that does not need it")

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", not_again)
    logps.sum().backward()
    assert hidden.grad is not None


def test_patching_twice_and_back() -> None:
    original = seam.LogProbabilities.original
    call(utils._ChunkedLogProbFunction, example(3))
    ours.patch()
    assert sum(ours.status().served.values()) == 1
    assert utils._ChunkedLogProbFunction is seam.LogProbabilities
    assert seam.LogProbabilities.original is original
    ours.unpatch()
    assert utils._ChunkedLogProbFunction is original
    assert not ours.status().patched
    assert "1 with gradient" in str(ours.status())
    ours.patch()
    assert not ours.status().served


def test_loss_is_patched_and_restored() -> None:
    from trl import GRPOTrainer

    ours.unpatch()
    own = GRPOTrainer._compute_loss
    ours.patch(fuse_loss=True)
    assert ours.status().fuse_loss
    assert GRPOTrainer._compute_loss is not own
    ours.patch()
    assert not ours.status().fuse_loss
    ours.unpatch()
    assert GRPOTrainer._compute_loss is own


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0.dev0"])
def test_other_versions_of_trl_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours.unpatch()
    monkeypatch.setattr("trl.__version__", version)
    with pytest.raises(ImportError, match=rf"TRL {version} is installed: pip install 'trl>=1.15,<1.17'"):
        ours.patch()
    assert not ours.status().patched
