"""The fused linear functions against the reference in fp64: values and gradients over a pairwise grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import FACTORS, Result, budget_of, build, run
from loss_cases import DTYPES, TRANSFORMS, pairwise
from torch import Tensor

import grpo_ext
from grpo_ext import reference
from grpo_ext.output import METRIC_NAMES

GRID = pairwise(FACTORS)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def case_id(case: dict[str, Any]) -> str:
    names = ("loss_type", "level", "dtype", "trained", "isw", "vocab", "budget")
    return "-".join(str(case[k]) for k in names)


def skip_fp64_on_gpu(dtype: str, device: torch.device) -> None:
    if dtype == "fp64" and device.type != "cpu":
        pytest.skip("fp64 is for the CPU")


def assert_as_exact_as_torch(
    name: str, ours: Tensor, same_dtype: Tensor, truth: Tensor, dtype: torch.dtype, units: int = 8
) -> None:
    """At most twice the error of plain torch in the same dtype, plus a unit of the dtype's rounding.

    The floor is for quantities that torch happens to hit exactly, and for the element that its rounding favours; it has
    so many ``units`` of fp32's rounding.
    """
    truth = truth.double()
    scale = truth.abs().max().item() if truth.numel() else 0.0
    error = (ours.double() - truth).abs().max().item() if truth.numel() else 0.0
    torch_error = (same_dtype.double() - truth).abs().max().item() if truth.numel() else 0.0
    if name == "kl":
        units = 64  # a far old policy multiplies the rounding of logp by a ratio of 20 and more
    floor = torch.finfo(dtype).eps * scale + units * torch.finfo(torch.float32).eps * scale + 1e-9
    if dtype == torch.float16:
        floor += torch.finfo(dtype).smallest_normal
    assert error <= 2 * torch_error + floor, f"{name}: {error:.3g} against torch's {torch_error:.3g}"


def compare(ours: Result, same_dtype: Result | None, truth: Result, dtype: torch.dtype, units: int = 8) -> None:
    """Loss, per-token outputs, metrics and gradients; ``units`` as of `assert_as_exact_as_torch`."""
    assert ours.grads.keys() == truth.grads.keys()
    peer = same_dtype or truth
    fields: list[tuple[str, Any, Any, Any]] = [
        (name, getattr(ours.out, name), getattr(peer.out, name), getattr(truth.out, name))
        for name in ("loss", "logps", "entropy", "kl")
    ]
    fields += [(name, ours.grads[name], peer.grads[name], truth.grads[name]) for name in truth.grads]
    for name, a, b, exact in fields:
        if exact is None:
            assert a is None, name
            continue
        a, b, exact = a.detach(), b.detach(), exact.detach()
        assert a.shape == exact.shape, name
        assert not a.isnan().any(), name
        if same_dtype is None:
            torch.testing.assert_close(a, exact, msg=lambda m, n=name: f"{n}: {m}", **TIGHT)
        else:
            assert a.dtype == b.dtype, name
            assert_as_exact_as_torch(name, a, b, exact, dtype, units)
    assert tuple(ours.out.metrics) == METRIC_NAMES
    if dtype in (torch.float32, torch.float64):
        loose = 1e-9 if same_dtype is None else 2e-3
        for name, value in ours.out.metrics.items():
            assert value.item() == pytest.approx(truth.out.metrics[name].item(), rel=loose, abs=loose), name


@pytest.mark.parametrize(
    ("number", "case"), list(enumerate(GRID)), ids=[f"{i}-{case_id(c)}" for i, c in enumerate(GRID)]
)
def test_linear_grpo_loss(device: torch.device, number: int, case: dict[str, Any]) -> None:
    skip_fp64_on_gpu(case["dtype"], device)
    if case["dtype"] in ("bf16", "fp16"):
        # Rounded logits move tokens across clip limits and thresholds, ours and torch's different ones.
        case = case | {"off_policy": None, "quantile": 1.0, "old": "absent" if case["old"] == "far" else case["old"]}
        case["isw"] = "none" if case["isw"].endswith("mask") else case["isw"]
    batch = build(case, device, seed=number)
    dtype = batch.hidden.dtype
    truth = run(reference.linear_grpo_loss, batch, torch.float64)
    same_dtype = None if case["dtype"] == "fp64" else run(reference.linear_grpo_loss, batch)
    ours = run(grpo_ext.linear_grpo_loss, batch, **batch.ours_only)
    compare(ours, same_dtype, truth, dtype)


@pytest.mark.parametrize("trained", ["", "weight+bias"])
@pytest.mark.parametrize("old", ["absent", "near"])
@pytest.mark.parametrize("isw", ["none", "(B,)", "(B,T)"])
@pytest.mark.parametrize("advantages", ["(B,)", "(B,T)"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
def test_sequence_ratios_and_zeros(
    device: torch.device, loss_type: str, advantages: str, isw: str, old: str, trained: str
) -> None:
    """Tokens whose advantage or weight is 0 among others of their completion: they still move its ratio, and vespo's
    weight of 0 is a bounded one. And a divisor of 0 counts as 1."""
    case = {name: values[0] for name, values in FACTORS.items()} | {
        "loss_type": loss_type, "level": "sequence", "dtype": "fp32" if device.type == "cuda" else "fp64", "old": old,
        "isw": isw, "advantages": advantages, "trained": trained, "vocab": 33, "budget": 16,
    }  # fmt: skip
    batch = build(case, device, seed=2)
    batch.options["num_items_in_batch"] = 0
    if advantages == "(B,T)":
        batch.advantages[:, ::3] = 0
    if isw == "(B,T)":
        batch.options["importance_weights"][:, 1::3] = 0
    elif isw == "(B,)":
        batch.options["importance_weights"][2] = 0
    truth = run(reference.linear_grpo_loss, batch, torch.float64)
    same_dtype = None if case["dtype"] == "fp64" else run(reference.linear_grpo_loss, batch)
    # Powers of a completion's summed log ratios: over eight seeds vespo's loss is off by up to 169 units here, by up to
    # 185 in torch, and which of the two is closer changes from seed to seed.
    compare(run(grpo_ext.linear_grpo_loss, batch, **batch.ours_only), same_dtype, truth, batch.hidden.dtype, units=64)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("trained", ["", "weight+bias"])
@pytest.mark.parametrize("budget", [None, 8])
@pytest.mark.parametrize("logits_dtype", [None, "float32"])
def test_linear_selective_log_softmax(
    device: torch.device, dtype: str, transform: str, trained: str, budget: int | None, logits_dtype: str | None
) -> None:
    """Any upstream gradient, of the log probabilities alone and with that of the entropies."""
    skip_fp64_on_gpu(dtype, device)
    kind, V, H, shape = DTYPES[dtype], 257, 12, (3, 7)
    hidden, weight = torch.randn(*shape, H).to(device, kind), (0.8 * torch.randn(V, H)).to(device, kind)
    bias = torch.randn(V).to(device, kind)
    mask = torch.rand(shape, device=device) > 0.3
    hidden[~mask] = torch.nan
    ids = torch.randint(0, V, shape, device=device)
    up = torch.randn(2, *shape, dtype=torch.float64, device="cpu").to(
        device, torch.float64 if dtype == "fp64" else torch.float32
    )
    for with_entropy in (False, True):
        results = []
        for module, lift in ((grpo_ext, kind), (reference, kind), (reference, torch.float64)):
            leaves = [t.to(lift).clone() for t in (hidden, weight, bias)]
            for leaf, wanted in zip(leaves, (True, bool(trained), bool(trained)), strict=True):
                leaf.requires_grad_(wanted)
            more: dict[str, Any] = {}
            if module is grpo_ext:
                more = {"memory_budget": budget_of(budget, V, H, kind), "logits_dtype": logits_dtype}
            out = module.linear_selective_log_softmax(
                leaves[0], leaves[1], ids, bias=leaves[2], mask=mask, return_entropy=with_entropy,
                **TRANSFORMS[transform], **more,
            )  # fmt: skip
            values = out if with_entropy else (out,)
            torch.autograd.backward(values, [u.to(values[0].dtype) for u in up[: len(values)]])
            results.append([v.detach() for v in values] + [x.grad for x in leaves if x.requires_grad])
        ours, same_dtype, truth = results
        for i, (a, b, exact) in enumerate(zip(ours, same_dtype, truth, strict=True)):
            if dtype == "fp64":
                torch.testing.assert_close(a, exact, **TIGHT)
            else:
                assert_as_exact_as_torch(str(i), a, b, exact, kind)
