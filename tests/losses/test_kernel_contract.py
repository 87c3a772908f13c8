"""Guarantees besides values: equal bits, independent rows, complete outputs, in-place rules, torch's checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loss_cases import FACTORS, build, case_id, pairwise, run
from torch import Tensor

import grpo_ext
from grpo_ext import _ops
from grpo_ext.config import LossConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: A few cases that together take every route: one pass and staged, both levels, in place and not.
ROUTES = pairwise(
    {
        "loss_type": ("dapo", "cispo", "vespo"),
        "level": ("token", "sequence"),
        "dtype": ("fp32", "bf16"),
        "old": ("absent", "near"),
        "kl": ("off", "corrected"),
        "entropy_coef": (0.0, 0.02),
        "quantile": (1.0, 0.63),
        "inplace": (False, True),
    }
)
DEFAULTS = {name: values[0] for name, values in FACTORS.items()} | {"vocab": 1001, "layout": "slice"}
EVERY_ROUTE = pytest.mark.parametrize("route", ROUTES, ids=[case_id(DEFAULTS | r) for r in ROUTES])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tensors_of(result: Any) -> dict[str, Tensor]:
    out = result.out
    named = {"loss": out.loss, "logps": out.logps, "entropy": out.entropy, "kl": out.kl, "grad": result.grad}
    return {k: v.detach() for k, v in (named | out.metrics).items() if v is not None}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@EVERY_ROUTE
def test_two_runs_agree_bit_for_bit(
    device: torch.device, route: dict[str, Any], threads: Callable[[int], None]
) -> None:
    """Also with another number of threads."""
    batch = build(DEFAULTS | route, device, seed=3)
    first = tensors_of(run(grpo_ext.grpo_loss, batch))
    assert_same_bits(first, tensors_of(run(grpo_ext.grpo_loss, batch)))
    for count in (1, 2, 3):
        threads(count)
        assert_same_bits(first, tensors_of(run(grpo_ext.grpo_loss, batch)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 1001, 50257])
def test_a_row_does_not_depend_on_its_neighbours(
    device: torch.device, dtype: torch.dtype, vocab: int, threads: Callable[[int], None]
) -> None:
    """The same row alone, in a batch, in another place and among other values: the same bits of logp."""
    logits = (torch.randn(6, vocab) * 4).to(device, dtype)
    ids = torch.randint(0, vocab, (6,), device=device)
    options = {"return_entropy": True, "temperature": 0.9}
    together = grpo_ext.selective_log_softmax(logits, ids, **options)
    for i in range(6):
        for alone in (logits[i : i + 1], logits[i : i + 1].clone()):
            for got, all_rows in zip(
                grpo_ext.selective_log_softmax(alone, ids[i : i + 1], **options), together, strict=True
            ):
                assert torch.equal(got[0], all_rows[i])
    order = torch.tensor([3, 5, 0, 1, 4, 2], device=device)
    for count in (1, 2, 3):
        threads(count)
        moved = grpo_ext.selective_log_softmax(logits[order], ids[order], **options)
        for got, all_rows in zip(moved, together, strict=True):
            assert torch.equal(got, all_rows[order])
    others = logits.clone()
    others[::2] = math.nan
    got = grpo_ext.selective_log_softmax(others, ids, **options)
    assert torch.equal(got[0][1::2], together[0][1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_functions_report_the_same_log_probabilities(device: torch.device, dtype: torch.dtype) -> None:
    """grpo_loss and selective_log_softmax agree to the bit: a ratio on stored logps starts at exactly 1."""
    logits = torch.randn(2, 3, 1001).to(device, dtype)
    ids = torch.randint(0, 1001, (2, 3), device=device)
    logp, entropy = grpo_ext.selective_log_softmax(logits, ids, return_entropy=True)
    one = torch.ones(2, 3, device=device)
    for config in (LossConfig(), LossConfig(loss_type="vespo"), LossConfig(entropy_coef=0.1)):
        for leaf in (logits, logits.clone().requires_grad_()):
            out = grpo_ext.grpo_loss(leaf, ids, one[:, 0], one, config, old_logps=logp)
            assert torch.equal(out.logps, logp)
            assert torch.equal(out.entropy, entropy)
            assert out.metrics["ratio/max"] == 1


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty and its relatives hand out NaN, so an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@EVERY_ROUTE
def test_every_output_is_written_whole(device: torch.device, route: dict[str, Any], poison: None) -> None:
    batch = build(DEFAULTS | route, device, seed=5)
    for name, tensor in tensors_of(run(grpo_ext.grpo_loss, batch)).items():
        assert not tensor.isnan().any(), name
    leaf = batch.leaf.clone().requires_grad_()
    ids = batch.ids
    logp, entropy = grpo_ext.selective_log_softmax(batch.view(leaf), ids, return_entropy=True)
    (logp.sum() + entropy.sum()).backward()
    assert not torch.stack([logp, entropy]).isnan().any()
    assert leaf.grad is not None
    assert not leaf.grad.isnan().any()


def simple(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "completion_ids": torch.randint(0, 9, (2, 3), device=device),
        "advantages": torch.tensor([1.0, -1.0], device=device),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]], device=device),
        "config": LossConfig(),
    }


# in place


def test_in_place_needs_no_second_buffer(device: torch.device) -> None:
    """The gradient that reaches the operation before the loss lies in the logits' own memory."""
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    seen: list[Tensor] = []

    class Producer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(grad)
            return grad

    produced = Producer.apply(leaf)
    address = produced.data_ptr()
    grpo_ext.grpo_loss(produced, **simple(device), inplace=True).loss.backward()
    assert [g.data_ptr() for g in seen] == [address]


def test_in_place_where_somebody_watches_the_logits(device: torch.device) -> None:
    """retain_grad and hooks on the logits, set before the loss, must not break the overwrite."""
    arguments = simple(device)
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    grpo_ext.grpo_loss(leaf, **arguments).loss.backward()
    expected, leaf.grad = leaf.grad, None
    produced = leaf * 1.0
    produced.retain_grad()
    produced.register_hook(lambda g: None)
    grpo_ext.grpo_loss(produced, **arguments, inplace=True).loss.backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("view", [False, True])
def test_using_overwritten_logits_raises(device: torch.device, view: bool) -> None:
    arguments = simple(device)

    def logits_of(leaf: Tensor) -> Tensor:
        produced = leaf * 1.0
        return produced[:, :-1] if view else produced

    # Used before the loss by an operation that saved them: autograd's version counter notices.
    leaf = torch.randn(2, 4 if view else 3, 9, device=device, requires_grad=True)
    logits = logits_of(leaf)
    square = logits.square().sum()
    loss = grpo_ext.grpo_loss(logits, **arguments, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square).backward()
    # Used after the loss, as they are or as what they are a view of.
    for later in ("logits", "produced"):
        leaf = torch.randn(2, 4 if view else 3, 9, device=device, requires_grad=True)
        produced = leaf * 1.0
        logits = produced[:, :-1] if view else produced
        loss = grpo_ext.grpo_loss(logits, **arguments, inplace=True).loss
        with pytest.raises(RuntimeError, match="overwritten"):
            (loss + {"logits": logits, "produced": produced}[later].sum()).backward()


class Passed(torch.autograd.Function):
    """Hands its input on, as a view that a custom function has made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "split": lambda x: x.split([3, 1], 1)[0],
    "unbind": lambda x: x.unflatten(1, (1, 4)).unbind(1)[0][:, :3],
    "custom function": lambda x: Passed.apply(x[:, :3]),
}


@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS)
def test_in_place_on_a_view_without_a_new_history(device: torch.device, view_of: Callable[[Tensor], Tensor]) -> None:
    """Of functions whose views autograd lets nobody overwrite: the same gradient, and no use afterwards."""
    arguments = simple(device)
    leaf = torch.randn(2, 4, 9, device=device, requires_grad=True)
    grpo_ext.grpo_loss(view_of(leaf * 1.0), **arguments).loss.backward()
    expected, leaf.grad = leaf.grad, None
    grpo_ext.grpo_loss(view_of(leaf * 1.0), **arguments, inplace=True).loss.backward()
    assert leaf.grad is not None
    assert expected is not None
    assert torch.equal(leaf.grad, expected)
    for later in ("logits", "produced"):
        produced = leaf * 1.0
        logits = view_of(produced)
        loss = grpo_ext.grpo_loss(logits, **arguments, inplace=True).loss
        with pytest.raises(RuntimeError, match=r"overwritten|modified inplace"):
            (loss + {"logits": logits, "produced": produced}[later].sum()).backward()


def test_in_place_refuses_what_it_must_not_overwrite(device: torch.device) -> None:
    arguments = simple(device)
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    for owned in (leaf, torch.randn(2, 4, 9, device=device, requires_grad=True)[:, 1:]):
        assert owned._base is None or owned._base.is_leaf
        before = owned.detach().clone()
        with pytest.raises(RuntimeError, match="leaf"):
            grpo_ext.grpo_loss(owned, **arguments, inplace=True)
        assert torch.equal(owned.detach(), before)
    shared = torch.randn(1, 3, 9, device=device, requires_grad=True).clone().expand(2, 3, 9)
    with pytest.raises(RuntimeError, match="overlapping"):
        grpo_ext.grpo_loss(shared, **arguments, inplace=True)
    flat = torch.randn(90, device=device, requires_grad=True) * 1.0
    for strides in ((27, 4, 1), (9, 9, 1), (4, 18, 1), (18, 20, 1)):
        with pytest.raises(RuntimeError, match="overlapping"):
            grpo_ext.grpo_loss(flat.as_strided((2, 3, 9), strides), **arguments, inplace=True)
    for strides in ((27, 9, 1), (9, 18, 1), (30, 10, 1)):
        grpo_ext.grpo_loss((flat * 1.0).as_strided((2, 3, 9), strides), **arguments, inplace=True)
    # Without a gradient there is nothing to write.
    plain = torch.randn(2, 3, 9, device=device)
    before = plain.clone()
    grpo_ext.grpo_loss(plain, **arguments, inplace=True)
    with torch.no_grad():
        grpo_ext.grpo_loss(plain.requires_grad_(), **arguments, inplace=True)
    assert torch.equal(plain.detach(), before)


def test_the_gradient_has_no_gradient_of_its_own(device: torch.device) -> None:
    """create_graph=True gives the same gradient, and whoever differentiates it is told so."""
    leaf, arguments = torch.randn(2, 3, 9, device=device, requires_grad=True), simple(device)
    loss = grpo_ext.grpo_loss(leaf, **arguments).loss
    (expected,) = torch.autograd.grad(loss * 2, leaf)
    loss = grpo_ext.grpo_loss(leaf, **arguments).loss
    (grad,) = torch.autograd.grad(loss * loss, leaf, create_graph=True)
    torch.testing.assert_close(grad.detach(), expected * loss.detach())
    with pytest.raises(RuntimeError, match="grpo_loss has no second derivative"):
        grad.sum().backward()


def test_results_can_be_changed_in_place(device: torch.device) -> None:
    """None of them shares memory with another, or with an argument."""
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    arguments = simple(device)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    out = grpo_ext.grpo_loss(leaf, **arguments)
    assert out.entropy is not None
    kept = [x.detach().clone() for x in (out.loss, out.logps, out.entropy, out.metrics["tokens"])]
    out.loss.div_(2)
    out.logps.fill_(7)
    out.loss.backward()
    assert torch.equal(out.entropy, kept[2])
    assert torch.equal(out.metrics["tokens"], kept[3])
    out.entropy.fill_(8)
    assert (out.logps == 7).all()
    assert all(torch.equal(arguments[k], v) for k, v in before.items())
    fresh = leaf.detach().clone().requires_grad_()
    grpo_ext.grpo_loss(fresh, **arguments).loss.backward()
    torch.testing.assert_close(leaf.grad, fresh.grad / 2)


def test_a_second_backward_raises(device: torch.device) -> None:
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    loss = grpo_ext.grpo_loss(leaf, **simple(device)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


def test_out_of_place_leaves_the_logits_alone(device: torch.device) -> None:
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    before = leaf.detach().clone()
    (grpo_ext.grpo_loss(leaf, **simple(device)).loss * 3).backward()
    assert torch.equal(leaf.detach(), before)


# torch's own checks


def operator_samples(device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every operator of the library."""
    B, T, V = 2, 3, 9
    logits = torch.randn(B, T, V, device=device)
    strided = torch.randn(B, T + 1, V, device=device)[:, :-1]
    ids = torch.randint(0, V, (B, T), device=device)
    mask = torch.tensor([[True, True, True], [True, False, False]], device=device)
    transform = _ops.logit_transform(0.9, 5.0, 1.1)
    logps, entropy, lse = torch.ops.grpo_ext.row_stats(logits, ids, mask, transform, True)
    some = torch.randn(B, T, device=device)
    number = torch.tensor(4.0, device=device)
    small = _ops.loss_spec(LossConfig(), 1.0)
    large = _ops.loss_spec(LossConfig(loss_type="vespo", beta=0.1, entropy_coef=0.1), 0.5)
    bare = (mask, some[:, 0].contiguous(), None, None, None, None, None, None, small)
    full = (mask, some, logps, some, some, some.exp(), number, number, large)
    return {
        "row_stats": [
            (logits, ids, mask, transform, True),
            (strided, ids, None, transform, False),
        ],
        "row_gradient": [
            (logits, ids, mask, logps, entropy, lse, some, some, transform),
            (strided, ids, None, logps, None, lse, some, None, transform),
        ],
        "row_gradient_": [
            (logits.clone(), ids, mask, logps, entropy, lse, some, some, transform),
            (strided.clone(), ids, None, logps, None, lse, some, None, transform),
        ],
        "policy_loss": [(logps, None, *bare), (logps, entropy, *full)],
        "row_loss": [(logits, ids, *bare, transform, True), (strided, ids, *bare, transform, False)],
        "row_loss_": [(logits.clone(), ids, *bare, transform)],
        "scale_rows_": [(logits.clone(), number), (torch.randn(B, T + 1, V, device=device)[:, :-1], number)],
    }


def test_every_operator_has_samples() -> None:
    registered = {
        name.removeprefix("grpo_ext::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("grpo_ext::")
        and not name.startswith(("grpo_ext::linear_", "grpo_ext::sharded_"))  # those: tests/linear
    }
    assert registered == set(operator_samples(torch.device("cpu")))


@pytest.mark.parametrize("name", list(operator_samples(torch.device("cpu"))))
def test_opcheck(device: torch.device, name: str) -> None:
    operator = getattr(torch.ops.grpo_ext, name).default
    for arguments in operator_samples(device)[name]:
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "config",
    [LossConfig(), LossConfig(loss_type="vespo", beta=0.1, top_entropy_quantile=0.5, entropy_coef=0.1)],
    ids=["one_pass", "staged"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_compile_without_graph_breaks(device: torch.device, backend: str, config: LossConfig, inplace: bool) -> None:
    if backend == "inductor" and (inplace or config.beta == 0):
        pytest.skip("one inductor run is enough: it takes tens of seconds and sees the same operators")
    arguments = simple(device) | {"config": config}
    some = torch.randn(2, 3, device=device)

    def step(leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = grpo_ext.grpo_loss(
            leaf * 2.0, **arguments, old_logps=some, ref_logps=some, sampling_logps=some, inplace=inplace
        )
        return out.loss * 1.5, out.logps, out.metrics["ratio/mean"]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    values = torch.randn(2, 3, 9, device=device)
    for function in (step, compiled):
        leaf = values.clone().requires_grad_()
        loss, logps, ratio = function(leaf)
        loss.backward()
        results.append((loss.detach(), logps, ratio, leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_of_the_other_functions(device: torch.device) -> None:
    ids = torch.randint(0, 9, (2, 3), device=device)
    some = torch.randn(2, 3, device=device)

    def step(leaf: Tensor) -> Tensor:
        logp, entropy = grpo_ext.selective_log_softmax(leaf, ids, temperature=0.7, return_entropy=True)
        config = LossConfig(entropy_coef=0.1)
        return grpo_ext.policy_loss(
            logp, some[:, 0], torch.ones_like(logp), config, old_logps=some, entropy=entropy
        ).loss

    torch._dynamo.reset()
    values = torch.randn(2, 3, 9, device=device)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = values.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_without_autograd(device: torch.device) -> None:
    arguments = simple(device)
    logits = torch.randn(2, 3, 9, device=device)
    expected = grpo_ext.grpo_loss(logits.clone().requires_grad_(), **arguments)
    assert expected.loss.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for inplace in (False, True):
                values = logits.clone()
                out = grpo_ext.grpo_loss(values, **arguments, inplace=inplace)
                assert not out.loss.requires_grad
                assert torch.equal(out.loss, expected.loss)
                assert torch.equal(out.logps, expected.logps)
                assert torch.equal(values, logits)
            grpo_ext.selective_log_softmax(logits, arguments["completion_ids"], return_entropy=True)
            grpo_ext.policy_loss(
                expected.logps, arguments["advantages"], arguments["completion_mask"], arguments["config"]
            )


def test_under_autocast_and_checkpointing(device: torch.device) -> None:
    arguments = simple(device)
    hidden = torch.randn(2, 3, 4, device=device, requires_grad=True)
    weight = torch.randn(9, 4, device=device)

    def loss(h: Tensor) -> Tensor:
        return grpo_ext.grpo_loss(h @ weight.T, **arguments, inplace=True).loss

    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = loss(hidden)
    assert out.dtype == torch.float32
    (direct,) = torch.autograd.grad(out, hidden)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False)
    (again,) = torch.autograd.grad(out, hidden)
    assert torch.equal(direct, again)


def test_kernel_calls_are_counted(device: torch.device) -> None:
    before = _ops.kernel_calls()
    grpo_ext.grpo_loss(torch.randn(2, 3, 9, device=device), **simple(device))
    assert _ops.kernel_calls() > before
