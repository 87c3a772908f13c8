"""Time a product in bf16 and in fp32, and print what ``dtype: auto`` chooses: ``python -m grpo_ext.bench.dtype``."""

from __future__ import annotations

import argparse
import functools

import torch

from grpo_ext.bench import common
from grpo_ext.tasks import fast_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, nargs=3, default=(256, 1024, 1024), help="rows, K, columns")
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows, k, columns = arguments.size
    operands = {
        name: tuple(torch.randn(*shape, device=device).to(common.DTYPES[name]) for shape in ((rows, k), (k, columns)))
        for name in ("bf16", "fp32")
    }
    timings = common.interleaved(
        {name: functools.partial(functools.partial, torch.mm, *pair) for name, pair in operands.items()},
        device, warmup=3, runs=arguments.runs,
    )  # fmt: skip
    chosen, reason = fast_dtype(arguments.device)
    print(f"{chosen}: {reason}")
    for name, timing in timings.items():
        print(f"{name} {timing.median:.3f} ms")


if __name__ == "__main__":
    main()
