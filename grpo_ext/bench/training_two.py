"""Compare two GPUs with one: a training step under DDP and FSDP2, and the vocabulary-parallel loss.

Each measurement is a separate `torch.distributed.run` with one process per GPU.
"""

from __future__ import annotations

import csv
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import grpo_ext
from grpo_ext.bench import common
from grpo_ext.bench import training_setup as setup
from grpo_ext.bench.training_phase import GIB, case_of, close, row_of
from grpo_ext.bench.training_workload import Workload, build_tokenizer

KINDS = ("ddp", "fsdp2", "vocabulary")

#: Further arguments of the trainers for FSDP2.
SHARDED = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


def two(args: Any) -> bool:
    """Launch each kind with one process, then with ``--processes``; with ``--worker`` run as one of them."""
    if args.worker is not None:
        return worker(args)
    output = Path(args.output)
    good = True
    for kind in args.kinds:
        for world in (1, args.processes) if kind != "fsdp2" else (args.processes,):
            good &= launch(args, kind, world, output)
    return good & same_as_one(output / f"training_two_steps_{args.device}.csv")


def same_as_one(path: Path) -> bool:
    """Whether loss and gradient norm agree with the one-process row of the same case, if there is one."""
    if not path.is_file():
        return True
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    of_one = {case_in(row): row for row in rows if row["processes"] == "1"}
    different = []
    for row in rows:
        one = of_one.get(case_in(row), row)
        losses, norms = (float(row["loss"]), float(one["loss"])), (float(row["grad_norm"]), float(one["grad_norm"]))
        if not close(*losses, *norms, row["dtype"]):
            different.append(row)
    for row in different:
        print(f"{row['kind']} on {row['processes']}: another loss or gradient norm than one process")
    return not different


def case_in(row: dict[str, str]) -> tuple[str, ...]:
    names = ("candidate", "model", "trained", "lengths", "micro_batch", "completions", "max_tokens", "dtype")
    return tuple(row[name] for name in names)


def launch(args: Any, kind: str, world: int, output: Path) -> bool:
    same = [f"--{name}={value}" for name in ("device", "dtype", "prompts", "group", "tokens", "steps", "warmup", "rows",
            "hidden", "wide", "runs", "threads", "output") if (value := getattr(args, name)) is not None]  # fmt: skip
    for name in ("layers", "vocabulary"):
        if getattr(args, name) is not None:
            same.append(f"--{name}={getattr(args, name)}")
    same.append("--candidates=" + ",".join(args.candidates))
    same.append("--cases=" + ",".join(":".join(map(str, part)).rstrip(":") for part in args.cases))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
        "-m",
        "grpo_ext.bench.training",
        "two",
    ]
    return subprocess.run([*command, *same, f"--worker={kind}"], check=False).returncode == 0


def worker(args: Any) -> bool:
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if args.device == "cuda":
        torch.cuda.set_device(local)
    rows = vocabulary(args, world) if args.worker == "vocabulary" else step(args, world)
    if rows:
        name = "vocabulary" if args.worker == "vocabulary" else "steps"
        common.write_csv(Path(args.output) / f"training_two_{name}_{args.device}.csv", rows, append=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return True


def step(args: Any, world: int) -> list[dict[str, Any]]:
    """Measure an optimizer step whose completions are divided among the processes."""
    device = torch.device(args.device)
    rows = []
    for model, trained, micro_batch, lengths in args.cases:
        case = case_of(args, model, trained, micro_batch)
        workload = Workload(case.shape.vocabulary, args.prompts, args.group, args.tokens, lengths != "equal")
        tokenizer = build_tokenizer(case.shape.vocabulary)
        plain = case.build()
        workload.attach_logps(plain, device)
        del plain
        extra = SHARDED if args.worker == "fsdp2" else {}
        for name in args.candidates:
            found = setup.run_candidate(name, case, workload, tokenizer, world=world, extra=extra)
            if int(os.environ["RANK"]) == 0:
                row = row_of(name, case, lengths or "spread", workload, found, found, args.warmup)
                rows.append({"kind": args.worker, "processes": world} | row | setup.versions(device))
                columns = ("kind", "processes", "candidate", "training_s", "tokens_per_s", "peak_gib", "loss")
                common.print_table(rows[-1:], columns)
    return rows


def vocabulary(args: Any, world: int) -> list[dict[str, Any]]:
    """Measure `linear_grpo_loss` with the head sharded over the processes, and check its gradient."""
    device = torch.device(args.device)
    dtype = common.DTYPES[args.dtype]
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank = dist.get_rank()
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(args.rows, args.hidden, device=device, generator=generator).to(dtype)
    weight = (torch.randn(args.wide, args.hidden, device=device, generator=generator) / args.hidden**0.5).to(dtype)
    ids = torch.randint(0, args.wide, (8, args.rows // 8), device=device, generator=generator)
    hidden = hidden.view(8, -1, args.hidden)
    advantages = torch.randn(8, device=device, generator=generator)
    mask = torch.ones_like(ids)
    share = args.wide // world
    own = weight[rank * share : (rank + 1) * share].clone()
    config = grpo_ext.LossConfig(loss_type="dapo")
    group = dist.group.WORLD if world > 1 else None

    def call(head: torch.Tensor, process_group: Any, trained: bool) -> tuple[torch.Tensor, torch.Tensor, Any]:
        left = hidden.detach().requires_grad_()
        right = head.detach().requires_grad_(trained)
        out = grpo_ext.linear_grpo_loss(left, right, ids, advantages, mask, config, process_group=process_group)
        out.loss.backward()
        assert left.grad is not None
        return out.loss.detach(), left.grad, right.grad

    rows = []
    for trained in (False, True):
        loss, gradient, dweight = call(own, group, trained)
        alone_loss, alone, alone_dweight = call(weight, None, trained)
        difference = float((gradient.float() - alone.float()).norm() / alone.float().norm())
        bound = 1e-2 if dtype != torch.float32 else 1e-5
        assert abs(float(loss) - float(alone_loss)) <= bound * max(1.0, abs(float(alone_loss)))
        assert difference <= bound, difference
        if trained:
            mine = alone_dweight[rank * share : (rank + 1) * share].float()
            assert float((dweight.float() - mine).norm() / mine.norm()) <= bound
        del alone, alone_dweight, gradient, dweight
        prepared = {"loss": functools.partial(functools.partial, call, own, group, trained)}
        dist.barrier()
        timing = common.interleaved(prepared, device, warmup=2, runs=args.runs)["loss"]
        dist.barrier()
        extra = common.peak_extra_bytes(prepared["loss"], device)
        if rank == 0:
            rows.append(
                {"processes": world, "head": "trained" if trained else "frozen", "rows": args.rows,
                 "hidden": args.hidden, "vocabulary": args.wide, "dtype": args.dtype, "ms": timing.median,
                 "head_gib": own.numel() * own.element_size() / GIB, "extra_gib": extra / GIB,
                 "gradient_difference": difference, **setup.versions(device)}
            )  # fmt: skip
            columns = ("processes", "head", "ms", "head_gib", "extra_gib", "gradient_difference")
            common.print_table(rows[-1:], columns)
    return rows
