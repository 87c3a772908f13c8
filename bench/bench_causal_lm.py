"""Compare transformers' cross entropy with `causal_lm_loss`: time, and peak memory beyond the logits.

    python bench/bench_causal_lm.py
    python bench/bench_causal_lm.py --device cuda --tokens 8192 --vocab 151936

Measures forward and backward. New logits are computed before each run, unmeasured; one label in eight is -100.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from grpo_ext.bench.common import DTYPES, RESULTS, interleaved, machine, peak_extra_bytes, print_table, write_csv
from grpo_ext.integrations.transformers import causal_lm_loss

CANDIDATES: dict[str, Callable[..., torch.Tensor]] = {
    "transformers": ForCausalLMLoss,
    "causal_lm_loss": causal_lm_loss,
    "causal_lm_loss, inplace=False": functools.partial(causal_lm_loss, inplace=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    labels = torch.randint(0, options.vocab, (1, options.tokens), device=device)
    labels[:, ::8] = -100

    def prepared(loss: Callable[..., torch.Tensor]) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            leaf = torch.zeros(1, device=device, dtype=dtype, requires_grad=True)
            noise = torch.randn(1, options.tokens, options.vocab, device=device, dtype=dtype)
            logits = noise + leaf  # like a head's output: not a leaf, and not saved for backward
            return lambda: torch.autograd.grad(loss(logits=logits, labels=labels, vocab_size=options.vocab), logits)

        return prepare

    candidates = {name: prepared(loss) for name, loss in CANDIDATES.items()}
    timings = interleaved(candidates, device, warmup=1, runs=options.runs)
    rows = [
        {
            "candidate": name,
            "dtype": options.dtype,
            "tokens": options.tokens,
            "vocab": options.vocab,
            "ms_median": timings[name].median,
            "of_stock": timings[name].median / timings["transformers"].median,
            "peak_mb": peak_extra_bytes(candidate, device) / 1e6,
            "logits_mb": options.tokens * options.vocab * dtype.itemsize / 1e6,
            **machine(device),
        }
        for name, candidate in candidates.items()
    ]
    write_csv(RESULTS / f"causal_lm_{options.device}.csv", rows, append=True)
    print_table(rows, ("candidate", "dtype", "ms_median", "of_stock", "peak_mb", "logits_mb"))


if __name__ == "__main__":
    main()
