"""Two gloo processes: a folder that cannot be used stops both, and files of two runs in one checkpoint do not mix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ext.trainer.run_lock import LOCK_FILE, sole_run

WORKER = Path(__file__).with_name("stopped_processes_worker.py")
RUN = "run-dapo-2-ddp"  # the folder's name in `make_trainer`


@pytest.mark.timeout(240)
def test_both_processes_find_the_same(tmp_path: Path) -> None:
    (tmp_path / "no lock" / RUN / LOCK_FILE).mkdir(parents=True)  # a folder is in the way
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with sole_run(tmp_path / "in use" / RUN):
        done = subprocess.run(
            [*command, str(WORKER), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=220,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first == second
    assert first["in use"].startswith("FolderInUseError: ")
    assert f"is in use by another run (process {os.getpid()} on " in first["in use"]
    assert first["no lock"].startswith("IsADirectoryError: ")
    assert (first["whole"], first["mixed"]) == (False, True)
