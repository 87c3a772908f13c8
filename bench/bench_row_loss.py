"""GRPO loss from logits, forward + backward: the compiled loss against plain torch and torch.compile of the same.

    python bench/bench_row_loss.py --device cpu --threads 2

What is measured: the loss on `rows x V` logits that came out of another operation, and its backward up to the moment
the gradient reaches that operation. The operation itself is a stand-in that hands out a buffer and drops the gradient:
it costs nothing, for every candidate alike. Refilling the buffer is outside of the clock.

Loss: dapo (token level, clip 0.2/0.28, one normaliser) with old log probabilities, mask and advantages. The peers
compute that and nothing else; ours also returns entropies and the metrics.

Modes of ours: `inplace` writes the gradient over the logits. `fresh` allocates it: on the CPU every page of a new
`rows x V` tensor is handed out by the kernel on first touch (a large allocation goes back to the system when it is
freed, so this is paid in each step), and that takes longer than the arithmetic. The peers allocate several such
tensors and pay the same for each of them; nothing is subtracted.

Columns: ms is the median over the runs, candidates taken in turn. gbps counts one read of the logits and one write of
the gradient, 2 * rows * V * itemsize, whoever does it; copy_gbps is the rate of a plain copy of as many bytes in the
same process. extra_mb is the peak memory above the logits (see `common.peak_extra_bytes`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

import grpo_ext

CONFIG = grpo_ext.LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


class Producer(torch.autograd.Function):
    """The operation before the loss: gives out a buffer as its result, takes the gradient and drops it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor, keep: list[Tensor] | None) -> Tensor:
        ctx.keep = keep
        # A tensor of its own on the buffer's memory: neither a view nor an input, like the result of a real operation.
        return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, buffer.shape, buffer.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        if ctx.keep is not None:
            ctx.keep.append(grad[0, :4].float().clone())
        return None, None, None


def torch_loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The same loss as one writes it in torch: log-softmax, gather, clip, normalise."""
    logps = torch.log_softmax(logits.float(), dim=-1).gather(-1, inputs["ids"].unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logps - inputs["old"])
    advantages = inputs["advantages"].unsqueeze(1)
    clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return (loss * inputs["mask"]).sum() / inputs["mask"].sum().clamp(min=1)


def our_loss(inplace: bool) -> Loss:
    def loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return grpo_ext.grpo_loss(
            logits,
            inputs["ids"],
            inputs["advantages"],
            inputs["mask"],
            CONFIG,
            old_logps=inputs["old"],
            inplace=inplace,
        ).loss

    return loss


def candidates(wanted: list[str]) -> dict[str, Loss]:
    """Losses by name. A peer that is not installed is left out, with a line that says so."""
    known: dict[str, Callable[[], Loss]] = {
        "inplace": lambda: our_loss(inplace=True),
        "fresh": lambda: our_loss(inplace=False),
        "eager": lambda: torch_loss,
        "compile": lambda: torch.compile(torch_loss, fullgraph=True),
    }
    chosen: dict[str, Loss] = {}
    for name in wanted:
        try:
            chosen[name] = known[name]()
        except ImportError as missing:
            print(f"{name}: left out, {missing}")
    return chosen


def make_inputs(rows: int, vocab: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """fp32 logits `(B,T,V)` of the spread of a language model's, and what goes with them; ratios around 1."""
    generator = torch.Generator(device=device).manual_seed(0)
    batch = next(b for b in (8, 4, 2, 1) if rows % b == 0)
    shape = (batch, rows // batch)
    logits = torch.randn(*shape, vocab, generator=generator, device=device).mul_(3)
    ids = torch.randint(0, vocab, shape, generator=generator, device=device)
    old = grpo_ext.reference.selective_log_softmax(logits, ids)
    assert isinstance(old, Tensor)
    old = old + 0.2 * torch.randn(shape, generator=generator, device=device)
    mask = torch.rand(shape, generator=generator, device=device) < 0.9
    advantages = torch.randn(batch, generator=generator, device=device)
    return logits, {"ids": ids, "old": old, "mask": mask, "advantages": advantages}


def check_gradients(prepare: dict[str, Callable[..., Callable[[], Any]]], dtype: torch.dtype) -> None:
    """Every candidate must give the gradient of the first peer, or the comparison means nothing."""
    rows: dict[str, Tensor] = {}
    for name, prepared in prepare.items():
        kept: list[Tensor] = []
        prepared(kept)()
        rows[name] = kept[0]
    expected = rows.get("eager", next(iter(rows.values())))
    tolerance = {"rtol": 2e-2, "atol": 1e-6} if dtype != torch.float32 else {"rtol": 1e-3, "atol": 1e-8}
    for name, got in rows.items():
        torch.testing.assert_close(got, expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def measure(name_of_dtype: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    dtype = common.DTYPES[name_of_dtype]
    exact, inputs = make_inputs(args.rows, args.vocab, device)
    source = exact.to(dtype)
    del exact
    buffer = source.clone()
    anchor = torch.zeros((), device=device, requires_grad=True)
    nbytes = 2 * source.numel() * source.element_size()

    def preparing(loss: Loss) -> Callable[..., Callable[[], Any]]:
        def prepare(keep: list[Tensor] | None = None) -> Callable[[], Any]:
            buffer.copy_(source)
            logits = [Producer.apply(anchor, buffer, keep)]
            # The list lets go of the logits, as a model's forward does when it returns.
            return lambda: loss(logits.pop(), inputs).backward()

        return prepare

    prepared = {name: preparing(loss) for name, loss in candidates(args.candidates.split(",")).items()}
    check_gradients(prepared, dtype)
    timings = common.interleaved(prepared, device, warmup=args.warmup, runs=args.runs)
    ceiling = common.copy_rate(nbytes // 2, device)
    where = common.machine(device)
    rows = []
    for name, timing in timings.items():
        row = {
            **where,
            "rows": args.rows,
            "vocab": args.vocab,
            "dtype": name_of_dtype,
            "mode": name,
            "ms": timing.median,
            "ms_min": timing.minimum,
            "runs": args.runs,
            "gbps": nbytes / timing.median / 1e6,
            "copy_gbps": ceiling,
            "extra_mb": common.peak_extra_bytes(prepared[name], device) / 1e6,
            "logits_mb": nbytes / 2e6,
        }
        for peer in ("eager", "compile"):
            row[f"x_{peer}"] = timings[peer].median / timing.median if peer in timings else float("nan")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rows", type=int, default=1024, help="tokens")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary; 49,152 is SmolLM2's")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--candidates", default="inplace,fresh,eager,compile")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=None, help="default: bench/results/row_loss_<device>.csv")
    parser.add_argument("--append", action="store_true", help="keep the lines already in the CSV")
    args = parser.parse_args()

    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    results = [row for dtype in args.dtypes.split(",") for row in measure(dtype, args, device)]
    path = args.csv or common.RESULTS / f"row_loss_{args.device}.csv"
    common.write_csv(path, results, append=args.append)
    print(f"{results[0]['device']}, {results[0]['cpu']} ({results[0]['isa']}), {args.threads} threads")
    common.print_table(
        results,
        ("rows", "vocab", "dtype", "mode", "ms", "ms_min", "x_eager", "x_compile", "gbps", "copy_gbps", "extra_mb"),
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
