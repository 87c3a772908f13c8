"""Two gloo processes see the same data, advantages and divisors as one with twice the rows: the same gradients.

DDP and FSDP2 here; DeepSpeed and GPUs in test_two_processes_sharded.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import two_process_worker as worker
from two_processes import check_the_rest, compare, on_two


@pytest.mark.timeout(240)
def test_two_processes_equal_one(tmp_path: Path) -> None:
    two = on_two(tmp_path, ["ddp", "fsdp2"], timeout=220, CUDA_VISIBLE_DEVICES="")
    assert two.pop("fsdp without GPUs").startswith("fsdp=True, but accelerate shards weights on GPUs only")
    completions = two.pop("sampled")
    assert len(completions) == 8
    assert completions[:4] != completions[4:]  # each rank draws from a stream of its own
    first, second = two["too long"]
    assert first.startswith("on another process: prompt 0 has 70 tokens")
    assert second.startswith("prompt 0 has 70 tokens")
    first, second = two["no prompt"]
    assert first.startswith("train_dataset[0] has no 'prompt' column, only: question; give every row a prompt")
    assert second.startswith("on another process: train_dataset[0] has no 'prompt' column")
    for case in worker.CASES["ddp"]:
        one = worker.run(tmp_path, case, 1)
        for kind in (kind for kind in ("ddp", "fsdp2") if case in worker.CASES[kind]):
            assert two[kind][case]["sharded"] == (kind == "fsdp2")
            assert len(two[kind][case]["gradients"]) == 3
            compare(one, two[kind][case], case)
    for kind in ("ddp", "fsdp2"):
        check_the_rest(two[kind])
    one = worker.run(tmp_path / "bf16", "lora", 1, bf16=True)["logs"]
    for mine, theirs in zip(one, two["fsdp2"]["bf16"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-2)
    checkpoint = tmp_path / "resumed-ddp" / "first" / "run-dapo-2-ddp" / "checkpoint-1"
    with pytest.raises(ValueError, match=r"was written by 2 process\(es\), this run has 1: use 2"):
        worker.run(tmp_path / "last", "dapo", 1, resume=str(checkpoint))
