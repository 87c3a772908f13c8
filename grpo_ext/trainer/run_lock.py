"""Lock of a run folder, so that two runs never write into the same folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"

#: Nesting depth of each lock file in this process: the command locks the folder, then the trainer inside it.
_held: dict[Path, int] = {}


class FolderInUseError(RuntimeError):
    """Raised if another run is writing into the folder; the message names its process and host."""


@contextlib.contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """Lock the folder of a run for the ``with`` block; create it if missing.

    The operating system releases the lock when the process ends, even in a crash. A no-op on file systems and platforms
    without locks.

    Raises:
        FolderInUseError: another process holds the lock.
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
                    "wait until that run ends, or choose another output_dir"
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


@contextlib.contextmanager
def sole_run_of_all(folder: str | Path, is_main: bool) -> Iterator[None]:
    """Lock the folder on the main process, as `sole_run` does; a collective.

    Raises:
        FolderInUseError: another run holds the lock; raised on all processes.
        OSError: the folder cannot be created or written; raised on all processes.
    """
    error: Exception | None = None
    with contextlib.ExitStack() as held:
        if is_main:
            try:
                held.enter_context(sole_run(folder))
            except (FolderInUseError, OSError) as failed:
                error = failed
        (error, *_) = gather_object([error])
        if error is not None:
            raise error
        yield
