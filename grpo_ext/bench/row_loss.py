"""Time the GRPO loss from logits, forward and backward, against plain torch and torch.compile.

    python -m grpo_ext.bench.row_loss --device cpu --threads 2
    python -m grpo_ext.bench.row_loss --device cuda --rows 8192 --vocab 32000,49152,128256,151936,262144 --dtypes bf16 \
        --masked 0 --candidates inplace,fresh,op_inplace,op_fresh,op_stats,sequence,eager,liger,liger_sequence

The clock covers the loss on `rows x V` logits and its backward, until the gradient reaches the operation that produced
the logits. That operation is a stub: it returns a buffer, ignores the gradient, and costs the same for every candidate.
Refilling the buffer is not measured.

On the GPU a short wait is enqueued before the clock starts, so that the host runs ahead and host time is not measured.
`--host` measures only host time. `op_*` are the operators without autograd: loss and gradient in place (`op_inplace`)
or allocated (`op_fresh`), or only log probabilities and entropies (`op_stats`). `sequence` is the off-policy loss at
sequence level: statistics, policy loss, gradient. `liger` is liger-kernel's Triton loss, in place; it needs one extra
position per sequence, which it does not read.

Loss: dapo (token level, clip 0.2/0.28, one divisor) with old log probabilities, mask and advantages. The peers compute
only the loss; ours also returns entropies and metrics.

Our modes: `inplace` writes the gradient over the logits; `fresh` allocates the gradient. On the CPU a new `rows x V`
tensor costs page faults on first touch, which take longer than the arithmetic. Every step pays them, because the
allocator returns large freed blocks to the system. The peers allocate several such tensors and pay for each of them;
nothing is subtracted.

Columns: ms is the median over the runs, candidates interleaved. gbps counts the bytes that must move: V * itemsize for
each read of an unmasked row (one read; two for `sequence`) and for each row of gradient written. copy_gbps is the rate
of a plain copy of the logits in the same process, and of_copy is gbps / copy_gbps. of_read, for `op_stats`, is gbps
divided by the rate at which torch.sum reads the same bytes. extra_mb is the peak memory above the logits
(`common.peak_extra_bytes`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grpo_ext
from grpo_ext import _ops
from grpo_ext.bench import common

CONFIG = grpo_ext.LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


class Producer(torch.autograd.Function):
    """Stub of the operation before the loss: returns a buffer as its result and ignores the gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor, keep: list[Tensor] | None) -> Tensor:
        ctx.keep = keep
        # A new tensor on the buffer's memory: neither a view nor an input, like the result of a real operation.
        return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, buffer.shape, buffer.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        if ctx.keep is not None:
            ctx.keep.append(grad[0, :4].float().clone())
        return None, None, None


def torch_loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the loss in plain torch: log-softmax, gather, clip, divide."""
    logps = torch.log_softmax(logits.float(), dim=-1).gather(-1, inputs["ids"].unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logps - inputs["old"])
    advantages = inputs["advantages"].unsqueeze(1)
    clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return (loss * inputs["mask"]).sum() / inputs["mask"].sum().clamp(min=1)


def our_loss(inplace: bool, level: str = "token") -> Loss:
    config = CONFIG.replace(importance_sampling_level=level)

    def loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return grpo_ext.grpo_loss(
            logits,
            inputs["ids"],
            inputs["advantages"],
            inputs["mask"],
            config,
            old_logps=inputs["old"],
            inplace=inplace,
        ).loss

    return loss


def liger_loss(level: str) -> Loss:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return triton_grpo_loss(
            logits,
            inputs["old"],
            None,
            inputs["ids"],
            inputs["advantages"],
            inputs["mask"],
            temperature=1.0,
            beta=0.0,
            eps_low=CONFIG.epsilon,
            eps_high=CONFIG.clip_high,
            inplace=True,
            loss_type="dapo",
            importance_sampling_level=level,
            reduce=True,
        )[0]

    return loss


@dataclasses.dataclass
class Candidate:
    """A way to compute the loss. `reads`, `writes`: how often an unmasked row must be read, a row written."""

    loss: Loss | None
    level: str = "token"
    reads: int = 1
    writes: int = 1
    extra_position: bool = False
    operator: str = ""  # "inplace", "fresh" or "stats": the operator, without autograd


def candidates(wanted: list[str]) -> dict[str, Candidate]:
    """Build losses by name; print a line for a peer that is not installed and skip it."""
    known: dict[str, Callable[[], Candidate]] = {
        "inplace": lambda: Candidate(our_loss(inplace=True)),
        "fresh": lambda: Candidate(our_loss(inplace=False)),
        "op_inplace": lambda: Candidate(None, operator="inplace"),
        "op_fresh": lambda: Candidate(None, operator="fresh"),
        "op_stats": lambda: Candidate(None, operator="stats", writes=0),
        "sequence": lambda: Candidate(our_loss(True, "sequence"), level="sequence", reads=2),
        "eager": lambda: Candidate(torch_loss),
        "compile": lambda: Candidate(torch.compile(torch_loss, fullgraph=True)),
        "liger": lambda: Candidate(liger_loss("token"), extra_position=True),
        "liger_sequence": lambda: Candidate(liger_loss("sequence"), "sequence", 2, extra_position=True),
    }
    chosen: dict[str, Candidate] = {}
    for name in wanted:
        try:
            chosen[name] = known[name]()
        except ImportError as missing:
            print(f"{name}: skipped, {missing}")
    return chosen


def make_inputs(rows: int, vocab: int, masked: float, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Random fp32 logits `(B,T,V)`, spread like a language model's, and loss inputs with ratios around 1."""
    generator = torch.Generator(device=device).manual_seed(0)
    batch = next(b for b in (8, 4, 2, 1) if rows % b == 0)
    shape = (batch, rows // batch)
    logits = torch.randn(*shape, vocab, generator=generator, device=device).mul_(3)
    ids = torch.randint(0, vocab, shape, generator=generator, device=device)
    old = grpo_ext.selective_log_softmax(logits, ids)
    assert isinstance(old, Tensor)
    old = old + 0.2 * torch.randn(shape, generator=generator, device=device)
    mask = torch.rand(shape, generator=generator, device=device) >= masked
    advantages = torch.randn(batch, generator=generator, device=device)
    return logits, {"ids": ids, "old": old, "mask": mask, "advantages": advantages}


def check_gradients(
    prepare: dict[str, Callable[..., Callable[[], Any]]], chosen: dict[str, Candidate], dtype: torch.dtype
) -> None:
    """Raise an error if a candidate's gradient differs from `eager` (or the first candidate) of its level."""
    rows: dict[str, dict[str, Tensor]] = {}
    for name, prepared in prepare.items():
        kept: list[Tensor] = []
        prepared(kept)()
        if kept:
            rows.setdefault(chosen[name].level, {})[name] = kept[0]
    rtol, atol = (2e-2, 1e-6) if dtype != torch.float32 else (1e-3, 1e-8)
    for found in rows.values():
        expected = found.get("eager", next(iter(found.values())))
        for name, got in found.items():
            name_it = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=name_it)


def operator_call(which: str, logits: Tensor, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    kernels = torch.ops.grpo_ext
    transform, spec = _ops.logit_transform(1.0, None, 1.0), _ops.loss_spec(CONFIG, 1.0)
    if which == "stats":
        return lambda: kernels.row_stats(logits, inputs["ids"], inputs["mask"], transform, True)
    arguments = (inputs["ids"], inputs["mask"], inputs["advantages"], inputs["old"], *[None] * 5, spec, transform)
    if which == "inplace":
        return lambda: kernels.row_loss_(logits, *arguments)
    return lambda: kernels.row_loss(logits, *arguments, True)


def measure(name_of_dtype: str, vocab: int, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    dtype = common.DTYPES[name_of_dtype]
    exact, inputs = make_inputs(args.rows, vocab, args.masked, device)
    source = exact.to(dtype)
    del exact
    chosen = candidates(args.candidates.split(","))
    buffer = source.clone()
    longer = None
    if any(c.extra_position for c in chosen.values()):
        longer = torch.cat([source, source[:, :1]], dim=1)
    anchor = torch.zeros((), device=device, requires_grad=True)
    row_bytes = vocab * source.element_size()
    valid = int(inputs["mask"].sum())

    def preparing(candidate: Candidate) -> Callable[..., Callable[[], Any]]:
        def prepare(keep: list[Tensor] | None = None) -> Callable[[], Any]:
            if candidate.operator:
                buffer.copy_(source)
                return operator_call(candidate.operator, buffer, inputs)
            loss = candidate.loss
            assert loss is not None
            if candidate.extra_position:
                assert longer is not None
                longer[:, :-1].copy_(source)
                logits = [Producer.apply(anchor, longer, keep)]
            else:
                buffer.copy_(source)
                logits = [Producer.apply(anchor, buffer, keep)]
            # Popping drops the reference to the logits, as a model's forward does when it returns.
            return lambda: loss(logits.pop(), inputs).backward()

        return prepare

    prepared = {name: preparing(candidate) for name, candidate in chosen.items()}
    check_gradients(prepared, chosen, dtype)
    timings = common.interleaved(prepared, device, warmup=args.warmup, runs=args.runs)
    ceiling = common.copy_rate(args.rows * row_bytes, device)
    reading = common.read_rate(args.rows * row_bytes, device)
    where = common.machine(device)
    if device.type == "cuda":
        where |= {"driver": common.driver_version(), "cuda": torch.version.cuda}
    rows = []
    for name, timing in timings.items():
        candidate = chosen[name]
        nbytes = row_bytes * (valid * candidate.reads + args.rows * candidate.writes)
        row = {
            **where,
            "rows": args.rows,
            "valid": valid,
            "vocab": vocab,
            "dtype": name_of_dtype,
            "mode": name,
            "ms": timing.median,
            "ms_min": timing.minimum,
            "runs": args.runs,
            "gbps": nbytes / timing.median / 1e6,
            "copy_gbps": ceiling,
            "of_copy": nbytes / timing.median / 1e6 / ceiling,
            "of_read": float("nan") if candidate.writes else nbytes / timing.median / 1e6 / reading,
            "extra_mb": common.peak_extra_bytes(prepared[name], device) / 1e6,
            "logits_mb": args.rows * row_bytes / 1e6,
        }
        for peer in ("eager", "compile", "liger"):
            other = "liger_sequence" if peer == "liger" and candidate.level == "sequence" else peer
            row[f"x_{peer}"] = timings[other].median / timing.median if other in timings else float("nan")
        rows.append(row)
    return rows


def host_cost(device: torch.device, rows: int = 8, vocab: int = 1024, runs: int = 300) -> None:
    """Host microseconds of one forward and backward, without synchronization: minimum over several bursts."""
    exact, inputs = make_inputs(rows, vocab, 0.0, device)
    leaf = exact.requires_grad_()
    loss = our_loss(inplace=False)

    def ours() -> None:
        leaf.grad = None
        loss(leaf, inputs).backward()

    def shortest() -> None:  # baseline: a multiplication, a sum and their backward in torch
        leaf.grad = None
        (leaf * 1.0).sum().backward()

    for name, call in (("forward + backward", ours), ("torch: (x * 1).sum().backward()", shortest)):
        bursts = []
        for _ in range(8):
            common.synchronize(device)
            begin = time.perf_counter()
            for _ in range(runs // 8):
                call()
            bursts.append((time.perf_counter() - begin) / (runs // 8) * 1e6)
        print(f"host, {rows} rows, {name}: {min(bursts):.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rows", type=int, default=1024, help="tokens")
    parser.add_argument("--vocab", default="49152", help="vocabularies, e.g. 32000,49152; 49,152 is SmolLM2's")
    parser.add_argument("--masked", type=float, default=0.1, help="share of rows with mask 0")
    parser.add_argument("--host", action="store_true", help="measure only the host time of a call with 8 rows")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--candidates", default="inplace,fresh,eager,compile")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=None, help="default: bench/results/row_loss_<device>.csv")
    parser.add_argument("--append", action="store_true", help="keep the lines already in the CSV")
    args = parser.parse_args()

    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    if args.host:
        host_cost(device)
        return
    results = []
    for dtype in args.dtypes.split(","):
        for vocab in args.vocab.split(","):
            results += measure(dtype, int(vocab), args, device)
    path = args.csv or common.RESULTS / f"row_loss_{args.device}.csv"
    common.write_csv(path, results, append=args.append)
    print(f"{results[0]['device']}, {results[0]['cpu']} ({results[0]['isa']}), {args.threads} threads")
    columns = "rows valid vocab dtype mode ms ms_min x_eager x_compile x_liger gbps of_copy of_read extra_mb"
    common.print_table(results, columns.split())
    print(f"written to {path}")


if __name__ == "__main__":
    main()
