"""Compare Unsloth's own functions with ours: ``python tests/integrations/unsloth_check.py [--device cuda]``.

For each function that `grpo_ext.integrations.unsloth.patch` replaces, and each set of options, print the errors of
Unsloth and ours against the fp64 reference: the largest error of a log probability, and of the gradients relative to
their norm. Exit with 1 if our error is more than twice Unsloth's (and above fp32 rounding), or if our function did not
run. On a GPU also print milliseconds of forward and backward, and the memory that they add.

Needs unsloth and unsloth_zoo on the path. Imports only unsloth_zoo, with the environment variable that it requires and
Unsloth sets: importing Unsloth itself loads engines and quantizers that this check does not need.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import grpo_ext.integrations.unsloth as ours
from grpo_ext import reference

os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())  # else a folder where it is started

#: fp32 rounding of a log probability of size 10, and of a gradient of norm 1.
FLOOR = 4e-6


def cases(vocabulary: int, device: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Options in Unsloth's names, and in the reference's."""
    bias = torch.linspace(-1, 1, vocabulary, device=device)
    return [
        ({}, {}),
        ({"temperature": 0.7, "support_top_k": 0, "support_top_p": 1.0}, {"temperature": 0.7}),
        ({"logit_scale_multiply": 0.5, "logit_softcapping": 9.0}, {"logit_scale": 0.5, "logit_softcap": 9.0}),
        ({"lm_head_bias": bias, "chunks": 2}, {"bias": bias.double()}),
    ]


def inputs(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    B, T, H, V = sizes
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(B, T, H).to(dtype).requires_grad_()
    head = (3 * normal(V, H) / H**0.5).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, V, (B, T), generator=generator, device=device), normal(B, T)


def run(function: Callable[..., Any], given: tuple[torch.Tensor, ...], **options: Any) -> tuple[torch.Tensor, ...]:
    hidden, head, index, weights = given
    logps = function(hidden, head, index, **options)
    return (logps.detach(), *torch.autograd.grad((logps.double() * weights).sum(), (hidden, head)))


def errors(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> tuple[float, ...]:
    """Of the log probabilities the largest; of the two gradients relative to the norm."""
    return (
        float((found[0].double() - wanted[0]).abs().max()),
        *(float((a.double() - b).norm() / b.norm()) for a, b in zip(found[1:], wanted[1:], strict=True)),
    )


def report(
    who: str, call: Callable[[], tuple[torch.Tensor, ...]], wanted: tuple[torch.Tensor, ...]
) -> tuple[float, ...]:
    """The errors, printed; on a GPU with the median time of five calls and the memory beyond what was there."""
    found = errors(call(), wanted)
    line = f"  {who:8} logps {found[0]:.1e} d_hidden {found[1]:.1e} d_head {found[2]:.1e}"
    if wanted[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - started))
        line += f" {sorted(taken)[2]:.2f} ms {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"
    print(line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    import unsloth_zoo.rl_replacements as replacements

    sizes = (4, 256, 1024, 151_936) if device == "cuda" else (2, 5, 8, 67)
    failures = 0
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(sizes, dtype, device)
        exact = tuple(x.detach().double().requires_grad_() for x in given[:2]) + given[2:]
        for options, processed in cases(sizes[-1], device):
            wanted = run(reference.linear_selective_log_softmax, exact, **processed)
            for name in ours.SYMBOLS:
                print(f"{name}, {str(dtype)[6:]}, {', '.join(sorted(options)) or 'no options'}")
                theirs = functools.partial(run, getattr(replacements, name), given, **options)
                of_theirs = report("unsloth", theirs, wanted)
                ours.patch(one_forward=False, trim=False, dense=False)
                mine = functools.partial(run, getattr(replacements, name), given, **options)
                ours_ran = mine() is not None and ours.status() == {"patched": True, "served": 1}
                of_ours = report("grpo_ext", mine, wanted)
                ours.unpatch()
                if not (ours_ran and all(a <= max(2 * b, FLOOR) for a, b in zip(of_ours, of_theirs, strict=True))):
                    failures += 1
                    print(f"  DIFFERENT (ours ran: {ours_ran})")
    print(f"{failures} cases differ" if failures else "all equal")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
