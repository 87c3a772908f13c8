"""What each rank of the vocabulary-parallel test does: compare its results with the whole head on one rank."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import grpo_ext
from grpo_ext.config import LossConfig
from grpo_ext.linear.plan import row_stride

V, H, B, T = 258, 12, 4, 7

CONFIGS: dict[str, LossConfig] = {
    "token": LossConfig(),
    "sequence": LossConfig(loss_type="grpo", importance_sampling_level="sequence"),
    "vespo": LossConfig(loss_type="vespo"),
    "everything": LossConfig(
        loss_type="sapo", beta=0.1, entropy_coef=0.02, temperature=0.8, logit_softcap=5.0, logit_scale=1.3
    ),
    "quantile": LossConfig(top_entropy_quantile=0.6),
}


def data(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    out = {
        "hidden": normal(B, T, H),
        "weight": normal(V, H),
        "bias": normal(V),
        "ids": torch.randint(0, V, (B, T), generator=g).to(device),
        "advantages": normal(B).to(statistics),
        "mask": (torch.rand(B, T, generator=g) > 0.2).to(device),
        "old": -5 + 0.3 * normal(B, T).to(statistics),
    }
    out["hidden"][~out["mask"]] = torch.nan
    # Masked tokens; the second is the first column of a shard, which stands in for targets that lie elsewhere.
    out["bias"][[3, V // 2]] = -torch.inf
    out["ids"][out["ids"] == V // 2] += 1
    return out


def gradients_of(
    what: str, d: dict[str, Tensor], shard: slice, trained: bool, group: Any, budget: int | None
) -> list[Tensor]:
    """Values and gradients, those of the head for `shard`."""
    hidden = d["hidden"].clone().requires_grad_()
    weight, bias = (d[name][shard].clone().requires_grad_(trained) for name in ("weight", "bias"))
    options: dict[str, Any] = {"bias": bias, "process_group": group, "memory_budget": budget}
    if what == "log_softmax":
        logp, entropy = grpo_ext.linear_selective_log_softmax(
            hidden, weight, d["ids"], mask=d["mask"], return_entropy=True, temperature=0.7, **options
        )
        (logp * d["old"] + 0.3 * entropy).sum().backward()
        values = [logp, entropy]
    else:
        config = CONFIGS[what]
        if config.beta:
            options["ref_logps"] = d["old"] + 0.2
        out = grpo_ext.linear_grpo_loss(
            hidden, weight, d["ids"], d["advantages"], d["mask"], config, old_logps=d["old"], **options
        )
        out.loss.backward()
        assert out.entropy is not None
        values = [out.loss, out.logps, out.entropy]
    grads = [leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None]
    return [v.detach() for v in values] + grads


def check_all(group: Any, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shard = slice(rank * V // world, (rank + 1) * V // world)
    for dtype in dtypes:
        d = data(dtype, device)
        for what in ("log_softmax", *CONFIGS):
            for trained in (False, True):
                for budget in (None, 8 * (320 + row_stride(H)) * dtype.itemsize):
                    got = gradients_of(what, d, shard, trained, group, budget)
                    whole = gradients_of(what, d, slice(0, V), trained, None, budget)
                    expected = [t[shard] if t.shape[:1] == (V,) else t for t in whole]
                    assert len(got) == len(expected)
                    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                        tight = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2e-2)
                        torch.testing.assert_close(
                            a, b, rtol=tight, atol=tight * float(b.abs().max()),
                            msg=lambda m, w=(what, trained, budget, i): f"{w}: {m}",
                        )  # fmt: skip


def check_improbable(group: Any, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """Tokens of probabilities down to e^-1e4, whose better alternatives lie on their own rank, on another, or on all;
    against fp64, where the same bits show that ranks agree."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shard = slice(rank * V // world, (rank + 1) * V // world)
    depths = torch.tensor([0.0, 60.0, 69.0, 70.0, 90.0, 225.0, 1e4])
    for dtype in dtypes:
        d = data(dtype, device)
        d["mask"] = torch.ones_like(d["mask"])
        d["hidden"] = torch.nan_to_num(d["hidden"])
        d["hidden"][..., :3] = 0
        d["weight"][:, :3] = 0
        d["ids"] = torch.where(d["bias"][d["ids"]].isinf(), 5, d["ids"])
        d["weight"][d["ids"].unique(), 0] = -1.0  # no better alternative is a target
        for column, better in ((1, [1]), (2, [V - 1])):
            d["weight"][better, column] = 1.0
        for sequence, column in ((0, 0), (1, 1), (2, 2)):
            d["hidden"][sequence, :, column] = depths.to(device, dtype)
        exact = grpo_ext.reference.linear_selective_log_softmax(
            d["hidden"].double(), d["weight"].double(), d["ids"], bias=d["bias"].double()
        )
        assert exact.min() < -9000
        d["old"] = exact.to(d["old"].dtype)  # ratios near 1: every row has a gradient
        results = []
        for trained in (False, True):
            for budget in (None, 8 * (320 + H) * dtype.itemsize):
                got = gradients_of("token", d, shard, trained, group, budget)
                whole = gradients_of("token", d, slice(0, V), trained, None, budget)
                assert ((got[1].double() - exact).abs() <= 2e-5 + 1e-6 * exact.abs()).all()
                results.append(got[1])
                expected = [t[shard] if t.shape[:1] == (V,) else t for t in whole]
                for a, b in zip(got[3:], expected[3:], strict=True):
                    tight = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
                    torch.testing.assert_close(a, b, rtol=tight, atol=tight * float(b.abs().max()))
        everywhere = results[0].new_empty((world, *results[0].shape))
        dist.all_gather_into_tensor(everywhere.view(-1, T), results[0].contiguous(), group=group)
        assert all(torch.equal(r, everywhere[0]) for r in (*results, *everywhere))


UNEQUAL = (200, V)  # where each of two ranks' shards ends


def check_logits(group: Any, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """`selective_log_softmax` of a rank's columns, strided as ``full_logits[:, :-1]``, in equal and unequal shards."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    equal = tuple((r + 1) * V // world for r in range(world))
    for dtype in dtypes:
        d = data(dtype, device)
        logits = torch.nan_to_num(d["hidden"]) @ d["weight"].t() + d["bias"]
        logits = torch.cat([logits, logits[:, :1]], dim=1)
        for ends in (equal, UNEQUAL[:world]):
            shard = slice(ends[rank - 1] if rank else 0, ends[rank])
            results = []
            for columns, given in ((shard, group), (slice(0, V), None)):
                own = logits[..., columns].clone().requires_grad_()
                options: dict[str, Any] = {"temperature": 0.7, "logit_softcap": 5.0, "logit_scale": 1.3}
                logp, entropy = grpo_ext.selective_log_softmax(
                    own[:, :-1], d["ids"], return_entropy=True, process_group=given, **options
                )
                alone = grpo_ext.selective_log_softmax(own[:, :-1], d["ids"], process_group=given, **options)
                assert torch.equal(alone, logp)
                (logp * d["old"] + 0.3 * entropy).sum().backward()
                assert own.grad is not None
                results.append((logp, entropy, own.grad if given is not None else own.grad[..., shard]))
            for name, a, b in zip(("logp", "entropy", "gradient"), *results, strict=True):
                tight = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2e-2)
                torch.testing.assert_close(
                    a,
                    b,
                    rtol=tight,
                    atol=tight * float(b.detach().abs().max()),
                    msg=lambda m, w=(name, ends): f"{w}: {m}",
                )


def check_unequal_head(group: Any) -> None:
    """Shards of a head that differ in size are refused by every rank."""
    rank = dist.get_rank(group)
    size = UNEQUAL[rank] - (UNEQUAL[rank - 1] if rank else 0)
    hidden, weight, ids = torch.zeros(2, 3), torch.zeros(size, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=rf"shards of weight have \[200, {V - 200}\] rows; they must be equal"):
        grpo_ext.linear_selective_log_softmax(hidden, weight, ids, process_group=group)
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="they must be equal"):
        grpo_ext.linear_grpo_loss(hidden.requires_grad_(), weight, ids, ones, ones, LossConfig(), process_group=group)


def check_foreign_ids(group: Any) -> None:
    """An id beyond all shards is refused by every rank, also by the one that has the smaller shard."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    size = UNEQUAL[rank] - (UNEQUAL[rank - 1] if rank else 0)
    ids = torch.tensor([0, V])
    hidden, weight = torch.zeros(2, 3), torch.zeros(V // world, 3)
    message = rf"ids\[.*1\] = {V} is outside \[0, {V}\)"
    with pytest.raises(IndexError, match=message):
        grpo_ext.selective_log_softmax(torch.zeros(2, size), ids, process_group=group)
    with pytest.raises(IndexError, match=message):
        grpo_ext.linear_selective_log_softmax(hidden, weight, ids, process_group=group)


def check_dtensor(device: torch.device) -> None:
    """A head sharded as FSDP2 does: gathered by autograd, its gradient comes back sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    d = data(torch.float32, device)
    d["bias"][3] = 0.0
    for what in (LossConfig(), LossConfig(importance_sampling_level="sequence")):
        weight = distribute_tensor(d["weight"], mesh, [Shard(0)]).requires_grad_()
        twin = d["weight"].clone().requires_grad_()
        for head in (weight, twin):
            grpo_ext.linear_grpo_loss(
                d["hidden"], head, d["ids"], d["advantages"], d["mask"], what, old_logps=d["old"]
            ).loss.backward()
        assert isinstance(weight.grad, DTensor)
        torch.testing.assert_close(weight.grad.full_tensor(), twin.grad)


def main(rank: int, world: int, path: str, kind: str, improbable: bool = False) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{path}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    try:
        dtypes = (torch.float32, torch.bfloat16) if kind == "cuda" else (torch.float64, torch.float32, torch.bfloat16)
        check_all(dist.group.WORLD, device, dtypes)
        if improbable:
            check_improbable(dist.group.WORLD, device, dtypes if kind == "cpu" else (torch.bfloat16,))
        check_logits(dist.group.WORLD, device, dtypes)
        if kind == "cpu":
            check_unequal_head(dist.group.WORLD)
            check_foreign_ids(dist.group.WORLD)
        check_dtensor(device)
        # gloo's threads give the last tensors back a moment after they have said that they are done; an interpreter
        # that ends in between is aborted.
        dist.barrier()
        time.sleep(0.1)
    finally:
        dist.destroy_process_group()
