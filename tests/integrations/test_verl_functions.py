"""Our policy loss and fused head for verl, against verl's formulas and, if it can be imported, verl itself."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ext import reference
from grpo_ext.integrations.verl_functions import AGGREGATIONS, grpo_ext_policy_loss, linear_cross_entropy

B, T = 5, 8


class Config(dict[str, Any]):
    """verl's ActorConfig is read by attribute and by ``get``."""

    __getattr__ = dict.__getitem__


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    old = -2 * torch.rand(B, T, generator=generator)
    lengths = torch.tensor([T, 3, 0, 1, T - 1])
    return {
        "old_log_prob": old,
        "log_prob": (old + 1.5 * torch.randn(B, T, generator=generator)).requires_grad_(),
        "advantages": torch.randn(B, T, generator=generator),
        "response_mask": (torch.arange(T) < lengths[:, None]).long(),
    }


def config(**batch_info: Any) -> Config:
    return Config(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info=batch_info
    )


BATCH_INFO: list[dict[str, Any]] = [
    {},
    {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9, "loss_scale_factor": 13},
]


def by_hand(
    t: dict[str, Any], mode: str, info: dict[str, Any], weights: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """The documented objective: clip, dual clip at c = 3 for negative advantages, then the aggregation."""
    A, m = t["advantages"], t["response_mask"].float()
    r = (t["log_prob"] - t["old_log_prob"]).clamp(-20, 20).exp()
    clipped = torch.maximum(-r * A, -r.clamp(0.8, 1.28) * A)
    l = torch.where(A < 0, torch.minimum(clipped, -3.0 * A), clipped)  # noqa: E741
    if weights is not None:
        l = l * weights  # noqa: E741
    ranks = info.get("dp_size", 1)
    sequences = info.get("global_batch_size", int((m.sum(1) > 0).sum()))
    if mode == "token-sum":
        loss = (l * m).sum() * ranks
    elif mode == "token-mean":
        loss = (l * m).sum() / info.get("batch_num_tokens", m.sum()) * ranks
    elif mode == "seq-mean-token-mean":
        loss = ((l * m).sum(1) / m.sum(1).clamp(min=1)).sum() / sequences * ranks
    else:
        loss = (l * m).sum() / sequences * ranks
        if mode.endswith("norm"):
            loss = loss / info.get("loss_scale_factor", T)

    def mean(x: Tensor) -> float:
        return float((x.float() * m).sum() / m.sum())

    return loss, {
        "actor/pg_clipfrac": mean(-r.clamp(0.8, 1.28) * A > -r * A),
        "actor/ppo_kl": mean(t["old_log_prob"] - t["log_prob"]),
        "actor/pg_clipfrac_lower": mean((clipped > -3.0 * A) & (A < 0)),
    }


def assert_same(found: tuple[Tensor, dict[str, Any]], wanted: tuple[Tensor, dict[str, Any]], leaf: Tensor) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    one, two = (torch.autograd.grad(x[0], leaf)[0] for x in (found, wanted))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", BATCH_INFO, ids=["local", "global"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_policy_loss_follows_the_formulas(mode: str, info: dict[str, Any], weighted: bool) -> None:
    t = batch()
    weights = torch.rand(B, T) + 0.5 if weighted else None
    found = grpo_ext_policy_loss(**t, loss_agg_mode=mode, config=config(**info), rollout_is_weights=weights)
    wanted = by_hand(t, mode, info, weights)
    assert wanted[1]["actor/pg_clipfrac"] > 0
    assert wanted[1]["actor/pg_clipfrac_lower"] > 0
    assert_same(found, wanted, t["log_prob"])


def test_nothing_counts() -> None:
    t = batch()
    t["response_mask"] = torch.zeros_like(t["response_mask"])
    for mode in AGGREGATIONS:
        loss, metrics = grpo_ext_policy_loss(**t, loss_agg_mode=mode, config=config())
        assert loss == 0
        assert set(metrics.values()) == {0.0}


def test_errors_name_argument_and_remedy() -> None:
    t = batch()
    with pytest.raises(ValueError, match="loss_agg_mode must be one of token-mean"):
        grpo_ext_policy_loss(**t, loss_agg_mode="mean", config=config())
    with pytest.raises(ValueError, match="dp_size=2 needs global_batch_size in config"):
        grpo_ext_policy_loss(**t, loss_agg_mode="seq-mean-token-sum", config=config(dp_size=2))
    with pytest.raises(ValueError, match=r"clip_ratio_c=1.1 is below 1 \+ clip_ratio_high"):
        grpo_ext_policy_loss(**t, config=Config(config(), clip_ratio_c=1.1))
    with pytest.raises(ValueError, match="pass config="):
        grpo_ext_policy_loss(**t)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_fused_head_equals_the_reference(reduction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 6, 8, generator=generator).requires_grad_()
    weight = torch.randn(67, 8, generator=generator).requires_grad_()
    labels = torch.randint(0, 67, (2, 6), generator=generator)
    found = linear_cross_entropy(hidden, weight, labels, 0.8, reduction)
    logps, entropy = reference.linear_selective_log_softmax(
        hidden, weight, labels, temperature=0.8, return_entropy=True
    )
    logps = {"none": logps.flatten(), "sum": logps.sum(), "mean": logps.mean()}[reduction]
    upstream = torch.randn(12)
    gradients = []
    for a, b in (found, (logps, entropy.flatten())):
        gradients.append(torch.autograd.grad((2 * a).sum() + (upstream * b).sum(), (hidden, weight)))
    torch.testing.assert_close(found, (logps, entropy.flatten()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(hidden, weight, labels, reduction="max")


@pytest.fixture(scope="module")
def core_algos() -> Any:
    """verl imports Ray, and its 250 MB are not part of the set-up: pip install 'grpo-ext[verl]'."""
    pytest.importorskip("ray", reason="verl imports Ray: pip install 'grpo-ext[verl]' and pip install --no-deps verl")
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="pip install --no-deps verl")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", BATCH_INFO, ids=["local", "global"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_policy_loss_equals_verl(mode: str, info: dict[str, Any], weighted: bool, core_algos: Any) -> None:
    workers = importlib.import_module("verl.workers.config")
    actor = workers.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28, global_batch_info=dict(info)
    )
    importlib.import_module("grpo_ext.integrations.verl")
    t = batch()
    options = {"rollout_is_weights": torch.rand(B, T) + 0.5 if weighted else None, "loss_agg_mode": mode}
    names = ("grpo_ext", "vanilla")
    found, wanted = (core_algos.get_policy_loss_fn(name)(**t, config=actor, **options) for name in names)
    assert_same(found, wanted, t["log_prob"])


@pytest.fixture
def patched(core_algos: Any) -> Iterator[Any]:
    """Twice, which is the same as once."""
    ours = importlib.import_module("grpo_ext.integrations.verl")
    ours.patch()
    ours.patch()
    yield ours
    ours.unpatch()


def test_patch_replaces_verls_heads(core_algos: Any, request: pytest.FixtureRequest) -> None:
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    in_torch = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    originals = module.linear_cross_entropy, in_torch.forward
    ours = request.getfixturevalue("patched")
    assert (module.linear_cross_entropy, in_torch.forward) == (linear_cross_entropy, ours.fused_linear_for_ppo)
    ours.unpatch()
    assert (module.linear_cross_entropy, in_torch.forward) == originals


@pytest.mark.parametrize("shape", [(11,), (2, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_in_torch(core_algos: Any, request: pytest.FixtureRequest, shape: tuple[int, ...], dtype: Any) -> None:
    """verl's module before and after `patch`, and both against fp64; called as verl's models call it."""
    head = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO(chunk_size=4)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(67, 8, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, 67, shape, generator=generator, dtype=torch.int32)
    upstream = torch.randn(2, *shape, generator=generator)

    def results() -> list[torch.Tensor]:
        logps, entropy = head.forward(hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=0.8)
        assert logps.shape == entropy.shape == shape
        total = (upstream[0] * logps + upstream[1] * entropy).sum()
        return [x.detach().double() for x in (logps, entropy, *torch.autograd.grad(total, (hidden, weight)))]

    theirs = results()
    request.getfixturevalue("patched")
    found = results()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = reference.linear_selective_log_softmax(*wide, ids.long(), temperature=0.8, return_entropy=True)
    total = (upstream[0] * exact[0] + upstream[1] * exact[1]).sum()
    for ours, verls, true in zip(found, theirs, [*exact, *torch.autograd.grad(total, wide)], strict=True):
        error, allowed = ((x - true).norm() / true.norm() for x in (ours, verls))
        assert error <= 2 * allowed + 1e-7
        assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
