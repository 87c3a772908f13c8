"""The runs of test_two_processes.py with DeepSpeed ZeRO-2 and 3 on the CPU; DDP, FSDP2 and ZeRO on two GPUs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import two_process_worker as worker
from two_processes import check_the_rest, compare, on_two

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed: make test-all runs this")


@needs_deepspeed
@pytest.mark.timeout(300)
def test_deepspeed_equals_one_process(tmp_path: Path) -> None:
    kinds = ["zero2", "zero3"]
    two = on_two(tmp_path, kinds, timeout=280, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    in_pieces, handed_in = two["from a folder"]
    assert in_pieces == pytest.approx(handed_in, rel=1e-5, abs=1e-6)
    for case in worker.CASES["zero2"]:
        one = worker.run(tmp_path, case, 1)
        for kind in kinds:
            assert two[kind][case]["sharded"] == (kind == "zero3")
            compare(one, two[kind][case], case)
    for kind in kinds:
        check_the_rest(two[kind])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kinds", [["ddp"], ["fsdp2"], pytest.param(["zero2", "zero3"], marks=needs_deepspeed)])
def test_two_gpus_equal_one_process(tmp_path: Path, kinds: list[str]) -> None:
    two = on_two(tmp_path, kinds, timeout=280)
    for case in sorted({case for kind in kinds for case in worker.CASES[kind]}):
        one = worker.run(tmp_path, case, 1)
        for kind in kinds:
            compare(one, two[kind][case], case, tolerance=1e-3)
    for kind in kinds:
        first = [line["loss"] for line in two[kind]["lora"]["logs"]]
        for logs in two[kind].get("again", []):
            assert [line["loss"] for line in logs] == pytest.approx(first, rel=1e-5, abs=1e-6)
        check_the_rest(two[kind])
