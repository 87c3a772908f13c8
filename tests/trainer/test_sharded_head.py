"""DDP and FSDP2 hooks fire around the fused head: two ranks have the gradients of one, averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_worker
import torch.distributed as dist
import torch.multiprocessing as mp


@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.timeout(120)
def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(sharded_worker.main, args=(2, str(tmp_path / "rendezvous")), nprocs=2)
