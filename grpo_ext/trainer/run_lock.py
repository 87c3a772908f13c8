"""The lock of a run folder: two runs never write into one."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"

#: How often this process holds each lock file: a trainer runs inside the command that holds the folder already.
_held: dict[Path, int] = {}


class FolderInUseError(RuntimeError):
    """Another run is writing into the folder; the message names its process and host."""


@contextlib.contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """Hold the folder of a run, made where it is missing, for the time of the ``with`` block.

    The kernel gives the lock back when the process ends, however it ends, so a crash leaves nothing in the way. A file
    system or platform without locks goes without.

    Raises:
        FolderInUseError: another process holds it.
    """
    os.makedirs(folder, exist_ok=True)
    path = Path(folder).resolve() / LOCK_FILE
    with contextlib.ExitStack() as stack:
        if not _held.get(path) and fcntl is not None:
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise FolderInUseError(
                    f"{folder} is in use by another run ({file.read().strip() or 'unknown process'}): "
                    "wait for its end, or choose another output_dir"
                ) from error
            except OSError:
                pass
            else:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        _held[path] = _held.get(path, 0) + 1
        try:
            yield
        finally:
            _held[path] -= 1
