"""Poison the ranks that a test starts: processes of torch.multiprocessing and of torch.distributed.run.

Skip other processes: importing torch takes seconds, and torch's compiler starts dozens of processes.
"""

import os
import sys

if "--multiprocessing-fork" in sys.orig_argv or "LOCAL_RANK" in os.environ:
    from poisoned_memory import fill

    fill(True)
