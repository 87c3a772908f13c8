"""Time the GRPO loss from hidden states and LM head, forward and backward, against the bare matrix products.

    python -m grpo_ext.bench.linear                                        # CPU: 1024 rows, H 576, V 49152, fp32
    python -m grpo_ext.bench.linear --device cuda                          # the four shapes of docs/benchmarks.md, bf16
    python -m grpo_ext.bench.linear --device cuda --masked 0.27 --shapes 2048x151936
    python -m grpo_ext.bench.linear --device cuda --improbable 1           # one token below e^-44, recentred

F = 2 * rows * H * V operations. A frozen head needs two products of F each (logits, gradient of the hidden states); a
trained head needs three. `bare` runs only these products, unchunked, in the same run and interleaved with the
candidates. `ratio` is the median time divided by the median of `bare`.

Loss: dapo (token level, clip 0.2/0.28) with old log probabilities, mask and advantages. Candidates:

    loss       linear_grpo_loss with the number of valid rows (valid_rows=), as the trainer passes it
    loss_asks  loss without valid_rows=: on a GPU the call synchronizes to count the valid rows
    loss_fp32  loss with logits_dtype="float32"
    loss_512   loss with a memory budget of 512 MiB
    sequence   loss_asks at sequence level: a row's coefficient depends on the whole sequence. A trained head then needs
               whole completions in a chunk, and the call synchronizes to read their lengths
    sequence_told  sequence with valid_rows=
    logps      linear_selective_log_softmax, then the loss in torch: the upstream gradient is unknown in forward
    forward    log probabilities without gradient; its ratio is to one bare product
    trl        logps with TRL's (1.16) ChunkedLogProb
    liger      LigerFusedLinearGRPOLoss of Liger-Kernel (CUDA)
    liger_cute logps with LigerFusedLinearScaledCrossEntropyFunction of Liger-Kernel, its CuTe kernels (Hopper, bf16).
               A frozen head costs as much as a trained one
    quack      chunked_linear_cross_entropy of QuACK (Hopper): plain cross entropy of all rows, a different loss with
               less work
    quack_exp  the same by QuACK's scaled-exponential pipeline, scaled_exp_linear_cross_entropy (Hopper, bf16)

A peer whose package is missing or does not support the device is reported as absent.

On a Hopper GPU our candidates use the probability route (docs/inside/probabilities.md). The suffix ``:logits`` selects
the logits route: ``--candidates loss,loss:logits``.

Columns: extra_mb is the peak memory above the memory in use before, outputs included (`common.peak_extra_bytes`);
logp_error is the largest difference of a log probability from fp64, over 64 rows; gradient_error the largest relative
error of a row's gradient of the hidden states, up to the row's factor in the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grpo_ext
from grpo_ext.bench import common
from grpo_ext.bench.linear_peers import CONFIG, PEERS, Inputs, Loss, torch_loss, version_of
from grpo_ext.linear.plan import Numerics
from grpo_ext.linear.routes import choose_route, select_route
from grpo_ext.linear.routes.probabilities import ProbabilityRoute

SHAPES = {"cpu": "576x49152", "cuda": "576x49152,1024x151936,2048x151936,4096x151936"}


def our_loss(config: grpo_ext.LossConfig = CONFIG, pass_valid_rows: bool = True, **options: Any) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        out = grpo_ext.linear_grpo_loss(
            hidden, weight, inputs["ids"], inputs["advantages"], inputs["mask"], config, old_logps=inputs["old"],
            valid_rows=int(inputs["valid"]) if pass_valid_rows else None, **options,
        )  # fmt: skip
        return out.loss, out.logps

    return loss


def our_logps(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    logps = grpo_ext.linear_selective_log_softmax(
        hidden, weight, inputs["ids"], mask=inputs["mask"], valid_rows=int(inputs["valid"])
    )
    assert isinstance(logps, Tensor)
    return torch_loss(logps, inputs), logps


def our_forward(hidden: Tensor, weight: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logps = grpo_ext.linear_selective_log_softmax(
            hidden, weight, inputs["ids"], mask=inputs["mask"], valid_rows=int(inputs["valid"])
        )
    assert isinstance(logps, Tensor)
    return logps, logps


KNOWN: dict[str, Callable[[], Loss]] = {
    "loss": our_loss,
    "loss_asks": lambda: our_loss(pass_valid_rows=False),
    "loss_fp32": lambda: our_loss(logits_dtype="float32"),
    "loss_512": lambda: our_loss(memory_budget=512 << 20),
    "sequence": lambda: our_loss(CONFIG.replace(importance_sampling_level="sequence"), pass_valid_rows=False),
    "sequence_told": lambda: our_loss(CONFIG.replace(importance_sampling_level="sequence")),
    "logps": lambda: our_logps,
    "forward": lambda: our_forward,
}
WITHOUT_ROUTE = ("bare", "bare_one", *PEERS)
#: Candidates that compute another loss than the others.
OTHER_LOSS = ("sequence", "sequence_told", "quack", "quack_exp")
#: Candidates that a GPU also measures on the logits route.
BOTH_ROUTES = ("loss", "loss_512", "sequence", "logps", "forward")


def split_name(name: str) -> tuple[str, str]:
    """Split ``candidate[:route]`` into (candidate, route)."""
    candidate, _, route = name.partition(":")
    return candidate, route or "auto"


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Select the route in a candidate's name."""
    select_route(split_name(name)[1])
    try:
        yield
    finally:
        select_route("auto")


def route_of(name: str, size: int, vocab: int, dtype: torch.dtype, device: torch.device) -> str:
    """Route of one of our candidates; empty for the bare products and peers."""
    candidate = split_name(name)[0]
    if candidate in WITHOUT_ROUTE:
        return ""
    logits_dtype = torch.float32 if candidate == "loss_fp32" else dtype
    numerics = Numerics([1.0, 0.0, 1.0], dtype, logits_dtype, None, None)
    with variant(name):
        weight = torch.empty(vocab, size, dtype=dtype, device=device)
        return "probabilities" if choose_route(weight, numerics) is ProbabilityRoute else "logits"


def make_inputs(
    rows: int, size: int, vocab: int, dtype: torch.dtype, masked: float, improbable: int, device: torch.device
) -> Inputs:
    """Random hidden states, head and loss inputs; logits spread like a language model's, ratios are around 1.

    The first `improbable` tokens have hidden states, and so logits, 30 times as large.
    """
    g = torch.Generator(device=device).manual_seed(0)
    batch = next(b for b in (8, 4, 2, 1) if rows % b == 0)
    shape = (batch, rows // batch)
    hidden = torch.randn(*shape, size, generator=g, device=device).to(dtype)
    hidden.view(rows, size)[:improbable] *= 30
    weight = torch.randn(vocab, size, generator=g, device=device).mul_(2 / math.sqrt(size)).to(dtype)
    ids = torch.randint(0, vocab, shape, generator=g, device=device)
    # Right padding in sequences of different lengths, `masked` of the rows in all.
    lengths = torch.linspace(1 - 2 * masked, 1, batch, device=device) if masked else torch.ones(batch, device=device)
    position = torch.arange(shape[1], device=device).expand(shape)
    mask = position < (lengths * shape[1]).round().unsqueeze(1)
    logps = grpo_ext.linear_selective_log_softmax(hidden, weight, ids, mask=mask)
    assert isinstance(logps, Tensor)
    return {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "mask": mask,
        "valid": mask.sum().cpu(),
        "old": logps + 0.1 * torch.randn(shape, generator=g, device=device),
        "advantages": torch.randn(batch, generator=g, device=device),
    }


def bare_products(inputs: Inputs, count: int) -> Callable[[], None]:
    """First `count` products of: logits, hidden gradient, head gradient; all rows, preallocated buffers."""
    hidden, weight = inputs["hidden"].flatten(0, 1), inputs["weight"]
    logits = hidden.new_zeros((hidden.shape[0], weight.shape[0]))
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros_like(weight) if count > 2 else None

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if count > 1:
            torch.mm(logits, weight, out=dhidden)
        if dweight is not None:
            torch.mm(logits.t(), hidden, out=dweight)

    return products


class Exact:
    """Log probabilities and their gradient in fp64, of the first 64 valid rows."""

    def __init__(self, inputs: Inputs) -> None:
        self.rows = inputs["mask"].flatten().nonzero().flatten()[:64]
        hidden = inputs["hidden"].detach().flatten(0, 1)[self.rows].double()
        weight, ids = inputs["weight"].detach().double(), inputs["ids"].flatten()[self.rows]
        logps = grpo_ext.reference.linear_selective_log_softmax(hidden, weight, ids)
        assert isinstance(logps, Tensor)
        self.logps = logps
        self.gradient = weight[ids] - (hidden @ weight.t()).softmax(-1) @ weight

    def logp_error(self, logps: Tensor | None) -> float:
        """Largest difference of a log probability; NaN if the candidate returns none."""
        if logps is None:
            return math.nan
        return float((logps.detach().flatten()[self.rows].double() - self.logps).abs().max())

    def gradient_error(self, gradient: Tensor) -> float:
        """Largest relative error of a row's gradient of the hidden states, up to the row's factor in the loss."""
        rows = gradient.flatten(0, 1)[self.rows].double()
        rows, exact = rows[rows.any(dim=1)], self.gradient[rows.any(dim=1)]
        exact = exact * ((rows * exact).sum(1) / exact.square().sum(1)).unsqueeze(1)
        return float(((rows - exact).norm(dim=1) / exact.norm(dim=1)).max()) if len(rows) else math.nan


def check_gradients(results: dict[str, Tensor]) -> None:
    """Raise an error if a candidate's gradient differs from the first candidate's: it computes another loss."""
    first = next(iter(results.values()))
    for name, grad in results.items():
        if split_name(name)[0] in OTHER_LOSS:
            continue
        error = (grad.float() - first.float()).norm() / first.float().norm()
        # The bound is loose in bf16: on random data rounding moves a few rows across a clip limit.
        if error > (1e-3 if first.dtype == torch.float32 else 0.1):
            raise AssertionError(f"{name}: the gradient of the hidden states is off by {error:.3g}")


def measure(size: int, vocab: int, head: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    dtype = common.DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    inputs = make_inputs(args.rows, size, vocab, dtype, args.masked, args.improbable, device)
    hidden = inputs["hidden"].requires_grad_()
    weight = inputs["weight"].requires_grad_(head == "trained")

    def preparing(name: str, loss: Loss) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            hidden.grad = weight.grad = None

            def step() -> Tensor | None:
                with variant(name):
                    value, logps = loss(hidden, weight, inputs)
                    if value.requires_grad:
                        value.backward()
                return logps

            return step

        return prepare

    prepared: dict[str, Callable[[], Callable[[], Any]]] = {}
    exact = Exact(inputs)
    errors: dict[str, float] = {}
    gradient_errors: dict[str, float] = {}
    grads: dict[str, Tensor] = {}
    extra: dict[str, float] = {}
    for name in args.candidates.split(","):
        candidate = split_name(name)[0]
        try:
            loss = PEERS[candidate][0](device) if candidate in PEERS else KNOWN[candidate]()
        except ImportError as missing:
            print(f"{name}: absent, {missing}")
            continue
        prepare = preparing(name, loss)
        try:
            errors[name] = exact.logp_error(prepare()())
        except Exception as error:
            if candidate not in PEERS:
                raise
            print(f"{name}: absent, {type(error).__name__}: {error}")
            continue
        prepared[name] = prepare
        if hidden.grad is not None:
            grads[name] = hidden.grad.clone()
            gradient_errors[name] = exact.gradient_error(hidden.grad)
        hidden.grad = weight.grad = None
        extra[name] = common.peak_extra_bytes(prepared[name], device)
    hidden.grad = weight.grad = None
    check_gradients(grads)
    grads.clear()
    del exact
    with torch.no_grad():
        bare = bare_products({k: v.detach() for k, v in inputs.items()}, 3 if head == "trained" else 2)
        one = bare_products({k: v.detach() for k, v in inputs.items()}, 1)
    forward = any(split_name(name)[0] == "forward" for name in prepared)
    prepared = {"bare": lambda: bare} | ({"bare_one": lambda: one} if forward else {}) | prepared
    timings = common.interleaved(prepared, device, warmup=args.warmup, runs=args.runs)
    where = common.machine(device)
    rows = []
    for name, timing in timings.items():
        floor = timings["bare_one" if split_name(name)[0] in ("forward", "bare_one") else "bare"].median
        row: dict[str, Any] = where | {
            "rows": args.rows,
            "valid": int(inputs["mask"].sum()),
            "hidden": size,
            "vocab": vocab,
            "improbable": args.improbable,
            "dtype": str(dtype).removeprefix("torch."),
            "head": head,
            "candidate": name,
            "route": route_of(name, size, vocab, dtype, device),
            "runs": args.runs,
            "ms": timing.median,
            "ms_min": timing.minimum,
            "ratio": timing.median / floor,
            "extra_mb": extra.get(name, math.nan) / 2**20,
            "logp_error": errors.get(name, math.nan),
            "gradient_error": gradient_errors.get(name, math.nan),
            "version": version_of(name),
        }
        for peer in PEERS:
            row[f"x_{peer}"] = timings[peer].median / timing.median if peer in timings else math.nan
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rows", type=int, default=None, help="tokens; default 1024 on the CPU, 8192 on the GPU")
    parser.add_argument("--shapes", default=None, help="HxV,HxV; default: " + str(SHAPES))
    parser.add_argument("--heads", default="frozen,trained")
    parser.add_argument("--dtype", choices=tuple(common.DTYPES), default=None, help="default fp32 (CPU), bf16 (GPU)")
    parser.add_argument("--masked", type=float, default=0.0, help="share of masked rows, below 0.5")
    parser.add_argument("--improbable", type=int, default=0, help="number of tokens with probabilities around e^-250")
    parser.add_argument("--candidates", default=None, help="default: all; without loss_fp32 and loss_512 on the CPU")
    parser.add_argument("--runs", type=int, default=None, help="default 5 on the CPU, 20 on the GPU")
    parser.add_argument("--warmup", type=int, default=None, help="default 1 on the CPU, 5 on the GPU")
    parser.add_argument("--csv", type=Path, default=None, help="default: bench/results/linear_<device>.csv")
    parser.add_argument("--append", action="store_true", help="keep the lines already in the CSV")
    args = parser.parse_args()

    device = torch.device(args.device)
    on_cpu = device.type == "cpu"
    args.rows = args.rows or (1024 if on_cpu else 8192)
    args.runs = args.runs or (5 if on_cpu else 20)
    args.warmup = args.warmup if args.warmup is not None else (1 if on_cpu else 5)
    usual = [n for n in (*KNOWN, *PEERS) if not (on_cpu and n in ("loss_fp32", "loss_512"))]
    usual += [] if on_cpu else [f"{n}:logits" for n in BOTH_ROUTES]
    args.candidates = args.candidates or ",".join(usual)
    torch.set_num_threads(args.threads)
    results: list[dict[str, Any]] = []
    for shape in (args.shapes or SHAPES[device.type]).split(","):
        size, vocab = (int(n) for n in shape.split("x"))
        for head in args.heads.split(","):
            results += measure(size, vocab, head, args, device)
    path = args.csv or common.RESULTS / f"linear_{args.device}.csv"
    common.write_csv(path, results, append=args.append)
    print(f"{results[0]['device']}, {results[0]['cpu']} ({results[0]['isa']}), {args.threads} threads")
    columns = "rows valid improbable hidden vocab dtype head candidate route ms ms_min ratio "
    columns += " ".join(f"x_{peer}" for peer in PEERS) + " extra_mb logp_error gradient_error version"
    common.print_table(results, columns.split())
    print(f"written to {path}")


if __name__ == "__main__":
    main()
