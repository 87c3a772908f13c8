"""The probability product and its helper kernels on a Hopper GPU, against plain torch at full size.

tests/linear/test_linear_probabilities.py runs on both devices and covers the values of the route in general.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_ext
from grpo_ext import _C, reference
from grpo_ext._checks import PolicyTensors, policy_tensors
from grpo_ext._ops import probability as kernels
from grpo_ext._ops.probability import TILE_COLUMNS, ChunkRows
from grpo_ext._ops.spec import loss_spec
from grpo_ext.config import LossConfig
from grpo_ext.linear.routes import probabilities_reference as twins
from grpo_ext.linear.routes import select_route
from grpo_ext.linear.routes.probabilities import ProbabilityRoute


def _hopper() -> bool:
    return _C.CUDA_HOPPER_PRODUCTS and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU and a build for it"),
]
LN2 = math.log(2)


@pytest.fixture(autouse=True)
def _automatic_route() -> Iterator[None]:
    yield
    select_route("auto")


class Case:
    """Inputs and NaN-poisoned outputs of one chunk."""

    def __init__(
        self, rows: int, vocab: int, size: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False
    ) -> None:
        self.hidden = torch.randn(rows, size, device="cuda").to(dtype)
        self.weight = (torch.randn(vocab, size, device="cuda") * 2 / math.sqrt(size)).to(dtype)
        self.bias = torch.randn(vocab, device="cuda") if bias else None
        if self.bias is not None and vocab > 2:
            self.bias[1::5] = -math.inf
        self.ids = torch.randint(0, vocab, (rows,), device="cuda")
        self.chunk = ChunkRows(rows, 0, None, None)
        self.slope = 1.3
        self.tiles = -(-vocab // TILE_COLUMNS)
        self.stride = -(-vocab // 64) * 64

    def outputs(self) -> dict[str, Tensor]:
        rows = self.chunk.count
        nan = {"device": "cuda", "fill_value": math.nan}
        return {
            "reference": torch.full((rows,), **nan),
            "target": torch.full((rows,), -7, dtype=torch.int32, device="cuda"),
            "exponent": torch.full((rows,), **nan),
            "E": torch.full((rows + 1, self.stride), dtype=self.hidden.dtype, **nan),
            "partials": torch.full((self.tiles, rows, 2), **nan),
            "recentred": torch.full((self.tiles, rows), **nan),
            "logps": torch.full((rows,), **nan),
            "entropy": torch.full((rows,), **nan),
            "factor": torch.full((rows,), **nan),
            "residual": torch.full((rows,), **nan),
        }

    def run(self, module: Any, store: bool = True, fold: bool = True) -> dict[str, Tensor]:
        out = self.outputs()
        E = out["E"][: self.chunk.count, : self.weight.shape[0]] if store else None
        module.target_reference(
            self.chunk, self.hidden, None, self.weight, self.bias, self.ids, self.slope, None, out["reference"],
            out["target"], out["exponent"],
        )  # fmt: skip
        module.product(
            self.hidden, self.weight, self.bias, out["reference"], out["target"], self.slope, E, out["partials"],
            out["recentred"], out["exponent"],
        )  # fmt: skip
        if fold:
            module.fold(
                self.chunk, out["partials"], out["recentred"], out["reference"], out["exponent"], out["target"],
                self.slope, None, out["logps"], out["entropy"], out["factor"], out["residual"], E, self.hidden.dtype,
                None,
            )  # fmt: skip
        return out


# rows around a tile and its half; vocabularies around a tile of 256 and at real sizes, odd ones padded; H below, at,
# between and above steps of 64
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab", "size"),
    [
        (1, 1, 8), (3, 7, 64), (64, 255, 72), (65, 256, 64), (127, 257, 136), (128, 512, 64), (129, 1001, 1024),
        (300, 50_257, 256), (257, 151_936, 128), (130, 151_669, 64), (1025, 3000, 576),
    ],
)  # fmt: skip
def test_kernels_against_their_twins(rows: int, vocab: int, size: int, bias: bool) -> None:
    case = Case(rows, vocab, size, bias=bias)
    if case.bias is not None:
        case.bias[case.ids] = case.bias[case.ids].nan_to_num(neginf=0.5)
    for fold in (False, True):
        ours, theirs = case.run(kernels, fold=fold), case.run(twins, fold=fold)
        assert torch.equal(ours["target"], theirs["target"])
        torch.testing.assert_close(ours["reference"], theirs["reference"], rtol=1e-5, atol=1e-5)
        # Tensor cores cut their sums off: twice what torch's product of the same operands is off by, to base 2.
        wide = case.hidden.double() @ case.weight.double().t()
        off = (torch.mm(case.hidden, case.weight.t(), out_dtype=torch.float32).double() - wide).abs().max()
        limit = 1e-5 + 2 * float(off) * case.slope / LN2
        torch.testing.assert_close(ours["exponent"], theirs["exponent"], rtol=1e-5, atol=limit)
        # Each element within a rounding of bf16 and that of the exponent.
        torch.testing.assert_close(
            ours["E"][:rows, :vocab].float(), theirs["E"][:rows, :vocab].float(), rtol=2**-7 + 2**-14, atol=1e-30,
            equal_nan=True,
        )  # fmt: skip
        torch.testing.assert_close(ours["partials"], theirs["partials"], rtol=2e-4, atol=2e-3 if bias else 1e-3)
        for name in ("logps", "entropy", "factor"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-5, equal_nan=True)
    # What lies below E stays untouched, and what lies beside it but for the 16 bytes that the copy engine fills up.
    assert ours["E"][rows].isnan().all()
    assert ours["E"][:, -(-vocab // 8) * 8 :].isnan().all()


def test_no_bit_depends_on_storing_or_company() -> None:
    """The same sums with and without E, for any neighbours and number of rows."""
    case = Case(300, 50_257, 256)
    expected = case.run(kernels)
    for store in (False, True):
        again = case.run(kernels, store)
        for name in ("partials", "exponent", "logps", "entropy", "factor"):
            assert torch.equal(again[name], expected[name]), (name, store)
        if store:
            assert torch.equal(again["E"][:300, :50_257], expected["E"][:300, :50_257])
    hidden, ids = case.hidden, case.ids
    for start, end in ((0, 1), (7, 8), (130, 131), (100, 300), (1, 299)):
        part = Case(end - start, 50_257, 256)
        part.weight, part.hidden, part.ids = case.weight, hidden[start:end].contiguous(), ids[start:end].contiguous()
        for store in (False, True):
            out = part.run(kernels, store=store)
            for name in ("logps", "entropy", "factor"):
                assert torch.equal(out[name], expected[name][start:end]), (name, start, end)


def make_improbable(case: Case, rows: Tensor) -> None:
    """Tokens 0 to 1e4 below the other logits: by -1 of the last dimension but one, or +1 of token 0 in the last."""
    depths = torch.tensor([0.0, 60.0, 69.0, 90.0, 225.0, 1e4], device="cuda", dtype=case.hidden.dtype)
    case.weight[:, -2:] = 0
    case.hidden[:, -2:] = 0
    case.ids.clamp_(min=1)
    case.weight[case.ids[rows], -2] = -1
    case.weight[0, -1] = 1
    case.hidden[rows, -2 + rows // 2 % 2] = depths[rows % 6]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab", "size"), [(1, 3, 8), (65, 256, 64), (129, 1001, 1024), (300, 50_257, 256), (257, 151_936, 128)]
)
def test_recentred_rows_against_their_twins(rows: int, vocab: int, size: int, bias: bool) -> None:
    """Kernel and twin recentre equal tiles and agree with fp64; a neighbour's recentring changes no bit of a row."""
    case = Case(rows, vocab, size, bias=bias)
    chosen = torch.arange(rows, device="cuda")
    chosen = chosen[chosen % 4 != 1]
    make_improbable(case, chosen)
    if case.bias is not None:
        case.bias[case.ids], case.bias[0] = 0.5, 0.0
    others = torch.arange(1, rows, 4, device="cuda")
    logits = case.hidden.double() @ case.weight.double().t() + (0 if case.bias is None else case.bias.double())
    exact = torch.log_softmax(logits * case.slope, dim=1)
    logps = exact.gather(1, case.ids.unsqueeze(1)).squeeze(1)
    for store in (False, True):
        ours, theirs = (case.run(module, store) for module in (kernels, twins))
        moved = ours["partials"][..., 0] < 0
        assert torch.equal(moved, theirs["partials"][..., 0] < 0)
        assert moved.any() or rows == 1
        assert not moved[:, others].any()
        torch.testing.assert_close(ours["recentred"][moved], theirs["recentred"][moved], rtol=1e-5, atol=1.0)
        assert ((ours["logps"].double() - logps).abs() <= 2e-5 + 1e-6 * logps.abs()).all()
        torch.testing.assert_close(ours["entropy"], theirs["entropy"], rtol=2e-4, atol=2e-4)
    # The derivative by the logits is factor E, whatever E is relative to.
    right = case.slope * ((torch.arange(vocab, device="cuda") == case.ids.unsqueeze(1)).double() - exact.exp())
    left = ours["factor"].double().unsqueeze(1) * ours["E"][:rows, :vocab].double()
    torch.testing.assert_close(left, right, rtol=2**-6, atol=1e-6)
    case.hidden[chosen, -2:] = 0
    alike = case.run(kernels)
    for name in ("logps", "entropy", "factor"):
        assert torch.equal(alike[name][others], ours[name][others])
    assert torch.equal(alike["E"][others, :vocab], ours["E"][others, :vocab])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", [8, 64, 1032, 4096])
def test_scaling_against_its_twin(size: int, wide: bool) -> None:
    rows, vocab = 133, 1001
    weight = torch.randn(vocab, size, device="cuda").bfloat16()
    product = torch.randn(rows, size, device="cuda")
    factor, residual = torch.randn(2, rows, device="cuda").unbind()
    target = torch.randint(-1, vocab, (rows,), device="cuda", dtype=torch.int32)
    target[::7] = -1
    index = torch.randperm(200, device="cuda")[:rows]
    for chunk in (ChunkRows(rows, 40, None, None), ChunkRows(rows, 0, index, None)):
        for extra in ((residual, target), (None, None)):
            results = []
            for module in (kernels, twins):
                out = torch.full((200, size), 7.0, device="cuda", dtype=torch.float32 if wide else torch.bfloat16)
                module.scale(chunk, product, factor, *extra, weight, out)
                results.append(out)
            tight = 1e-5 if wide else 2**-7
            torch.testing.assert_close(results[0], results[1], rtol=tight, atol=1e-5)
            assert (results[0] == 7.0).all(dim=1).sum() == 200 - rows


@pytest.mark.parametrize("size", [8, 1032])
def test_scaled_hidden_against_its_twin(size: int) -> None:
    hidden = torch.randn(133, size + 8, device="cuda").bfloat16()[:, :size]
    factor = torch.randn(133, device="cuda")
    results = [torch.full((134, size), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for module, out in zip((kernels, twins), results, strict=True):
        module.scaled_hidden(hidden, factor, out[:133])
    assert torch.equal(*results)


def test_a_nan_and_a_wrong_id_stay_in_their_rows() -> None:
    case = Case(200, 1001, 64)
    expected = case.run(kernels)
    case.hidden[3, 5] = math.nan
    case.ids[150], case.ids[151], case.ids[199] = -1, 1001, 2**40
    out = case.run(kernels)
    bad = torch.zeros(200, dtype=torch.bool, device="cuda")
    bad[[3, 150, 151, 199]] = True
    for name in ("logps", "entropy", "factor"):
        assert torch.equal(out[name].isnan(), bad)
        assert torch.equal(out[name][~bad], expected[name][~bad])


def test_masked_and_indexed_rows() -> None:
    case = Case(200, 1001, 64)
    mask = torch.rand(300, device="cuda") > 0.4
    index = torch.randperm(300, device="cuda")[:200]
    case.ids = torch.randint(0, 1001, (300,), device="cuda")
    case.ids[~mask] = -100
    case.chunk = ChunkRows(200, 0, index, mask)
    results = []
    for module in (kernels, twins):
        out = case.outputs()
        E = out["E"][:200, :1001]
        per_token = [torch.full((300,), 7.0, device="cuda") for _ in range(2)]
        module.target_reference(
            case.chunk, case.hidden, None, case.weight, None, case.ids, 1.0, None, out["reference"],
            out["target"], out["exponent"],
        )  # fmt: skip
        module.product(
            case.hidden, case.weight, None, out["reference"], out["target"], 1.0, E, out["partials"],
            out["recentred"], out["exponent"],
        )  # fmt: skip
        module.fold(
            case.chunk, out["partials"], out["recentred"], out["reference"], out["exponent"], out["target"], 1.0, None,
            *per_token, out["factor"], out["residual"], E, torch.bfloat16, None,
        )  # fmt: skip
        results.append([*per_token, out["factor"]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert not results[0][2][~mask[index]].any()


def policy_of_three(
    mask: Tensor, config: LossConfig, logps: Tensor, entropy: Tensor, *, on_policy: bool, per_token: bool
) -> tuple[PolicyTensors, list[float]]:
    """Three sequences of 100 tokens near the policy that gave `logps`.

    Args:
        per_token: advantages and weights per token, a divisor of its own.
    """

    def near(spread: float) -> Tensor:
        return logps + spread * torch.randn_like(logps)

    threshold = None
    if config.top_entropy_quantile < 1:
        # In the widest gap near the lower quartile: no rounding moves a token across it. Tokens of no row have 0.
        values = entropy[mask & (entropy > 0)].sort().values
        values = values[len(values) // 5 : len(values) * 2 // 5]
        gap = int(values.diff().argmax())
        threshold = float(values[gap : gap + 2].mean())
    tensors = policy_tensors(
        mask.shape, mask.device, torch.float32, config, completion_mask=mask,
        advantages=torch.randn_like(logps) if per_token else logps.new_tensor([1.5, -0.5, 0.7]),
        old_logps=None if on_policy else near(0.1),
        ref_logps=near(0.3) if config.beta else None,
        sampling_logps=None if on_policy or per_token else near(0.02),
        importance_weights=torch.rand_like(logps) if per_token else None,
        num_items_in_batch=77 if per_token else None,
        entropy_threshold=threshold,
    )  # fmt: skip
    return tensors, loss_spec(config, 3.0)


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize(
    ("config", "given"),
    [
        (LossConfig(loss_type="dapo"), {}),
        (LossConfig(loss_type="dapo"), {"per_token": True}),
        (LossConfig(loss_type="dapo", top_entropy_quantile=0.5), {}),
        (LossConfig(loss_type="grpo", beta=0.1), {}),
        (LossConfig(loss_type="grpo", importance_sampling_level="sequence"), {"on_policy": True}),
        (LossConfig(loss_type="sapo"), {}),
        (LossConfig(loss_type="cispo", epsilon_high=5.0, vllm_importance_sampling_mode="sequence_truncate"), {}),
        (LossConfig(loss_type="dr_grpo", max_completion_length=64, delta=1.5), {}),
    ],
)
def test_rows_gathered_and_their_coefficients(config: LossConfig, given: dict[str, bool], by_index: bool) -> None:
    """In the kernels around the product: the rows of all tokens' hidden states, the factors times dLoss/dlogp."""
    case = Case(200, 1001, 64)
    mask = torch.rand(3, 100, device="cuda") > 0.4
    flat = mask.flatten()
    tokens = torch.randn(300, 64, device="cuda").bfloat16()
    tokens[~flat] = math.nan
    case.ids = torch.randint(0, 1001, (300,), device="cuda")
    index = torch.randperm(300, device="cuda")[:200] if by_index else None
    own = torch.arange(50, 250, device="cuda") if index is None else index
    case.chunk = ChunkRows(200, 50, index, flat)

    def products(module: Any) -> tuple[dict[str, Tensor], Tensor]:
        out = case.outputs()
        gathered = torch.full((201, 64), 7.0, device="cuda", dtype=torch.bfloat16)
        module.target_reference(
            case.chunk, tokens, gathered[:200], case.weight, None, case.ids, 1.0, None, out["reference"],
            out["target"], out["exponent"],
        )  # fmt: skip
        assert torch.equal(gathered[:200], torch.where(flat[own, None], tokens[own], 0))
        assert (gathered[200] == 7).all()
        E = out["E"][:200, :1001]
        module.product(
            gathered[:200], case.weight, None, out["reference"], out["target"], 1.0, E, out["partials"],
            out["recentred"], out["exponent"],
        )  # fmt: skip
        return out, E

    def fold(module: Any, out: dict[str, Tensor], E: Tensor, coefficients: Any) -> tuple[Tensor, Tensor, Tensor]:
        logps, entropy = (torch.zeros(300, device="cuda") for _ in range(2))
        factor = torch.full((201,), 7.0, device="cuda")
        module.fold(
            case.chunk, out["partials"], out["recentred"], out["reference"], out["exponent"], out["target"], 1.0, None,
            logps, entropy, factor[:200], out["residual"], E, torch.bfloat16, coefficients,
        )  # fmt: skip
        assert factor[200] == 7
        return factor[:200], logps.view(3, 100), entropy.view(3, 100)

    _, logps, entropy = fold(twins, *products(twins), None)
    wanted = {"on_policy": False, "per_token": False} | given
    tensors, spec = policy_of_three(mask, config, logps, entropy, **wanted)
    factors = []
    for module in (kernels, twins):
        made = products(module)
        plain, logps, entropy = fold(module, *made, None)
        factor, *again = fold(module, *made, module.row_coefficients(tensors, spec))
        assert all(torch.equal(a, b) for a, b in zip(again, (logps, entropy), strict=True))
        _, coef, *_ = torch.ops.grpo_ext.policy_loss(logps, entropy, *tensors, spec)
        torch.testing.assert_close(factor, plain * coef.flatten()[own], rtol=1e-6, atol=0.0)
        assert factor.count_nonzero() > 0.4 * flat[own].count_nonzero()
        factors.append(factor)
    torch.testing.assert_close(*factors, rtol=1e-3, atol=1e-5 * float(factors[1].abs().max()))


@pytest.mark.parametrize(("size", "limit"), [(1024, 2e-5), (2048, 3e-5), (4096, 6e-5)])
def test_log_probabilities_against_fp64(size: int, limit: float) -> None:
    """Logits that spread like a language model's, sampled and random targets, through the public function."""
    rows, vocab = 256, 151_936
    hidden = torch.randn(rows, size, device="cuda").bfloat16()
    weight = (torch.randn(vocab, size, device="cuda") * 2 / math.sqrt(size)).bfloat16()
    ids = torch.randint(0, vocab, (rows,), device="cuda")
    exact = torch.cat([
        torch.log_softmax(part.double() @ weight.double().t(), dim=1) for part in hidden.split(64)
    ])  # fmt: skip
    ids[::2] = exact[::2].argmax(dim=1)
    got, entropy = grpo_ext.linear_selective_log_softmax(hidden, weight, ids, return_entropy=True)
    assert (got - exact.gather(1, ids[:, None]).squeeze(1)).abs().max() <= limit
    assert (entropy + (exact.exp() * exact).sum(1)).abs().max() <= 2 * limit


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("sure", [False, True])
def test_gradients_at_full_size(trained: bool, sure: bool) -> None:
    """Never further from fp64 than the logits route, also where the targets are nearly certain."""
    rows, vocab, size = 192, 32_000, 512
    hidden = torch.randn(rows, size, device="cuda")
    weight = (torch.randn(vocab, size, device="cuda") * 2 / math.sqrt(size)).bfloat16()
    ids = torch.randint(0, vocab, (rows,), device="cuda")
    if sure:
        own = weight[ids].float()
        hidden = (
            hidden * 0.5
            + own / own.square().sum(1, keepdim=True) * torch.linspace(24, 34, rows, device="cuda")[:, None]
        )
    hidden = hidden.bfloat16()
    upstream = torch.rand(rows, device="cuda") + 0.5

    def gradients(route: str, dtype: torch.dtype) -> list[Tensor]:
        select_route(route)
        leaves = [hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_(trained)]
        if dtype == torch.float64:
            logps = torch.log_softmax(leaves[0] @ leaves[1].t(), dim=1).gather(1, ids[:, None]).squeeze(1)
        else:
            logps = grpo_ext.linear_selective_log_softmax(leaves[0], leaves[1], ids)
        logps.backward(upstream.to(logps.dtype))
        return [logps.detach().double()] + [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    truth = gradients("auto", torch.float64)
    if sure:
        assert truth[0].exp().min() > 0.99
    ours, rounded = gradients("auto", torch.bfloat16), gradients("logits", torch.bfloat16)
    assert (ours[0] - truth[0]).abs().max() <= 2e-5
    for n, (mine, theirs, exact) in enumerate(zip(ours[1:], rounded[1:], truth[1:], strict=True)):
        norm = exact.norm(dim=1)
        used = norm > norm.max() * 1e-5
        error, others = ((g - exact).norm(dim=1)[used] / norm[used] for g in (mine, theirs))
        # The head's: rows of hidden states are rounded with their factors here, which the logits route has in its
        # gradient. For random targets, where rounded logits cost little, that shows in the median.
        assert error.median() <= (1.1 if n else 1.02) * others.median()
        assert error.max() <= 1.02 * others.max()


CONFIGS = {
    "token": LossConfig(epsilon_high=0.28),
    "sequence": LossConfig(loss_type="grpo", importance_sampling_level="sequence"),
    "vespo": LossConfig(loss_type="vespo"),
    "kl": LossConfig(loss_type="grpo", beta=0.05),
}


def problem(
    dtype: torch.dtype = torch.bfloat16, vocab: int = 50_257, size: int = 256, far: bool = False
) -> dict[str, Any]:
    """far: a tenth of the tokens are so improbable that their tiles are recentred."""
    B, T = 4, 90
    hidden = torch.randn(B, T, size, device="cuda").to(dtype)
    hidden[:, ::10] *= 20 if far else 1
    weight = (torch.randn(vocab, size, device="cuda") * 2 / math.sqrt(size)).to(dtype)
    ids = torch.randint(0, vocab, (B, T), device="cuda")
    logps = grpo_ext.linear_selective_log_softmax(hidden, weight, ids)
    assert isinstance(logps, Tensor)
    return {
        "hidden": hidden,
        "weight": weight,
        "completion_ids": ids,
        "advantages": torch.randn(B, device="cuda"),
        "completion_mask": torch.rand(B, T, device="cuda") > 0.25,
        "old_logps": logps + 0.2 * torch.randn_like(logps),
        "ref_logps": logps - 0.1,
    }


def step(given: dict[str, Any], config: LossConfig, trained: bool, **more: Any) -> list[Tensor]:
    leaves = [given["hidden"].detach().requires_grad_(), given["weight"].detach().requires_grad_(trained)]
    rest = {k: v for k, v in given.items() if k not in ("hidden", "weight")}
    out = grpo_ext.linear_grpo_loss(*leaves, config=config, **rest, **more)
    grads = torch.autograd.grad(out.loss, [leaf for leaf in leaves if leaf.requires_grad])
    return [out.loss.detach(), out.logps, *grads]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("budget", [None, 16 << 20])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_losses_against_fp64_and_bitwise_again(config: LossConfig, budget: int | None, trained: bool) -> None:
    given = problem()
    ours = step(given, config, trained, memory_budget=budget)
    again = step(given, config, trained, memory_budget=budget)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    lifted = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    leaves = [lifted.pop("hidden").requires_grad_(), lifted.pop("weight").requires_grad_(trained)]
    truth = reference.linear_grpo_loss(*leaves, config=config, **lifted)
    truth.loss.backward()
    # vespo's weight is an exponential of the sum of 90 log ratios.
    rtol = 1e-3 if config.loss_type == "vespo" else 1e-4
    torch.testing.assert_close(ours[0].double(), truth.loss.detach(), rtol=rtol, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), truth.logps.detach(), rtol=0, atol=2e-5)
    for got, leaf in zip(ours[2:], leaves, strict=False):
        assert leaf.grad is not None
        assert (got.double() - leaf.grad).norm() <= 6e-3 * leaf.grad.norm()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_graph_replay_without_synchronisation(config: LossConfig, trained: bool) -> None:
    given = problem()
    static = {k: v.clone() for k, v in given.items()}
    more = {"valid_rows": static["completion_mask"].numel()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(static, config, trained, **more)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(static, config, trained, **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static, config, trained, **more)
    for new in (problem(far=True), problem(), problem(far=True), given):
        for name, tensor in static.items():
            tensor.copy_(new[name])
        graph.replay()
        expected = step(new, config, trained, **more)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_offsets_beyond_two_to_the_thirty_first() -> None:
    """16,000 rows of 151,936 probabilities, 2.4e9 of them, in one chunk: the last rows are those of a chunk of their
    own, and so are their gradients."""
    N, V, H = 16_000, 151_936, 64
    hidden = torch.randn(N, H, device="cuda").bfloat16()
    weight = torch.randn(V, H, device="cuda").bfloat16()
    ids = torch.randint(0, V, (N,), device="cuda")
    results = []
    for rows in (slice(0, N), slice(N - 256, N)):
        leaf = hidden[rows].clone().requires_grad_()
        logps = grpo_ext.linear_selective_log_softmax(leaf, weight, ids[rows], memory_budget=6 << 30)
        logps.sum().backward()
        results.append((logps.detach()[-256:], leaf.grad[-256:]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("budget", [None, 512 << 20])
def test_memory(trained: bool, budget: int | None) -> None:
    """Beyond dhidden and, trained, one fp32 (V,H): 1.25 GiB, or the budget."""
    B, T, H, V = 8, 1024, 1024, 151_936
    given = {
        "hidden": torch.randn(B, T, H, device="cuda").bfloat16(),
        "weight": (torch.randn(V, H, device="cuda") * 0.05).bfloat16(),
        "completion_ids": torch.randint(0, V, (B, T), device="cuda"),
        "advantages": torch.randn(B, device="cuda"),
        "completion_mask": torch.ones(B, T, device="cuda", dtype=torch.bool),
    }
    buffer = torch.zeros(V, H, device="cuda") if trained else None
    leaves = [given.pop("hidden").requires_grad_(), given.pop("weight").requires_grad_(trained)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = grpo_ext.linear_grpo_loss(*leaves, config=CONFIGS["token"], weight_grad=buffer, memory_budget=budget, **given)
    out.loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - leaves[0].numel() * 2
    assert extra <= (budget or 1.25 * 2**30)


def test_a_head_with_odd_rows_goes_by_way_of_logits() -> None:
    """Rows of the head that the copy engine cannot address go by way of logits, with the same result."""
    given = problem(vocab=1001, size=64)
    wide = torch.zeros(1001, 69, device="cuda", dtype=torch.bfloat16)
    wide[:, :64] = given["weight"]
    seen: list[int] = []
    real = ProbabilityRoute.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbabilityRoute, "forward", lambda self, *a: (seen.append(1), real(self, *a))[1])
        odd = step(given | {"weight": wide[:, :64]}, CONFIGS["token"], False)
        assert not seen
        even = step(given, CONFIGS["token"], False)
        assert seen
    torch.testing.assert_close(odd[1], even[1], rtol=0, atol=0.1)
