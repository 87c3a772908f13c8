"""Compare each peer's own code with our replacement: time and memory.

    PYTHONPATH=.venv/peers python bench/bench_integrations.py --compiled
    python bench/bench_integrations.py --candidates kto,dpo --layers 4 --runs 3
    python bench/bench_integrations.py --device cuda --batch 16 --completion 1024 --tokens 1024 --policy 64x4096

`make peers` installs Liger-Kernel and verl into .venv/peers; TRL comes with `make setup`. Candidates that cannot be
imported, or do not run on the device, are skipped with a message. The candidates:

sft, kto, dpo One step of TRL's trainer, loss and backward, on a fixed batch of random texts: unpatched, and after
              `grpo_ext.integrations.trl.patch()`. The model is a random Llama of the given sizes, by default
              SmolLM2-135M's. `lora` trains LoRA on every linear layer but the head, and the model without adapter is
              the reference model. `full` trains all weights and has a second model as reference. Data loading and the
              optimizer are not measured. Our kernels must serve every patched step as `integration_cases.SERVED` lists.
liger_linear  `LigerFusedLinearGRPOLoss` from hidden states and head, with old and reference log probabilities, forward
              and backward. Liger's runs with ``compiled=False``; ``--compiled`` adds its default, torch.compile.
liger_logits  `triton_grpo_loss`, which overwrites the logits, forward and backward. Triton: GPU only.
liger_logps   `fused_selective_log_softmax`, which has no backward. Triton: GPU only.
verl_head     `FusedLinearForPPO`, verl's fused head in torch (chunks of 512 rows, its default), on a GPU also verl's
              Triton `linear_cross_entropy`, against our `linear_cross_entropy`: log probabilities and entropies, and
              backward from the log probabilities, as verl trains without an entropy bonus.
verl_policy   verl's policy loss ``vanilla`` and our ``grpo_ext``, with their metrics, on fp32 (B,T).

``--trained`` takes lora and full for sft, kto and dpo; ``--heads`` takes frozen and trained for liger_linear and
verl_head.
The peer runs first. Before timing, values and gradients of every candidate must agree with the peer's, within
`TOLERANCE` of their norm; `difference` is the largest difference.

Columns: ms_median and ms_min are wall-clock milliseconds of one call. cpu_ms_median is the processor time of all
threads, which excludes other load on the machine. of_peer is the median divided by the peer's. peak_mb is the memory
during one call above the memory before it (`common.peak_extra_bytes`), gradients included.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from integration_cases import CANDIDATES, TOLERANCE, Comparison, Unavailable, comparisons, without_progress_bars

from grpo_ext.bench.common import RESULTS, interleaved, machine, peak_extra_bytes, print_table, write_csv


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cpu":  # freed memory kept by malloc would hide allocations of the next call
        ctypes.CDLL(None).malloc_trim(0)
    else:
        torch.cuda.empty_cache()


def measure(subject: str, comparison: Comparison, options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    differences = comparison.prove()
    busy: dict[str, list[float]] = {name: [] for name in comparison.candidates}

    def timed(name: str) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            call = comparison.prepare(name)

            def measured() -> None:
                begin = time.process_time()
                call()
                busy[name].append((time.process_time() - begin) * 1e3)

            return measured

        return prepare

    candidates = {name: timed(name) for name in comparison.candidates}
    timings = interleaved(candidates, device, warmup=options.warmup, runs=options.runs)
    peer = timings[next(iter(timings))].median
    rows = []
    for name in candidates:
        release(device)
        peak = peak_extra_bytes(functools.partial(comparison.prepare, name), device)
        rows.append(
            {
                "subject": subject,
                "candidate": name,
                "peer": comparison.peer,
                "dtype": comparison.dtype,
                **comparison.columns,
                "runs": options.runs,
                "ms_median": timings[name].median,
                "ms_min": timings[name].minimum,
                "of_peer": timings[name].median / peer,
                "cpu_ms_median": statistics.median(busy[name][options.warmup :]),
                "peak_mb": peak / 1e6,
                "difference": differences[name],
                **machine(device),
            }
        )
    return rows


def names(text: str) -> list[str]:
    return text.split(",")


def pair(text: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bf16")
    parser.add_argument("--candidates", default=",".join(CANDIDATES), type=names)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--batch", type=int, default=4, help="texts (an even number: dpo pairs them), completions")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model of sft, kto and dpo")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of sft, kto and dpo")
    parser.add_argument("--completion", type=int, default=96, help="longest completion of sft, kto and dpo")
    parser.add_argument("--trained", default="lora,full", type=names, help="lora, full: weights of sft, kto and dpo")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in sft, kto and dpo")
    parser.add_argument("--tokens", type=int, default=256, help="T of the liger and verl_head candidates")
    parser.add_argument("--heads", default="frozen,trained", type=names)
    parser.add_argument("--equal", action="store_true", help="completions of equal length, without padding")
    parser.add_argument("--compiled", action="store_true", help="also Liger with torch.compile; needs a C++ compiler")
    parser.add_argument("--policy", type=pair, default=(64, 1024), help="BxT of verl's policy loss")
    parser.add_argument("--aggregation", default="token-mean", help="of verl's policy loss")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=None, help="default: bench/results/integrations_<device>.csv")
    parser.add_argument("--append", action="store_true", help="keep the lines already in the CSV")
    options = parser.parse_args(arguments)
    if unknown := set(options.candidates) - set(CANDIDATES):
        parser.error(f"no such candidates: {', '.join(sorted(unknown))}; choose from {', '.join(CANDIDATES)}")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    without_progress_bars()
    rows: list[dict[str, Any]] = []
    path = options.csv or RESULTS / f"integrations_{options.device}.csv"
    for candidate, subject, build in comparisons(options):
        if candidate not in options.candidates:
            continue
        try:
            comparison = build()
        except Unavailable as reason:
            print(f"{subject}: skipped, {reason}")
            continue
        try:
            new = measure(subject, comparison, options)
        finally:
            comparison.after()
        del comparison
        release(torch.device(options.device))
        print_table(new, ("subject", "candidate", "ms_median", "of_peer", "cpu_ms_median", "peak_mb", "difference"))
        write_csv(path, new, append=options.append or bool(rows))
        rows += new
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
