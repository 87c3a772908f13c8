"""Measure the training phase with the same completions: time, tokens per second, memory, forwards, agreement."""

from __future__ import annotations

import dataclasses
import math
import traceback
from pathlib import Path
from typing import Any

import torch

from grpo_ext.bench import common
from grpo_ext.bench import training_setup as setup
from grpo_ext.bench.training_case import Case
from grpo_ext.bench.training_setup import Measured
from grpo_ext.bench.training_workload import Workload, build_tokenizer

GIB = 2**30


def measure(case: Case, candidates: list[str], lengths: str, args: Any) -> list[dict[str, Any]]:
    """Measure each candidate; its loss and gradient norm must agree with those of the first candidate."""
    device = torch.device(case.device)
    workload = Workload(case.shape.vocabulary, args.prompts, args.group, args.tokens, lengths == "spread")
    tokenizer = build_tokenizer(case.shape.vocabulary)
    model = case.build()
    workload.attach_logps(model, device)
    del model
    setup.release_memory(device)
    rows: list[dict[str, Any]] = []
    first: Measured | None = None
    for name in candidates:
        try:
            found = setup.run_candidate(name, case, workload, tokenizer)
        except Exception:  # the other candidates are still measured
            traceback.print_exc()
            found = None
        if found is None:
            setup.release_memory(device)
            args.failed.append(name)
            continue
        first = first or found
        rows.append(row_of(name, case, lengths, workload, found, first, args.warmup) | setup.versions(device))
        common.print_table(rows[-1:], TABLE)
    return rows


TABLE = (
    "candidate", "model", "trained", "lengths", "training_s", "step_s", "tokens_per_s", "forwards", "peak_gib", "loss",
    "grad_norm", "agrees",
)  # fmt: skip


def row_of(
    name: str, case: Case, lengths: str, workload: Workload, found: Measured, first: Measured, warmup: int
) -> dict[str, Any]:
    seconds = setup.median(found.training_seconds(warmup))
    return {
        "candidate": name,
        "model": case.model,
        "trained": case.trained,
        "lengths": lengths,
        "micro_batch": case.micro_batch,
        "completions": workload.rows,
        "max_tokens": workload.tokens,
        "completion_tokens": workload.completion_tokens,
        "all_tokens": workload.all_tokens,
        "beta": case.beta,
        "dtype": case.dtype,
        "training_s": seconds,
        "training_s_all": " ".join(f"{value:.4g}" for value in found.training_seconds(0)),
        "step_s": setup.median(found.step_seconds[warmup:]),
        "tokens_per_s": workload.all_tokens / seconds,
        "completion_tokens_per_s": workload.completion_tokens / seconds,
        "step_tokens_per_s": workload.all_tokens / setup.median(found.step_seconds[warmup:]),
        "forwards": found.forwards[-1] / found.micro_batches,
        "forwards_per_step": found.forwards[-1],
        "peak_gib": found.peak_bytes / GIB,
        "weights_gib": found.before_bytes / GIB,
        "loss": found.losses[0],
        "grad_norm": found.grad_norms[0],
        "agrees": agree(found, first, case.dtype),
        "note": found.note,
    }


def agree(found: Measured, first: Measured, dtype: str) -> bool:
    """Whether loss and gradient norm of the first step agree with those of the first candidate, up to rounding.

    The loss is a mean of importance weights times advantages: its bf16 bound, 0.01, is about the noise of a bf16 log
    probability. The gradient norm also depends on the order of additions and on the micro-batches.
    """
    return close(found.losses[0], first.losses[0], found.grad_norms[0], first.grad_norms[0], dtype)


def close(loss: float, other_loss: float, norm: float, other_norm: float, dtype: str) -> bool:
    """Compare losses and gradient norms with the bounds that `agree` explains."""
    loss_bound, norm_bound = (1e-2, 5e-2) if dtype == "bf16" else (1e-5, 1e-3)
    return abs(loss - other_loss) <= loss_bound and math.isclose(norm, other_norm, rel_tol=norm_bound)


def phase(args: Any) -> bool:
    """Measure all cases; False if a candidate failed or disagreed."""
    rows: list[dict[str, Any]] = []
    args.failed = []
    path = Path(args.output) / f"training_phase_{args.device}.csv"
    for model, trained, micro_batch, only in args.cases:
        case = case_of(args, model, trained, micro_batch)
        for lengths in [only] if only else args.lengths:
            rows += measure(case, args.candidates, lengths, args)
            if rows:
                common.write_csv(path, rows)  # after each case, so that a later failure loses nothing
    print(f"\nwritten to {path}")
    common.print_table(with_ratio(rows), (*TABLE, "x_trl"))
    return not args.failed and all(row["agrees"] for row in rows)


def case_of(args: Any, model: str, trained: str, micro_batch: int) -> Case:
    return Case(
        model=model,
        trained=trained,
        micro_batch=micro_batch,
        steps=args.warmup + args.steps,
        beta=args.beta,
        dtype=args.dtype,
        device=args.device,
        layers=args.layers,
        vocabulary=args.vocabulary,
    )


def with_ratio(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``x_trl`` to the rows: TRL's seconds divided by the candidate's, for the same case."""
    same = ("model", "trained", "lengths", "micro_batch")
    trl = {tuple(r[k] for k in same): r["training_s"] for r in rows if r["candidate"] == "trl"}
    return [r | {"x_trl": trl.get(tuple(r[k] for k in same), math.nan) / r["training_s"]} for r in rows]


def longest(args: Any) -> bool:
    """Find the longest completion with which a micro-batch fits in memory, for each candidate.

    Memory grows linearly with the length, so two short steps predict the limit. ``--probes`` further steps bracket the
    limit and bisect.
    """
    rows: list[dict[str, Any]] = []
    path = Path(args.output) / f"training_longest_{args.device}.csv"
    device = torch.device(args.device)
    capacity = args.capacity or (torch.cuda.get_device_properties(0).total_memory / GIB if device.type == "cuda" else 0)
    for model, trained, micro_batch, _ in args.cases:
        case = dataclasses.replace(case_of(args, model, trained, micro_batch), steps=1)
        for name in args.candidates:
            rows += find_longest(name, case, capacity, args)
            common.write_csv(path, rows)
    common.print_table(rows, ("candidate", "model", "micro_batch", "tokens", "fits", "peak_gib", "seconds"))
    print(f"written to {path}")
    return True


def find_longest(name: str, case: Case, capacity: float, args: Any) -> list[dict[str, Any]]:
    tokenizer = build_tokenizer(case.shape.vocabulary)
    rows: list[dict[str, Any]] = []

    def probe(tokens: int) -> float | None:
        """Peak GiB of a step, None if it does not fit."""
        workload = Workload(case.shape.vocabulary, 1, case.micro_batch, tokens, spread=False)
        workload.logps = [[[-12.0] * tokens for _ in range(case.micro_batch)]]
        peak, seconds = None, math.nan
        try:
            found = setup.run_candidate(name, case, workload, tokenizer)
            peak, seconds = found.peak_bytes / GIB, found.step_seconds[0]
            if args.capacity and peak > args.capacity:
                peak = None
        except torch.OutOfMemoryError:
            pass
        setup.release_memory(torch.device(case.device))
        rows.append(
            {"candidate": name, "model": case.model, "trained": case.trained, "micro_batch": case.micro_batch,
             "tokens": tokens, "fits": peak is not None, "peak_gib": peak or math.nan, "seconds": seconds,
             **setup.versions(torch.device(case.device))}
        )  # fmt: skip
        common.print_table(rows[-1:], ("candidate", "model", "tokens", "fits", "peak_gib", "seconds"))
        return peak

    start = args.tokens
    low, high = probe(start), probe(2 * start)
    if low is None or high is None or math.isnan(low):
        return rows
    slope = (high - low) / start
    # 1.5 GiB are not usable: fragments, the CUDA context, the workspace of cuBLAS.
    guess = int((capacity - 1.5 - low) / slope + start) // 64 * 64
    fits, fails = 2 * start, None
    for number in range(args.probes):
        if number and fails is not None:
            guess = (fits + fails) // 2 // 64 * 64
        elif number:
            guess = int(fits * 1.04) // 64 * 64
        if guess <= fits or (fails is not None and guess >= fails):
            break
        if probe(guess) is None:
            fails = guess
        else:
            fits = guess
    return rows
