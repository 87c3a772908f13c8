"""The probability route on its plain-torch kernels, where no Hopper GPU is needed: decision, mathematics, edges.

On a Hopper GPU the same tests run its CUDA kernels, in bf16; tests/cuda/test_probability_product.py looks at those.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from linear_cases import FACTORS, batch, build, head, loss_of, run
from loss_cases import pairwise
from test_linear_autograd import test_without_gradients_one_product
from test_linear_matches_reference import compare, skip_fp64_on_gpu, test_linear_selective_log_softmax
from test_linear_options import (
    test_accumulation_into_a_given_buffer,
    test_any_part_may_be_frozen,
    test_autocast_with_master_weights,
    test_gather_hook,
)
from test_linear_rows import (
    test_a_nan_shows_and_stays_in_its_row,
    test_no_rows_at_all,
    test_rows_without_a_gradient_leave_early,
)
from test_linear_schedules import test_every_budget_gives_the_same_gradients
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext._ops import products
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes import probabilities, probabilities_reference, reason_for_logits, select_route
from grpo_ext.linear.routes.probabilities import ProbabilityChunk, ProbabilityRoute, probability_plan

__all__ = [  # issued once more here, on this route
    "test_a_nan_shows_and_stays_in_its_row",
    "test_accumulation_into_a_given_buffer",
    "test_any_part_may_be_frozen",
    "test_autocast_with_master_weights",
    "test_every_budget_gives_the_same_gradients",
    "test_gather_hook",
    "test_linear_selective_log_softmax",
    "test_no_rows_at_all",
    "test_rows_without_a_gradient_leave_early",
    "test_without_gradients_one_product",
]

GRID = pairwise(FACTORS)
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


@pytest.fixture(autouse=True)
def _on_this_route() -> Iterator[None]:
    select_route("probabilities")
    yield
    select_route("auto")


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each chunk that took this route."""
    seen: list[int] = []
    real = ProbabilityRoute.forward

    def forward(self: ProbabilityRoute, start: int, end: int, needed: int) -> ProbabilityChunk:
        seen.append(end - start)
        return real(self, start, end, needed)

    monkeypatch.setattr(ProbabilityRoute, "forward", forward)
    return seen


def half(device: torch.device) -> torch.dtype:
    """What the kernels take on a GPU; on the CPU something exact."""
    return torch.bfloat16 if device.type == "cuda" else torch.float64


def served_here(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) == (9, 0)


OPEN = {
    "compute_dtype": torch.bfloat16,
    "hidden_size": 2048,
    "transform": [1.3, 0.0, 0.7],
    "needs_entropy_gradient": False,
    "aligned": True,
    "built": True,
    "capability": (9, 0),
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"transform": [1.0, 30.0, 1.0]}, "softcap"),
        ({"transform": [-1.0, 0.0, 1.0]}, None),
        ({"transform": [1.0, 0.0, 1e9]}, "scale / temperature"),
        ({"transform": [-1e5, 0.0, 1e-4]}, "scale / temperature"),
        ({"needs_entropy_gradient": True}, "entropy"),
        ({"compute_dtype": torch.float16}, "e.11"),
        ({"compute_dtype": torch.float32}, "for bf16"),
        ({"hidden_size": 2052}, "multiples of 8"),
        ({"aligned": False}, "multiples of 8"),
        ({"built": False}, "architecture 90"),
        ({"capability": (8, 0)}, "9.0"),
        ({"capability": (10, 0)}, "9.0"),
        ({"capability": None}, "9.0"),
    ],
)
def test_who_is_served(change: dict[str, Any], why: str | None) -> None:
    select_route("auto")
    reason = reason_for_logits(**(OPEN | change))
    if why is None:
        assert reason is None
    else:
        assert reason is not None
        assert re.search(why, reason)


def test_routes_by_name(chunks: list[int]) -> None:
    device = torch.device("cpu")
    weight, _ = head(device)
    for name, expected in (("auto", 0), ("logits", 0), ("probabilities", 1)):
        select_route(name)
        loss_of(batch(device), weight)
        assert bool(chunks) == bool(expected)
    with pytest.raises(ValueError, match="route must be one of"):
        select_route("logit")


@pytest.mark.parametrize("route", ["probabilities", "logits"])
@pytest.mark.parametrize("with_advantage", [1, 4])
def test_a_sum_in_planes_has_several_products(with_advantage: int, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks without a gradient are no products: what is left may be one, which nothing would round at last."""
    select_route(route)
    calls: list[tuple[bool, bool]] = []

    def head_gradient(left: Tensor, right: Tensor, upper: Tensor, lower: Tensor, *, first: bool, last: bool) -> None:
        """As the kernel: the words of an fp32 sum in halves, at last the rounded sum."""
        calls.append((first, last))
        total = left.t().float() @ right.float()
        if not first:
            words = (upper.view(torch.int16).int() << 16) | (lower.view(torch.int16).int() & 0xFFFF)
            total = total + words.view(torch.float32)
        words = total.view(torch.int32)
        upper.view(torch.int16).copy_(words >> 16)
        lower.view(torch.int16).copy_(words & 0xFFFF)
        if last:
            upper.copy_(total.bfloat16())

    monkeypatch.setattr(products, "supports", lambda *matrices: len(matrices) == 2)  # the head's gradient alone
    monkeypatch.setattr(products, "head_gradient", head_gradient)
    data = batch(torch.device("cpu"), dtype=torch.bfloat16)
    data["advantages"][with_advantage:] = 0
    weight = head(torch.device("cpu"), torch.bfloat16)[0].requires_grad_()
    # At most 50 tokens of each of 4 completions, 64 rows of 2.2 kB to a chunk: one with a gradient, or all.
    loss_of(data, weight, memory_budget=64 * 2200).loss.backward()
    assert bool(calls) == (with_advantage > 1)
    assert (True, True) not in calls
    exact = weight.detach().double().requires_grad_()
    reference.linear_grpo_loss(
        data["hidden"].double(), exact, data["ids"], data["advantages"].double(), data["mask"], LossConfig()
    ).loss.backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert (weight.grad.double() - exact.grad).norm() <= 0.02 * exact.grad.norm()


@pytest.mark.parametrize("hidden_size", [576, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("vocab", [49_152, 50_257, 151_936, 262_144])
@pytest.mark.parametrize("budget", [0, 512 << 20, 64 << 20])
def test_plan_stays_within_the_budget(hidden_size: int, vocab: int, budget: int) -> None:
    numerics = Numerics([1.0, 0.0, 1.0], torch.bfloat16, torch.bfloat16, budget or None, None)
    plan = probability_plan(vocab, hidden_size, numerics, "cuda")
    assert plan.stride >= vocab
    assert plan.stride % 8 == 0
    assert plan.rows >= numerics.plan(torch.empty(vocab, hidden_size, device="meta")).rows * (1 if budget else 0)
    bytes_used = plan.rows * ((plan.stride + hidden_size) * 2 + 12 * -(-vocab // 256)) + probabilities.PRODUCT_BYTES
    limit = budget or probabilities.DEFAULT_BUDGET
    # As many rows as the logits route has: that may take the product's buffer and the partial sums beyond the budget.
    slack = probabilities.PRODUCT_BYTES + plan.rows * 12 * -(-vocab // 256)
    assert bytes_used <= limit + (slack if budget else 0)
    if not budget and vocab == 151_936 and hidden_size <= 4096:
        assert plan.rows >= 4096
        assert limit <= 1.25 * 2**30


@pytest.mark.parametrize("budget", [0, 32 << 20, 512 << 20])
@pytest.mark.parametrize("hidden_size", [1024, 4096])
def test_plan_without_e_fills_l2_with_hidden_states(hidden_size: int, budget: int) -> None:
    """Log probabilities alone: a budget that holds the hidden states and partial sums does not cut the chunks."""
    numerics = Numerics([1.0, 0.0, 1.0], torch.bfloat16, torch.bfloat16, budget or None, None)
    rows = probability_plan(151_936, hidden_size, numerics, "cuda", needs_products=False).rows
    largest = probabilities.HIDDEN_BYTES // (2 * hidden_size)
    if budget == 32 << 20:
        assert largest // 8 < rows < largest
        assert rows * (2 * hidden_size + 12 * -(-151_936 // 256)) <= budget
    else:
        assert rows == max(largest, probability_plan(151_936, hidden_size, numerics, "cuda").rows)


def test_constants_are_those_of_the_kernels() -> None:
    text = "".join((SOURCES / name).read_text() for name in ("gemm_sm90/products.h", "probability/probability.h"))
    for name, value in (
        ("kGreatestSum", probabilities_reference.GREATEST_SUM),
        ("kLowestExponent", probabilities_reference.LOWEST_EXPONENT),
        ("kNoExponent", probabilities_reference.NO_EXPONENT),
        ("kTileColumns", probabilities_reference.TILE_COLUMNS),
    ):
        found = re.search(rf"constexpr (?:float|int) {name} = (\S+?)f?;", text)
        assert found is not None, name
        assert float(found[1]) == value, name


@pytest.mark.parametrize(("number", "case"), list(enumerate(GRID)))
def test_grid(device: torch.device, chunks: list[int], number: int, case: dict[str, Any]) -> None:
    """The grid of test_linear_matches_reference, on a GPU with a hidden size and a dtype that the kernel takes."""
    if device.type == "cuda":
        case = case | {"dtype": "bf16"}
    skip_fp64_on_gpu(case["dtype"], device)
    if case["dtype"] in ("bf16", "fp16"):
        case = case | {"off_policy": None, "quantile": 1.0, "old": "absent" if case["old"] == "far" else case["old"]}
        case["isw"] = "none" if case["isw"].endswith("mask") else case["isw"]
    data = build(case, device, seed=100 + number, H=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = run(reference.linear_grpo_loss, data, torch.float64)
        same_dtype = None if case["dtype"] == "fp64" else run(reference.linear_grpo_loss, data)
        ours = run(grpo_ext.linear_grpo_loss, data, **data.ours_only)
    compare(ours, same_dtype, truth, data.hidden.dtype)
    softcap = data.config.logit_softcap
    fp16 = data.hidden.dtype == torch.float16 and not (
        device.type == "cpu" and case["logits_dtype"]
    )  # computed in fp32
    assert bool(chunks) == (not softcap and not case["entropy_coef"] and not fp16 and served_here(device))


def test_kernels_get_dense_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed head stays so when its dtype changes, and a bias may be every second number of something."""
    seen: list[Any] = []
    real = probabilities_reference.product

    def product(hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> None:
        seen.append((weight.stride(), bias.stride()))
        real(hidden, weight, bias, *rest)

    monkeypatch.setattr(probabilities_reference, "product", product)
    hidden, weight, bias = torch.randn(5, 16), torch.randn(16, 67).t(), torch.randn(134)[::2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grpo_ext.linear_selective_log_softmax(hidden, weight, torch.arange(5), bias=bias)
    assert seen == [((16, 1), (1,))]


def confident(device: torch.device, dtype: torch.dtype, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, ids: each row's target has a probability above .99 (spread 1), or any (0; logits of +-3)."""
    N, V, H = 64, 515, 64
    weight = torch.randn(V, H, dtype=torch.float64)
    ids = torch.randint(0, V, (N,))
    own = weight[ids] / weight[ids].square().sum(1, keepdim=True)
    hidden = torch.randn(N, H, dtype=torch.float64) * (0.2 if spread else 0.4)
    hidden += spread * torch.linspace(20, 30, N)[:, None] * own
    return hidden.to(device, dtype), weight.to(device, dtype), ids.to(device)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_gradients_are_closer_than_those_of_rounded_logits(device: torch.device, trained: bool, spread: float) -> None:
    """bf16 against fp64, row by row; confident targets (p > .99) are where rounded logits lose most."""
    if not served_here(device):
        pytest.skip("needs a Hopper GPU")
    hidden, weight, ids = confident(device, torch.bfloat16, spread)
    upstream = torch.rand(ids.shape[0], dtype=torch.float64).to(device) + 0.5

    def gradients(route: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        select_route(route)
        leaves = [hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_(trained)]
        module: Any = reference if dtype == torch.float64 else grpo_ext
        logps = module.linear_selective_log_softmax(leaves[0], leaves[1], ids)
        logps.backward(upstream.to(logps.dtype))
        return logps.detach().double(), [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    exact, truth = gradients("auto", torch.float64)
    if spread:
        assert exact.exp().min() > 0.99
    ours, rounded = gradients("probabilities", torch.bfloat16), gradients("logits", torch.bfloat16)
    assert (ours[0] - exact).abs().max() <= 1e-5
    for mine, theirs, right in zip(ours[1], rounded[1], truth, strict=True):
        norm = right.norm(dim=1).clamp(min=right.norm() * 1e-6)
        error, error_of_rounded = ((g - right).norm(dim=1) / norm for g in (mine, theirs))
        used = right.norm(dim=1) > right.norm() * 1e-4
        assert error[used].median() <= error_of_rounded[used].median()
        assert error[used].max() <= 1.05 * error_of_rounded[used].max()
        assert error[used].max() <= 0.02
    assert (1 - ours[0].exp() - (1 - exact.exp())).abs().max() <= 1e-6


@pytest.mark.parametrize("trained", [False, True])
def test_tokens_switched_off(device: torch.device, trained: bool) -> None:
    """A bias of -inf: probability 0, also where it is the target."""
    kind = half(device)
    V, H = 301, 16
    hidden, weight = torch.randn(2, 9, H).to(device, kind), torch.randn(V, H).to(device, kind)
    bias = torch.randn(V).to(device, kind)
    bias[::3] = -math.inf
    ids = torch.randint(0, V // 3, (2, 9), device=device) * 3 + 1
    ids[1, 4] = 0  # switched off
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4] = False
    results = []
    for module, lift in ((grpo_ext, kind), (reference, torch.float64)):
        leaves = [t.to(lift).clone().requires_grad_(trained or i == 0) for i, t in enumerate((hidden, weight))]
        logp, entropy = module.linear_selective_log_softmax(*leaves, ids, bias=bias.to(lift), return_entropy=True)
        torch.where(mask, logp, 0.0).sum().backward()
        results.append([logp.detach(), entropy.detach()] + [leaf.grad for leaf in leaves if leaf.grad is not None])
    assert results[0][0][1, 4] == -math.inf
    for ours, theirs in zip(*results, strict=True):
        assert not ours.isnan().any()
        tight = 1e-9 if kind == torch.float64 else 2e-2
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite].double(), theirs[finite].double(), rtol=tight, atol=tight)


# 1: certainty; 7: less than a vector; 255 to 257: around a tile; 1001: odd, so rows of E are padded
@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 1001])
def test_vocabularies(device: torch.device, vocab: int) -> None:
    kind = half(device)
    hidden, weight = torch.randn(33, 16).to(device, kind), torch.randn(vocab, 16).to(device, kind)
    ids = torch.randint(0, vocab, (33,), device=device)
    results = []
    for module, lift in ((grpo_ext, kind), (reference, torch.float64)):
        leaves = [t.to(lift).clone().requires_grad_() for t in (hidden, weight)]
        logp = module.linear_selective_log_softmax(*leaves, ids)
        logp.sum().backward()
        results.append([logp.detach()] + [leaf.grad for leaf in leaves])
    tight = 1e-9 if kind == torch.float64 else 3e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tight, atol=tight)
    if vocab == 1:
        assert not results[0][0].any()


def test_without_a_gradient_nothing_is_stored(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if not served_here(device):
        pytest.skip("needs a Hopper GPU")
    stored: list[int] = []
    real = ProbabilityRoute._probabilities
    monkeypatch.setattr(ProbabilityRoute, "_probabilities", lambda self, n: (stored.append(n), real(self, n))[1])
    weight, _ = head(device, torch.bfloat16)
    data = batch(device, dtype=torch.bfloat16)
    with torch.no_grad():
        loss_of(data, weight)
        grpo_ext.linear_selective_log_softmax(data["hidden"], weight, data["ids"])
    assert stored
    assert not any(stored)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
def test_a_frozen_head_costs_two_products_for_every_loss(
    device: torch.device, products: dict[str, int], level: Any, loss_type: Any
) -> None:
    weight, _ = head(device, torch.bfloat16)
    data = batch(device, dtype=torch.bfloat16)
    data["hidden"].requires_grad_()
    config = LossConfig(loss_type=loss_type, importance_sampling_level="token" if loss_type == "vespo" else level)
    old = torch.full((4, 50), -7.0, device=device)
    loss_of(data, weight, config, old_logps=old).loss.backward()
    rows = int(data["mask"].sum())
    assert products == {"logits": rows, "back": rows}


def _rank(rank: int, world: int, path: str, kind: str) -> None:
    select_route("probabilities")
    parallel_worker.H = 16
    parallel_worker.main(rank, world, path, kind, improbable=True)


@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_ranks_share_the_vocabulary(kind: str, tmp_path: Path) -> None:
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    mp.spawn(_rank, args=(2, str(tmp_path / "rendezvous"), kind), nprocs=2)
