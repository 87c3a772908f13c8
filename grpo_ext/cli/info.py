"""`grpo-ext info`: print the build, the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

#: Packages whose versions affect the results of a run.
PACKAGES = ("grpo_ext", "torch", "transformers", "peft", "accelerate", "datasets", "reasoning-gym")


def versions() -> dict[str, str]:
    """Versions of Python and of `PACKAGES`; ``not installed`` for a missing package."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def info_rows() -> list[tuple[str, str]]:
    """The (name, value) rows of the table."""
    import torch

    import grpo_ext
    from grpo_ext.tasks import fast_dtype

    rows = [(name, _text(value)) for name, value in dict(grpo_ext.build_info()).items()]
    rows += [
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("threads", str(torch.get_num_threads())),
        ("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "not set")),
    ]
    if grpo_ext.build_info()["cuda_version"] is None and shutil.which("nvcc"):
        rows.append(("cuda kernels", "not built: the build found no GPU, or GRPO_EXT_CUDA=OFF; ON builds them"))
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows.append(("gpu", ", ".join(devices) or "none"))
    rows.append(("dtype auto", "{} ({})".format(*fast_dtype())))
    return rows + [(f"version of {name}", version) for name, version in versions().items()]


def print_info() -> None:
    """Print the table of `info_rows`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="grpo_ext")
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    for name, value in info_rows():
        table.add_row(name, value)
    Console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, set)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
