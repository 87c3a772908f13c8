"""Run the tests of the losses at each instruction set of this processor, for our kernels and for oneDNN.

Prints the sets that the processor lacks. Further arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from grpo_ext import _C

FOLDERS = ("tests/linear", "tests/losses", "tests/ops")

#: Values of ONEDNN_MAX_CPU_ISA, and the CPU capability that each needs to have an effect.
ONEDNN = {"AVX2": "avx2", "AVX512_CORE_BF16": "avx512_bf16"}


def main() -> int:
    failed: list[str] = []

    def run(name: str, arguments: list[str], **environment: str) -> None:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "pytest", *FOLDERS, *arguments, *sys.argv[1:]]
        if subprocess.run(command, env=os.environ | environment, check=False).returncode:
            failed.append(name)

    usual = _C.cpu_isa()
    for isa in ("portable", "avx2", "avx512"):
        if not _C.select_cpu_isa(isa):
            print(f"== kernels with {isa}: skipped, this processor lacks it")
        elif isa != usual:
            run(f"kernels with {isa}", ["--cpu-isa", isa])
    capabilities = torch.cpu.get_capabilities()
    for value, capability in ONEDNN.items():
        if capabilities.get(capability):
            run(f"oneDNN limited to {value}", [], ONEDNN_MAX_CPU_ISA=value)
        else:
            print(f"== oneDNN limited to {value}: skipped, this processor lacks {capability}")
    run(f"kernels with {usual}, oneDNN unlimited", [])
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
